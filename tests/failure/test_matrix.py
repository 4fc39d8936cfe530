"""A few cells of the fault matrix (``make test-failure`` plays all), and a check that the matrix is complete."""

from __future__ import annotations

import re
from collections.abc import Iterator
from pathlib import Path

import pytest

from tests.eventually import eventually
from tests.failure.cell import Cell, Fault, Kind, Outcome
from tests.failure.matrix import FAULTS, Player, cells, left_out, sample
from tests.failure.points import POINTS
from tests.failure.rig import SECOND, SHARDS, STEADY, Rig
from tests.failure.scene import Call
from tests.local_servers import REPOSITORY

CELLS = cells()
DEMANDED = 288


def test_every_cell_of_the_product_is_played_or_left_out_with_a_reason() -> None:
    assert len(set(CELLS)) == len(CELLS)
    with_a_fault = [cell for cell in CELLS if cell.fault is not Fault.NONE]
    assert len(with_a_fault) >= DEMANDED
    left = left_out()
    assert all(group["reason"] for group in left)
    product = len(POINTS) * len(FAULTS) * SHARDS * len(Kind)
    assert len(with_a_fault) + sum(group["cells"] for group in left) == product


def test_the_sample_has_every_fault_operation_and_shard() -> None:
    chosen = list(sample(CELLS))
    assert {cell.fault for cell in chosen} == set(Fault)
    assert {cell.kind for cell in chosen} == set(Kind)
    assert {cell.shard for cell in chosen} == {None, *range(SHARDS)}


def test_every_point_is_described() -> None:
    page = (REPOSITORY / "docs" / "failure-matrix.md").read_text()
    table = page.split("## Points")[1].split("## What must hold")[0]
    assert re.findall(r"^\| `([a-z0-9-]+)`", table, re.MULTILINE) == list(POINTS)


def test_a_fault_that_did_not_fall_is_no_success() -> None:
    outcome = Outcome(CELLS[0])
    assert not outcome.passed
    outcome.fired = True
    assert outcome.passed
    outcome.problems = ("something",)
    assert not outcome.passed


@pytest.fixture(scope="module")
def rig(servers_folder: Path) -> Iterator[Rig]:
    rig = Rig(servers_folder / "matrix")
    rig.start()
    yield rig
    rig.stop()


@pytest.fixture(scope="module")
def player(rig: Rig) -> Player:
    return Player(rig)


@pytest.mark.parametrize("cell", list(sample(CELLS)), ids=str)
def test_a_cell(player: Player, cell: Cell) -> None:
    outcome = player.play(cell)
    assert outcome.passed, outcome.to_json()


def test_with_all_operations_workers_frozen_deadlines_hold_and_the_queue_goes_on(rig: Rig) -> None:
    pass_deadline = "UPDATE operations SET deadline = clock_timestamp() WHERE state = 'PREPARING' AND slug = :slug"
    state_of = "SELECT state FROM operations WHERE slug = :slug ORDER BY seq DESC LIMIT 1"

    def state(slug: str) -> str:
        return str(rig.rows(None, state_of, slug=slug)[0].state)

    with rig.workers_frozen():
        calls = []
        for slug, before in ((STEADY, "PREPARING"), (SECOND, "QUEUED")):
            calls.append(Call(rig.serving(), lambda client, slug=slug: client.roll_out(slug, 12.5)))  # type: ignore[misc]
            eventually(lambda: state(slug) == before)  # noqa: B023

        for slug, call in zip((STEADY, SECOND), calls, strict=True):
            eventually(lambda: state(slug) == "PREPARING")  # noqa: B023
            rig.rows(None, pass_deadline, slug=slug)
            eventually(lambda: call.ended)  # noqa: B023
            assert call.answer.startswith("failed: the shards did not all prepare before the deadline")
            assert state(slug) == "ABORTED"

    # Now the workers take the messages of the meantime, which must change nothing.
    last = Call(rig.serving(), lambda client: client.roll_out(SECOND, 12.5))
    eventually(lambda: last.ended)
    assert last.answer == "done"
    assert state(STEADY) == "ABORTED"
    assert rig.check() == []
