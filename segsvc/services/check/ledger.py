"""Compares the catalog with the shards: segments, fences, prepared transactions.

The catalog is read before the shards' snapshots and again after them. If a shard has a fence, its operation must be
decided in the later view; if an operation was done in the earlier view, every shard must have its fence. Data that an
operation in flight may be changing must be in the old state or in the new one, and in no other.
"""

from __future__ import annotations

from collections.abc import Iterable, Mapping, Sequence
from datetime import datetime, timedelta
from typing import Final
from uuid import UUID

from segsvc.domain.operation import Gid, OperationKind, OperationState, PreparedTransaction
from segsvc.domain.segment import Rule, Segment, SegmentState, ShardSegment
from segsvc.domain.stored import CatalogView, LedgerEntry
from segsvc.services.check.report import Kind, Report

IN_DOUBT_MAX_S: Final = 30.0
"""How long a prepared transaction may stay once recovery can end it: recovery runs every 2 s."""


class LedgerCheck:
    """Compares the shards with two views of the catalog, from before and after the shards were read."""

    def __init__(
        self, before: CatalogView, after: CatalogView, *, cluster: str, fence_ttl_s: float, report: Report
    ) -> None:
        self._before = before
        self._after = after
        self._cluster = cluster
        self._report = report
        self._states = {entry.id: entry for entry in after.operations}

        oldest_fence = before.time - timedelta(seconds=fence_ttl_s)
        self._must_be_fenced = [
            entry
            for entry in before.operations
            # An older fence may have been dropped by now, or not yet: it is not required, and not an error either.
            if entry.state is OperationState.DONE and entry.start_time is not None and entry.start_time > oldest_fence
        ]

        self._touching = self._operations_meanwhile()
        self._rules_before = self._rules_before_them()

    def _operations_meanwhile(self) -> Mapping[int, Sequence[LedgerEntry]]:
        """Operations, by segment, whose work a shard's snapshot may have or not have."""
        touching: dict[int, list[LedgerEntry]] = {}
        in_flight_before = {entry.id for entry in self._before.operations if entry.state.in_flight}
        for entry in self._after.operations:
            decided_meanwhile = entry.commit_time is not None and entry.commit_time >= self._before.time
            if entry.id in in_flight_before or entry.state.in_flight or decided_meanwhile:
                touching.setdefault(entry.plan.segment_id, []).append(entry)
        return touching

    def _rules_before_them(self) -> Mapping[int, Rule]:
        """The rules that were in force before those operations, by segment; absent: the segment had no rule.

        The catalog has the new rule from the commit point on, while a shard may still have the old rule.
        """
        rules: dict[int, Rule] = {}
        for entry in sorted(self._after.operations, key=lambda entry: entry.commit_time or self._after.time):
            earlier = entry.state is OperationState.DONE and entry not in self._touching.get(entry.plan.segment_id, ())
            if earlier and entry.plan.rule is not None:
                rules[entry.plan.segment_id] = entry.plan.rule
        return rules

    # -- the catalog by itself --------------------------------------------------------------------------------------

    def check_catalog(self) -> None:
        """Report segment states that need an operation in flight, and have none."""
        for segment in self._after.segments:
            kinds = {entry.plan.kind for entry in self._touching.get(segment.id, ())}
            where = f"segment {segment.slug} ({segment.id})"
            if segment.state is SegmentState.RESERVED and OperationKind.CREATE not in kinds:
                self._report.add(Kind.SEGMENT, None, where, "is reserved", "no creation of it is in flight")
            if segment.state is SegmentState.DELETING and OperationKind.DELETE not in kinds:
                self._report.add(Kind.SEGMENT, None, where, "is being deleted", "no deletion of it is in flight")

    # -- a shard ----------------------------------------------------------------------------------------------------

    def check_segments(self, shard: int, segments: Iterable[ShardSegment]) -> None:
        """The shard's copies of the segments against the catalog."""
        stored = {segment.id: segment for segment in segments}
        rows: dict[int, list[Segment]] = {}
        for view in (self._before, self._after):
            for segment in view.segments:
                rows.setdefault(segment.id, []).append(segment)

        for segment_id in sorted(stored.keys() | rows.keys()):
            operations = self._touching.get(segment_id, ())
            # Without an operation in between, both views have the same row: the later one is enough.
            known = rows.get(segment_id, [])
            self._check_segment(
                shard, segment_id, stored.get(segment_id), known if operations else known[-1:], operations
            )

    def _check_segment(
        self,
        shard: int,
        segment_id: int,
        stored: ShardSegment | None,
        rows: Sequence[Segment],
        operations: Sequence[LedgerEntry],
    ) -> None:
        kinds = {entry.plan.kind for entry in operations}
        names = {(row.slug, row.salt) for row in rows} | {(entry.plan.slug, entry.plan.salt) for entry in operations}
        rules: set[Rule | None] = {row.rule for row in rows} | {
            entry.plan.rule for entry in operations if entry.plan.kind is not OperationKind.DELETE
        }
        if operations:
            rules.add(self._rules_before.get(segment_id))

        if stored is None:
            absent = not rows or rows[-1].state is SegmentState.RESERVED
            if not absent and not kinds & {OperationKind.CREATE, OperationKind.DELETE}:
                where = f"segment {rows[-1].slug} ({segment_id})"
                self._report.add(Kind.SEGMENT, shard, where, "is not there", "the catalog has it")
            return

        where = f"segment {stored.slug} ({segment_id})"
        if not rows and not operations:
            self._report.add(Kind.SEGMENT, shard, where, "is there", "the catalog does not have it")
            return

        if (stored.slug, stored.salt) not in names:
            slug, salt = min(names)
            found = f"slug is {stored.slug}, salt {stored.salt}"
            self._report.add(Kind.SEGMENT, shard, where, found, f"the catalog has slug {slug}, salt {salt}")
        if stored.rule not in rules:
            expected = " or ".join(sorted(_rule_text(rule) for rule in rules))
            self._report.add(
                Kind.SEGMENT, shard, where, f"rule is {_rule_text(stored.rule)}", f"the catalog has {expected}"
            )

    def check_fences(self, shard: int, fences: frozenset[UUID]) -> None:
        """A fence is on every shard if its operation is COMMITTED or DONE, else on none."""
        for operation_id in sorted(fences):
            entry = self._states.get(operation_id)
            if entry is None:
                self._report.add(
                    Kind.FENCE, shard, f"operation {operation_id}", "its fence is there", "the ledger does not know it"
                )
            elif entry.state not in (OperationState.COMMITTED, OperationState.DONE):
                self._report.add(
                    Kind.FENCE, shard, entry.title, "its fence is there", "only a committed operation has one"
                )

        for entry in self._must_be_fenced:
            if entry.id not in fences:
                self._report.add(Kind.FENCE, shard, entry.title, "its fence is missing", "every shard has it once done")

    def check_epoch(self, shard: int, epoch: int, newest_fence: int | None) -> None:
        """The shard is in the epoch that its newest fence has begun. If all fences of epochs are so old that they were
        forgotten, there is nothing to compare."""
        if newest_fence is not None and newest_fence != epoch:
            self._report.add(Kind.EPOCH, shard, "epoch", f"is {epoch}", f"the newest fence has begun {newest_fence}")

    def check_prepared(self, shard: int, prepared: Iterable[PreparedTransaction]) -> None:
        """Report prepared transactions that recovery should have ended, or never will."""
        for transaction in prepared:
            if not transaction.gid.startswith("segsvc:"):
                continue

            where = f"prepared transaction {transaction.gid}"
            found = f"it is prepared for {transaction.age_s:.0f} s"
            gid = Gid.parse(transaction.gid)
            if gid is None or gid.cluster != self._cluster or gid.shard != shard:
                self._report.add(Kind.PREPARED, shard, where, found, "it is not this shard's; no process will end it")
                continue

            entry = self._states.get(gid.operation_id)
            if entry is None:
                expected = "the ledger does not know its operation; no process will end it"
                self._report.add(Kind.PREPARED, shard, where, found, expected)
                continue

            if overdue_s(transaction, entry, self._after.time) > IN_DOUBT_MAX_S:
                expected = f"its operation is {entry.state.name}: recovery ends it within {IN_DOUBT_MAX_S:.0f} s"
                self._report.add(Kind.PREPARED, shard, where, found, expected)


def overdue_s(transaction: PreparedTransaction, entry: LedgerEntry, now: datetime) -> float:
    """How long ago it became possible to end what is prepared for this operation.

    Args:
        now: the time by the catalog's clock.
    """
    if entry.state is OperationState.PREPARING:
        since = entry.deadline
    else:
        since = entry.commit_time if entry.state is OperationState.COMMITTED else entry.end_time
    return min(transaction.age_s, (now - since).total_seconds()) if since else 0.0


def _rule_text(rule: Rule | None) -> str:
    if rule is None:
        return "none"
    condition = f" if {rule.condition}" if rule.condition else ""
    return f"{rule.percent:g} %{condition}, {rule.policy.name}"
