"""All cells of the matrix, the impossible cells with their reasons, and the player of a cell."""

from __future__ import annotations

from collections.abc import Iterator, Sequence
from itertools import count
from typing import Any

from tests.failure.cell import Cell, Fault, Kind, Outcome
from tests.failure.judge import Judge
from tests.failure.points import POINTS
from tests.failure.rig import SHARDS, STEADY, Rig
from tests.failure.scene import NotReached, Scene

FAULTS = (Fault.KILL, Fault.CUT, Fault.FREEZE)


def cells() -> list[Cell]:
    """Every possible cell, in the order of the protocol."""
    found = []
    for point in POINTS.values():
        shards: Sequence[int | None] = range(SHARDS) if point.on_shard else [None]
        faults = (*FAULTS, Fault.NONE) if point.itself else FAULTS
        found += [
            Cell(point.name, fault, shard, kind)
            for kind in Kind
            if kind not in point.impossible
            for shard in shards
            for fault in faults
        ]
    return found


def left_out() -> list[dict[str, Any]]:
    """Groups of cells of the full product that are left out, each with the reason and the number of cells."""
    found: list[dict[str, Any]] = []
    for point in POINTS.values():
        per_kind = SHARDS * len(FAULTS)
        for kind, reason in point.impossible.items():
            found.append({"point": point.name, "operation": kind.value, "cells": per_kind, "reason": reason})

        if not point.on_shard:
            cells = (len(Kind) - len(point.impossible)) * (SHARDS - 1) * len(FAULTS)
            reason = "the point is in the catalog or in a process, not on a shard: it is played once, not for each"
            found.append({"point": point.name, "shard": "second and third", "cells": cells, "reason": reason})
    return found


class Player:
    """Plays cells on a rig, one after the other."""

    def __init__(self, rig: Rig) -> None:
        self._rig = rig
        self._judge = Judge(rig)
        self._numbers = count(1)

    def play(self, cell: Cell) -> Outcome:
        """Play a cell and judge the outcome; the rig is at rest before and after."""
        number = next(self._numbers)
        slug = f"cell-{number}"
        percent = 20.0 + number % 60

        outcome = Outcome(cell)
        before = self._set_up(cell, slug)
        self._judge.begin()

        scene = Scene(self._rig, cell, slug, percent)
        try:
            try:
                POINTS[cell.point].script(scene)
                outcome.fired = True
            finally:
                outcome.pid = scene.pid
                scene.close()
                outcome.drain_s = scene.drain()
                outcome.state = scene.state()
                outcome.answer = scene.the_call.answer if scene.the_call else ""
            outcome.problems = tuple(self._judge.problems(scene, before))
        except NotReached as error:
            outcome.problems = (*outcome.problems, f"not reached: {error}")

        return outcome

    def _set_up(self, cell: Cell, slug: str) -> float | None:
        """Make what the operation needs. Returns the percentage of its segment."""
        if cell.kind is Kind.CREATION:
            return None

        if cell.kind is Kind.ROLLOUT:
            [row] = self._rig.rows(None, "SELECT rule_threshold FROM segments WHERE slug = :slug", slug=STEADY)
            return float(row.rule_threshold / 1000)

        client = self._rig.serving()
        client.create(slug, "")
        client.roll_out(slug, 50)
        return 50


def sample(every: Sequence[Cell]) -> Iterator[Cell]:
    """A few cells for each fault, kind of operation and shard: those that differ most."""
    wanted = {
        ("accepted", Fault.KILL, None, Kind.ROLLOUT),
        ("mid-publish", Fault.CUT, 1, Kind.DELETION),
        ("prepare-reply-lost", Fault.KILL, 2, Kind.ROLLOUT),
        ("prepare-rolled-back", Fault.NONE, 0, Kind.CREATION),
        ("prepared", Fault.FREEZE, 1, Kind.ROLLOUT),
        ("prepared", Fault.KILL, 1, Kind.CREATION),
        ("vote-reply-lost", Fault.CUT, 0, Kind.DELETION),
        ("body-early", Fault.FREEZE, 0, Kind.DELETION),
        ("decision-reply-lost", Fault.FREEZE, None, Kind.CREATION),
        ("decision-contested", Fault.NONE, None, Kind.ROLLOUT),
        ("late-vote", Fault.NONE, 2, Kind.ROLLOUT),
        ("late-decision", Fault.FREEZE, None, Kind.CREATION),
        ("decided-1", Fault.KILL, 0, Kind.ROLLOUT),
        ("busy", Fault.NONE, 2, Kind.DELETION),
        ("gone-lost", Fault.CUT, 2, Kind.ROLLOUT),
        ("patch-not-listed", Fault.KILL, 1, Kind.ROLLOUT),
        ("patch-late", Fault.NONE, 2, Kind.DELETION),
        ("patch-chunks-lost", Fault.NONE, 0, Kind.ROLLOUT),
        ("late-after-aborted", Fault.FREEZE, 1, Kind.ROLLOUT),
        ("late-after-done", Fault.NONE, 0, Kind.CREATION),
        ("recovery-twice", Fault.KILL, 2, Kind.DELETION),
    }
    return (cell for cell in every if (cell.point, cell.fault, cell.shard, cell.kind) in wanted)
