"""What must hold after every cell, whatever the fault was."""

from __future__ import annotations

import random
from collections.abc import Iterator

from segsvc.domain.bucketing import bucket
from tests.failure.cell import Kind
from tests.failure.rig import SECOND, SHARDS, USERS, FrontClient, Rig
from tests.failure.scene import Call, Scene

READ = sorted(random.Random(7).sample(USERS, 60))
"""Users whose lists are read before and after each cell. The read before it puts old entries into the cache."""

_PATHS = (
    ["QUEUED", "PREPARING", "COMMITTED", "DONE"],
    ["QUEUED", "PREPARING", "ABORTED"],
    ["QUEUED", "ABORTED"],
)
_UNKNOWN = ("UNAVAILABLE", "CANCELLED", "DEADLINE_EXCEEDED")
"""Answers that leave the operation's outcome open."""


class Judge:
    """Compares the present state with the required one, and describes each difference in words."""

    def __init__(self, rig: Rig) -> None:
        self._rig = rig
        self._seen = 0

    def begin(self) -> None:
        """Fill the cache with the present state. Operations after this call belong to the cell."""
        [row] = self._rig.rows(None, "SELECT coalesce(max(seq), 0) AS seq FROM operations")
        self._seen = row.seq
        self._read(self._rig.serving())
        self._rig.alarms()

    def problems(self, scene: Scene, before: float | None) -> Iterator[str]:
        """Differences from the required state, once all is quiet.

        Args:
            before: the segment's percentage before the cell; None if it did not exist or had never been rolled out.
        """
        state = scene.state()
        if state != scene.expected:
            yield f"the operation is {state or 'not there'}, not {scene.expected}"

        yield from self._answer(scene, state)
        yield from self._ledger()
        yield from self._target(scene, state, before)
        yield from self._answers_of_reads()
        yield from self._alarms(scene)
        yield from self._rig.check()
        yield from self._next_operation(scene)

    def _answer(self, scene: Scene, state: str) -> Iterator[str]:
        """An answer that reports the operation's end must be true."""
        answer = scene.the_call.answer if scene.the_call else ""
        if answer == "done":
            told = "DONE"
        elif answer.startswith(_UNKNOWN):
            return
        else:
            told = "ABORTED"

        if state != told:
            yield f"the caller was told {answer!r}, but it is {state}"

    def _ledger(self) -> Iterator[str]:
        """Each operation has one decision, the votes of all shards, and fences on all shards or none."""
        rows = self._rig.rows(
            None,
            "SELECT o.id, o.slug, o.state, "
            "(SELECT count(*) FROM votes v WHERE v.operation_id = o.id) AS votes, "
            "(SELECT count(*) FROM audit a WHERE a.operation_id = o.id) AS decisions, "
            "(SELECT array_agg(t.after ORDER BY t.n) FROM test_transitions t WHERE t.operation = o.id) AS path "
            "FROM operations o WHERE o.seq > :seen",
            seen=self._seen,
        )

        fences = [
            {row.operation_id for row in self._rig.rows(shard, "SELECT operation_id FROM applied_operations")}
            for shard in range(SHARDS)
        ]

        for row in rows:
            done = row.state == "DONE"
            if list(row.path) not in _PATHS:
                yield f"operation on {row.slug} went {' → '.join(row.path)}"
            if row.decisions != done:
                yield f"operation on {row.slug} is {row.state} with {row.decisions} decisions"
            if done and row.votes != SHARDS:
                yield f"operation on {row.slug} is done with {row.votes} votes"

            fenced = [row.id in on_shard for on_shard in fences]
            if fenced != [done] * SHARDS:
                yield f"operation on {row.slug} is {row.state}, its fences are {fenced}"

    def _target(self, scene: Scene, state: str, before: float | None) -> Iterator[str]:
        """The segment is exactly as the operation left it: in the catalog, on every shard, bit by bit."""
        done = state == "DONE"
        there = (scene.cell.kind is not Kind.CREATION) if not done else (scene.cell.kind is not Kind.DELETION)
        percent = scene.percent if done and scene.cell.kind is Kind.ROLLOUT else before
        threshold = round(percent * 1000) if there and percent is not None else None

        segments = self._rig.rows(
            None, "SELECT id, salt, state, rule_threshold FROM segments WHERE slug = :slug", slug=scene.slug
        )
        if [(row.state, row.rule_threshold) for row in segments] != ([(1, threshold)] if there else []):
            yield f"the catalog has {segments}, not a threshold of {threshold}"
            return

        for shard in range(SHARDS):
            copies = self._rig.rows(shard, "SELECT rule_threshold FROM segments WHERE slug = :slug", slug=scene.slug)
            if [row.rule_threshold for row in copies] != ([threshold] if there else []):
                yield f"shard {shard} has {copies}, not a threshold of {threshold}"

        if there:
            [row] = segments
            members = self._rig.installation.members(row.id)
            expected = {user for user in USERS if bucket(user, row.salt % 2**64) < (threshold or 0)}
            if members != expected:
                yield f"{len(members ^ expected)} users of {scene.slug} are not as the rule says"

    def _alarms(self, scene: Scene) -> Iterator[str]:
        """The expected alarm was raised, and no other."""
        wanted = {scene.alarm} - {""}
        raised = set(self._rig.alarms())
        if raised != wanted:
            yield f"alarms: {sorted(raised)}, not {sorted(wanted)}"

    def _answers_of_reads(self) -> Iterator[str]:
        """The answers of a front match the rules."""
        rules = self._rig.rows(None, "SELECT slug, salt, rule_threshold FROM segments WHERE rule_threshold IS NOT NULL")
        for user, slugs in self._read(self._rig.serving()).items():
            expected = {rule.slug for rule in rules if bucket(user, rule.salt % 2**64) < rule.rule_threshold}
            if slugs is None or set(slugs) != expected:
                yield f"user {user} is answered {slugs}, not {sorted(expected)}"

    def _read(self, client: FrontClient) -> dict[int, list[str] | None]:
        return dict(client.many_user_segments(READ))

    def _next_operation(self, scene: Scene) -> Iterator[str]:
        call = Call(self._rig.serving(), lambda client: client.roll_out(SECOND, scene.percent))
        scene.until(lambda: call.ended, "the next operation ends", 30)
        if call.answer != "done":
            yield f"the next operation: {call.answer}"
