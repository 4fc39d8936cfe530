"""The ledger in memory: the statements of ``catalog.ledger``; each is a step in which the world may change.

It implements ``segsvc.twophase.ports.Ledger``; the protocol above it is the real one. Methods that a mutant replaces
are small on purpose.
"""

from __future__ import annotations

from collections.abc import Callable, Iterable, Mapping, Sequence
from dataclasses import dataclass, field
from datetime import UTC, datetime
from uuid import UUID

from segsvc.domain.errors import catalog_unavailable
from segsvc.domain.operation import (
    Failure,
    Operation,
    OperationKind,
    OperationPlan,
    OperationState,
    ShardCounts,
)
from segsvc.twophase.ports import Answer, OpenOperation, WorkFailed
from tests.simulation.database import Lock, Server, Transaction
from tests.simulation.scheduler import Scheduler, Violation

EPOCH = datetime(2030, 1, 1, tzinfo=UTC)
DEADLINE_S = 4.0
QUIET_S = 0.5
S = OperationState


_ALLOWED = {
    (S.QUEUED, S.PREPARING), (S.QUEUED, S.ABORTED), (S.PREPARING, S.COMMITTED), (S.PREPARING, S.ABORTED),
    (S.COMMITTED, S.DONE),
}  # fmt: skip


@dataclass
class Row:
    """An operation in the ledger. Its state changes only along the arrows of the protocol."""

    id: UUID
    seq: int
    plan: OperationPlan
    accepted: float
    state: OperationState = S.QUEUED
    started: float | None = None
    votes: dict[int, ShardCounts] = field(default_factory=dict)
    deadline: float = 0.0
    dispatched: float = 0.0
    lock: Lock = field(default_factory=Lock)

    def become(self, state: OperationState) -> None:
        if (self.state, state) not in _ALLOWED:
            raise Violation(f"{self.plan.kind.name} was {self.state.name} and becomes {state.name}")
        self.state = state


@dataclass
class Catalog:
    """The durable data of the catalog, and the test's own notes about them."""

    rows: dict[UUID, Row] = field(default_factory=dict)
    rules: dict[int, int] = field(default_factory=dict)
    """Threshold of the rule, by live segment."""
    in_flight_index: Lock = field(default_factory=Lock)
    refused_at_commit: dict[UUID, int] = field(default_factory=dict)
    """Number of decisions of an operation that meet an integrity error; a later decision does not."""
    refused: set[UUID] = field(default_factory=set)
    decided_after_refusal: set[UUID] = field(default_factory=set)
    refused_on_shards: set[UUID] = field(default_factory=set)

    def in_flight(self) -> list[Row]:
        return [row for row in self.rows.values() if row.state in (S.PREPARING, S.COMMITTED)]


class SimulatedLedger:
    """Implements ``twophase_ports.Ledger``."""

    def __init__(self, scheduler: Scheduler, catalog: Catalog, reach: Callable[..., None], shard_count: int) -> None:
        self._scheduler = scheduler
        self._server = Server(scheduler, "catalog", catalog_unavailable)
        self._catalog = catalog
        self._reach = reach
        self._shard_count = shard_count

    # -- reading ----------------------------------------------------------------------------------------------------

    def _view(self, row: Row) -> Operation:
        votes = tuple(row.votes[shard] for shard in sorted(row.votes))
        late = row.state is S.PREPARING and not self._in_time(row)
        return Operation(row.id, row.seq, row.plan, row.state, EPOCH, None, None, None, None, None, votes, None, late)

    def _in_time(self, row: Row) -> bool:
        """Whether the deadline has not passed by the catalog's clock, in the statement that asks."""
        return self._scheduler.now < row.deadline

    def get(self, operation_id: UUID) -> Operation | None:
        def read() -> Operation | None:
            row = self._catalog.rows.get(operation_id)
            return None if row is None else self._view(row)

        return self._server.ask("get", read)

    def states(self, operation_ids: Iterable[UUID]) -> Mapping[UUID, OperationState]:
        ids = list(operation_ids)
        rows = self._catalog.rows
        return self._server.ask("states", lambda: {one: rows[one].state for one in ids if one in rows})

    def open_operations(self) -> Sequence[OpenOperation]:
        def read() -> list[OpenOperation]:
            now = self._scheduler.now
            rows = sorted(self._catalog.rows.values(), key=lambda row: row.seq)
            oldest = next((row.seq for row in rows if row.state is S.QUEUED), None)
            return [
                OpenOperation(
                    self._view(row),
                    quiet=row.dispatched < now - QUIET_S,
                    age_s=0.0,  # for people
                )
                for row in rows
                if row.state in (S.PREPARING, S.COMMITTED) or row.seq == oldest
            ]

        return self._server.ask("open operations", read)

    def late(self) -> Sequence[Operation]:
        def read() -> list[Operation]:
            return [view for view in map(self._view, self._catalog.rows.values()) if view.late]

        return self._server.ask("late?", read)

    # -- transitions ------------------------------------------------------------------------------------------------

    def insert(self, operation_id: UUID, plan: OperationPlan) -> None:
        """Accept an operation. Raises CATALOG_UNAVAILABLE: whether it was accepted is unknown."""
        with self._server.transaction() as transaction:
            seq = len(self._catalog.rows) + 1
            row = Row(operation_id, seq, plan, self._scheduler.now)
            transaction.write(lambda: self._catalog.rows.setdefault(operation_id, row))
        self._reach("accepted-not-answered")

    def start_next(self) -> Operation | None:
        while True:
            with self._server.transaction() as transaction:
                row, valid = self._start(transaction)
                if row is None:
                    transaction.end()
                    return None
            if valid:
                self._reach("started")
                return self.get(row.id)

    def _start(self, transaction: Transaction) -> tuple[Row | None, bool]:
        if self._server.ask("in flight?", self._catalog.in_flight):
            return None, False

        queued = self._server.ask("whose turn?", self._whose_turn)
        if queued is None:
            return None, False

        transaction.lock(queued.lock, timeout_s=5)
        if queued.state is not S.QUEUED:
            return None, False

        exists = queued.plan.segment_id in self._catalog.rules
        valid = exists != (queued.plan.kind is OperationKind.CREATE)
        if not valid:
            transaction.write(lambda: queued.become(S.ABORTED))
            return queued, False
        if not self._enter(transaction):
            return None, False

        now = self._scheduler.now
        queued_deadline = now + DEADLINE_S

        def started() -> None:
            queued.become(S.PREPARING)
            queued.deadline, queued.dispatched, queued.started = queued_deadline, now, now
            if any(
                row.state is S.QUEUED and row.plan.slug == queued.plan.slug and row.seq < queued.seq
                for row in self._catalog.rows.values()
            ):
                raise Violation(f"an older operation of {queued.plan.slug} still waits")
            if len(self._catalog.in_flight()) > 1:
                raise Violation("two operations are in flight")

        transaction.write(started)
        return queued, True

    def _whose_turn(self) -> Row | None:
        """The oldest queued operation of the segment that was served least recently."""
        heads: dict[str, Row] = {}
        served: dict[str, float] = {}
        for row in sorted(self._catalog.rows.values(), key=lambda row: row.seq):
            if row.state is S.QUEUED:
                heads.setdefault(row.plan.slug, row)
            elif row.started is not None:
                served[row.plan.slug] = row.started
        return min(heads.values(), key=lambda row: (served.get(row.plan.slug, row.accepted), row.seq), default=None)

    def _enter(self, transaction: Transaction) -> bool:
        """Enter the unique index of operations in flight: wait for a transaction that enters it; fail if taken."""
        transaction.lock(self._catalog.in_flight_index, timeout_s=5)
        return not self._catalog.in_flight()

    def claim_dispatch(self, operation_id: UUID) -> bool:
        row = self._catalog.rows[operation_id]
        with self._server.transaction() as transaction:
            transaction.lock(row.lock, timeout_s=5)
            now = self._scheduler.now
            claimed = row.state is S.PREPARING and self._may_dispatch(row) and row.dispatched < now - QUIET_S
            if claimed:
                if not self._in_time(row):
                    raise Violation("a chord is sent too late")
                transaction.write(lambda: setattr(row, "dispatched", now))
        return claimed

    def _may_dispatch(self, row: Row) -> bool:
        """Check the deadline, in the statement that claims the dispatch."""
        return self._in_time(row)

    def vote(self, operation_id: UUID, counts: ShardCounts) -> Answer:
        row = self._catalog.rows[operation_id]
        with self._server.transaction() as transaction:
            transaction.lock(row.lock, exclusive=False, timeout_s=5)
            if row.state is not S.PREPARING:
                return Answer.REFUSED

            self._server.ask("vote", lambda: None)
            if counts.shard not in row.votes:
                if not self._may_vote(row):
                    return Answer.LATE
                if not self._in_time(row):
                    raise Violation("a vote is cast too late")

            transaction.write(lambda: row.votes.setdefault(counts.shard, counts))
            self._reach("vote-not-committed")
        return Answer.TAKEN

    def _may_vote(self, row: Row) -> bool:
        """Check the deadline, in the statement that inserts the vote."""
        return self._in_time(row)

    def commit(self, operation_id: UUID) -> Answer:
        row = self._catalog.rows[operation_id]
        with self._server.transaction() as transaction:
            transaction.lock(row.lock, timeout_s=5)
            if row.state is not S.PREPARING or len(row.votes) < self._shard_count:
                return Answer.REFUSED

            self._scheduler.dawdle("change the segment")
            if not self._decide_in_time(transaction, row):
                transaction.end()
                return Answer.LATE

            self._reach("decision-not-committed")
        return Answer.TAKEN

    def _decide_in_time(self, transaction: Transaction, row: Row) -> bool:
        """Decide unless the deadline has passed, as the decision's last statement."""
        if not self._in_time(row):
            return False
        self._decide(transaction, row)
        return True

    def _decide(self, transaction: Transaction, row: Row) -> None:
        refusals = self._catalog.refused_at_commit
        if refusals.get(row.id):
            refusals[row.id] -= 1
            self._catalog.refused.add(row.id)
            transaction.end()  # at the error, not at the client's ROLLBACK: the row is free before the client knows
            self._scheduler.pause("integrity error")
            raise WorkFailed(Failure("INTERNAL", "refused", {"why": "INTEGRITY"}))

        if not self._in_time(row):
            raise Violation(f"{row.plan.kind.name} is decided {self._scheduler.now - row.deadline:.1f} s too late")

        plan, rules = row.plan, self._catalog.rules

        def decided() -> None:
            row.become(S.COMMITTED)
            if row.id in self._catalog.refused:
                self._catalog.decided_after_refusal.add(row.id)
            if plan.kind is OperationKind.DELETE:
                del rules[plan.segment_id]
            else:
                rules[plan.segment_id] = plan.rule.threshold if plan.rule else 0

        transaction.write(decided)

    def abort(
        self, operation_id: UUID, failure: Failure, *, from_states: Sequence[OperationState], if_late: bool = False
    ) -> bool:
        row = self._catalog.rows[operation_id]
        with self._server.transaction() as transaction:
            transaction.lock(row.lock, timeout_s=5)
            if row.state not in from_states or (if_late and self._in_time(row)):
                return False
            transaction.write(lambda: row.become(S.ABORTED))
        return True

    def all_shards_committed(self, operation_id: UUID) -> float:
        return self._server.ask("note", lambda: 0.0)

    def finish(self, operation_id: UUID) -> bool:
        row = self._catalog.rows[operation_id]
        with self._server.transaction() as transaction:
            transaction.lock(row.lock, timeout_s=5)
            if row.state is not S.COMMITTED:
                return False
            transaction.write(lambda: row.become(S.DONE))
        return True
