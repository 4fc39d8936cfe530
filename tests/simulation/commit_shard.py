"""Shards in memory: the statements of ``segsvc.postgres.shard.participant``, as steps in which the world may change.

They implement ``segsvc.twophase.ports.Participant``; the protocol above them is the real one. Methods that a mutant
replaces are small on purpose.
"""

from __future__ import annotations

from collections.abc import Callable, Mapping, Sequence
from dataclasses import dataclass, field
from uuid import UUID

import numpy as np

from segsvc.domain.errors import shard_unavailable
from segsvc.domain.operation import (
    Failure,
    Gid,
    Operation,
    OperationKind,
    OperationState,
    PreparedTransaction,
    ShardCounts,
)
from segsvc.domain.patch import Patch
from segsvc.twophase.ports import Finish, ProgressHook, WorkFailed
from tests.simulation.commit_ledger import Catalog
from tests.simulation.database import Lock, Server, Transaction
from tests.simulation.scheduler import Scheduler, Violation

S = OperationState


@dataclass
class ShardData:
    """The durable data of one shard."""

    rules: dict[int, int] = field(default_factory=dict)
    versions: dict[int, int] = field(default_factory=dict)
    """By segment: seq of the operation that changed it last; kept for ever, because the readers need it."""
    users: dict[int, set[int]] = field(default_factory=dict)
    """Segments by user."""
    fences: set[UUID] = field(default_factory=set)
    prepared: dict[str, tuple[Transaction, float]] = field(default_factory=dict)
    lock: Lock = field(default_factory=Lock)
    user_lock: Lock = field(default_factory=Lock)
    fence_keys: dict[UUID, Lock] = field(default_factory=dict)


def is_member(user: int, threshold: int) -> bool:
    """The bucket hash of this world."""
    return user * 7919 % 100 < threshold


class SimulatedShard:
    """Implements ``twophase_ports.Participant``, and takes user events as well."""

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
        """The version that a reader of memberships sees."""
        return self._server.ask("read", lambda: self._data.versions.get(segment, 0))

    # -- work -------------------------------------------------------------------------------------------------------

    def prepare(self, operation: Operation, gid: Gid, on_progress: ProgressHook) -> ShardCounts | None:
        data = self._data
        self._reach("evaluated-not-locked")
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
                transaction.end()  # the session has failed: the server rolls back, and reports it without an error

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
        """Insert the fence. Waits for a twin whose fence is not committed yet."""
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

    def read_patch(self, operation: Operation) -> Patch | None:
        """Here a segment's version takes the place of its bits."""
        segment = operation.plan.segment_id
        version = self._server.ask("patch", lambda: self._data.versions.get(segment, 0))
        return Patch(version, segment, 0, None, np.empty(0, dtype=np.uint32))

    # -- user events ------------------------------------------------------------------------------------------------

    def add_user(self, user: int) -> None:
        """Apply a create-user event: the user gets the segments by the present rules. Idempotent."""
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
