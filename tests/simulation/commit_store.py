"""Ledger and shards in memory: the statements of ``segsvc.postgres``, each a step in which the world may change.

They stand behind the ports of ``segsvc.twophase_ports``; the protocol above them is the real one. Methods that a mutant
replaces are small on purpose.
"""

from __future__ import annotations

from collections.abc import Callable, Iterable, Mapping, Sequence
from dataclasses import dataclass, field
from datetime import UTC, datetime
from uuid import UUID

from segsvc.domain.errors import catalog_unavailable, shard_unavailable
from segsvc.domain.operation import (
    Failure,
    Gid,
    Operation,
    OperationKind,
    OperationPlan,
    OperationState,
    PreparedTransaction,
    ShardCounts,
)
from segsvc.twophase_ports import Finish, OpenOperation, ProgressHook, WorkFailed
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
    state: OperationState = S.QUEUED
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
    """What is durable in the catalog, and what the test knows of it beside."""

    rows: dict[UUID, Row] = field(default_factory=dict)
    rules: dict[int, int] = field(default_factory=dict)
    """Live segments: the threshold of their rule."""
    in_flight_index: Lock = field(default_factory=Lock)
    refused_at_commit: set[UUID] = field(default_factory=set)
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
        return Operation(row.id, row.seq, row.plan, row.state, EPOCH, None, None, None, None, None, votes, None)

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
                    expired=row.state is S.PREPARING and row.deadline < now,
                    quiet=row.dispatched < now - QUIET_S,
                    age_s=0.0,  # for people
                )
                for row in rows
                if row.state in (S.PREPARING, S.COMMITTED) or row.seq == oldest
            ]

        return self._server.ask("open operations", read)

    # -- transitions ------------------------------------------------------------------------------------------------

    def insert(self, operation_id: UUID, plan: OperationPlan) -> None:
        """Accept an operation. Raises CATALOG_UNAVAILABLE: whether it was accepted is unknown."""
        with self._server.transaction() as transaction:
            seq = len(self._catalog.rows) + 1
            transaction.write(lambda: self._catalog.rows.setdefault(operation_id, Row(operation_id, seq, plan)))
        self._reach("accepted-not-answered")

    def start_oldest(self) -> Operation | None:
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
        queued = self._server.ask(
            "oldest",
            lambda: min(
                (row for row in self._catalog.rows.values() if row.state is S.QUEUED),
                key=lambda row: row.seq,
                default=None,
            ),
        )
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
            queued.deadline, queued.dispatched = queued_deadline, now
            if len(self._catalog.in_flight()) > 1:
                raise Violation("two operations are in flight")

        transaction.write(started)
        return queued, True

    def _enter(self, transaction: Transaction) -> bool:
        """The unique index over what is in flight: waits for whoever is about to enter it, and fails if it is taken."""
        transaction.lock(self._catalog.in_flight_index, timeout_s=5)
        return not self._catalog.in_flight()

    def claim_dispatch(self, operation_id: UUID) -> bool:
        row = self._catalog.rows[operation_id]
        with self._server.transaction() as transaction:
            transaction.lock(row.lock, timeout_s=5)
            now = self._scheduler.now
            claimed = row.state is S.PREPARING and row.dispatched < now - QUIET_S
            if claimed:
                transaction.write(lambda: setattr(row, "dispatched", now))
        return claimed

    def vote(self, operation_id: UUID, counts: ShardCounts) -> bool:
        row = self._catalog.rows[operation_id]
        with self._server.transaction() as transaction:
            transaction.lock(row.lock, exclusive=False, timeout_s=5)
            if row.state is not S.PREPARING:
                return False
            transaction.write(lambda: row.votes.setdefault(counts.shard, counts))
            self._reach("vote-not-committed")
        return True

    def commit(self, operation_id: UUID) -> bool:
        row = self._catalog.rows[operation_id]
        with self._server.transaction() as transaction:
            transaction.lock(row.lock, timeout_s=5)
            if row.state is not S.PREPARING or len(row.votes) < self._shard_count:
                return False
            self._decide(transaction, row)
        return True

    def _decide(self, transaction: Transaction, row: Row) -> None:
        if row.id in self._catalog.refused_at_commit:
            raise WorkFailed(Failure("INTERNAL", "refused", {"why": "INTEGRITY"}))
        plan, rules = row.plan, self._catalog.rules

        def decided() -> None:
            row.become(S.COMMITTED)
            if plan.kind is OperationKind.DELETE:
                del rules[plan.segment_id]
            else:
                rules[plan.segment_id] = plan.rule.threshold if plan.rule else 0

        transaction.write(decided)
        self._reach("decision-not-committed")

    def abort(self, operation_id: UUID, failure: Failure, *, from_states: Sequence[OperationState]) -> bool:
        row = self._catalog.rows[operation_id]
        with self._server.transaction() as transaction:
            transaction.lock(row.lock, timeout_s=5)
            if row.state not in from_states:
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


@dataclass
class ShardData:
    """What is durable on one shard."""

    rules: dict[int, int] = field(default_factory=dict)
    versions: dict[int, int] = field(default_factory=dict)
    """By segment: seq of the operation that changed it last; never forgotten, for the readers' sake."""
    users: dict[int, set[int]] = field(default_factory=dict)
    """Users with the segments they are in."""
    fences: set[UUID] = field(default_factory=set)
    prepared: dict[str, tuple[Transaction, float]] = field(default_factory=dict)
    lock: Lock = field(default_factory=Lock)
    user_lock: Lock = field(default_factory=Lock)
    fence_keys: dict[UUID, Lock] = field(default_factory=dict)


def is_member(user: int, threshold: int) -> bool:
    """The bucket hash of this world."""
    return user * 7919 % 100 < threshold


class SimulatedShard:
    """Implements ``twophase_ports.Participant``; takes user events as well."""

    def __init__(
        self, scheduler: Scheduler, number: int, data: ShardData, catalog: Catalog, reach: Callable[..., None]
    ) -> None:
        self.shard = number
        self._scheduler = scheduler
        self._server = Server(scheduler, f"shard {number}", lambda: shard_unavailable(number))
        self._data = data
        self._catalog = catalog
        self._reach = reach

    # -- asking -----------------------------------------------------------------------------------------------------

    def has_fence(self, operation_id: UUID) -> bool:
        return self._server.ask("fence?", lambda: operation_id in self._data.fences)

    def prepared(self) -> Sequence[PreparedTransaction]:
        now = self._scheduler.now
        return self._server.ask(
            "what is prepared?",
            lambda: [PreparedTransaction(gid, now - since) for gid, (_, since) in self._data.prepared.items()],
        )

    def is_prepared(self, gid: Gid) -> bool:
        return self._server.ask("prepared?", lambda: str(gid) in self._data.prepared)

    def version(self, segment: int) -> int:
        """What a reader of memberships sees."""
        return self._server.ask("read", lambda: self._data.versions.get(segment, 0))

    # -- work -------------------------------------------------------------------------------------------------------

    def prepare(self, operation: Operation, gid: Gid, on_progress: ProgressHook) -> ShardCounts | None:
        data = self._data
        with self._server.transaction() as transaction:
            users = self._begin(transaction)
            self._reach("locked-not-prepared")
            if not self._fence(transaction, operation):
                transaction.end()
                return None
            if operation.id in self._catalog.refused_on_shards:
                raise WorkFailed(Failure("INTERNAL", "refused", {"why": "SHARD_REFUSED"}))
            counts = self._work(transaction, operation, users())
            self._reach("worked-not-prepared")
            if self._scheduler.chance(self._scheduler.rates.lost_request):
                transaction.end()  # the session has failed: the server rolls back, and says so without an error

            def prepare() -> str:
                if transaction.ended:
                    return "ROLLBACK"
                if str(gid) in data.prepared:
                    transaction.end()
                    raise shard_unavailable(self.shard)
                transaction.detached = True
                data.prepared[str(gid)] = (transaction, self._scheduler.now)
                return "PREPARE TRANSACTION"

            self._judge_tag(self._server.order("PREPARE", prepare, transaction))
        self._reach("prepare-answered")
        return counts

    def _begin(self, transaction: Transaction) -> Callable[[], Mapping[int, set[int]]]:
        """Take the shard's lock. Each later statement sees what is committed then."""
        transaction.lock(self._data.lock)
        return lambda: self._server.ask("users", lambda: dict(self._data.users))

    def _judge_tag(self, tag: str) -> None:
        if tag != "PREPARE TRANSACTION":
            raise shard_unavailable(self.shard)

    def _fence(self, transaction: Transaction, operation: Operation) -> bool:
        """Insert the fence: waits for a twin that has one not committed yet."""
        transaction.lock(self._data.fence_keys.setdefault(operation.id, Lock()))
        if operation.id in self._data.fences:
            return False

        def fenced() -> None:
            if self._catalog.rows[operation.id].state not in (S.COMMITTED, S.DONE):
                raise Violation(f"shard {self.shard} commits what is {self._catalog.rows[operation.id].state.name}")
            self._data.fences.add(operation.id)

        transaction.write(fenced)
        return True

    def _work(self, transaction: Transaction, operation: Operation, users: Mapping[int, set[int]]) -> ShardCounts:
        data, plan, seq = self._data, operation.plan, operation.seq
        segment = plan.segment_id
        threshold = 0 if plan.rule is None else plan.rule.threshold
        members = {user for user in users if is_member(user, threshold)}
        before = {user for user, segments in users.items() if segment in segments}

        def worked() -> None:
            if plan.kind is OperationKind.DELETE:
                data.rules.pop(segment, None)
            else:
                data.rules[segment] = threshold
            data.versions[segment] = seq
            for user in users:
                if user in data.users:
                    (data.users[user].add if user in members else data.users[user].discard)(segment)

        transaction.write(worked)
        added, removed = len(members - before), len(before - members)
        return ShardCounts(self.shard, len(users), added, removed, len(members))

    def count(self, operation: Operation) -> ShardCounts:
        users = self._server.ask("count", lambda: dict(self._data.users))
        return self._work(Transaction(self._server), operation, users)

    def commit_prepared(self, gid: Gid) -> Finish:
        def commit() -> Finish:
            if str(gid) not in self._data.prepared:
                return Finish.NOT_FOUND
            if self._scheduler.chance(0.02):
                return Finish.BUSY
            transaction, _ = self._data.prepared.pop(str(gid))
            transaction.apply()
            return Finish.DONE

        return self._server.order("COMMIT PREPARED", commit)

    def rollback_prepared(self, gid: Gid) -> Finish:
        def roll_back() -> Finish:
            if str(gid) not in self._data.prepared:
                return Finish.NOT_FOUND
            transaction, _ = self._data.prepared.pop(str(gid))
            transaction.end()
            return Finish.DONE

        return self._server.order("ROLLBACK PREPARED", roll_back)

    def redo(self, operation: Operation) -> None:
        with self._server.transaction() as transaction:
            users = self._begin(transaction)
            if not self._fence(transaction, operation):
                transaction.end()
                return
            self._work(transaction, operation, users())

    # -- user events ------------------------------------------------------------------------------------------------

    def add_user(self, user: int) -> None:
        """Apply a create-user event: the user gets what the rules of now say. Idempotent."""
        data = self._data
        with self._server.transaction() as transaction:
            rules = self._begin_event(transaction)
            transaction.lock(data.user_lock)
            if user in data.users:
                return
            segments = {segment for segment, threshold in rules().items() if is_member(user, threshold)}
            transaction.write(lambda: data.users.setdefault(user, segments))

    def _begin_event(self, transaction: Transaction) -> Callable[[], Mapping[int, int]]:
        """Share the shard's lock. Each later statement sees what is committed then."""
        transaction.lock(self._data.lock, exclusive=False)
        return lambda: self._server.ask("rules", lambda: dict(self._data.rules))
