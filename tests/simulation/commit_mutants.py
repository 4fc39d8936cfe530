"""Mutants of the commit protocol: each breaks one rule, as a programmer might easily do."""

from __future__ import annotations

from collections.abc import Callable, Iterable, Mapping, Sequence
from typing import Any
from uuid import UUID

from segsvc.domain.operation import Failure, Gid, Operation, OperationState, ShardCounts, ShardProgress
from segsvc.twophase.ports import Answer, Finish, Participant
from segsvc.twophase.protocol import Coordinator
from tests.simulation.commit_ledger import Row, SimulatedLedger
from tests.simulation.commit_shard import SimulatedShard
from tests.simulation.commit_world import Parts
from tests.simulation.database import Transaction


class UnknownGidRolledBack(Coordinator):
    def _settle(self, participant: Participant, gid: Gid, state: OperationState | None) -> None:
        if state is None:
            participant.rollback_prepared(gid)
        else:
            super()._settle(participant, gid, state)


class NotFoundMeansCommitted(Coordinator):
    def _commit_shard(self, operation: Operation, participant: Participant) -> None:
        if participant.commit_prepared(self.gid(operation.id, participant.shard)) is Finish.BUSY:
            super()._commit_shard(operation, participant)


class RollbackBeforeTheAbortIsRecorded(Coordinator):
    def abort(
        self,
        operation_id: UUID,
        failure: Failure,
        *,
        from_states: Sequence[OperationState] = (OperationState.QUEUED, OperationState.PREPARING),
        if_late: bool = False,
    ) -> bool:
        self._fan_out(lambda participant: self._rollback_shard(operation_id, participant), self.participants)
        return super().abort(operation_id, failure, from_states=from_states, if_late=if_late)


class RollbackAfterARefusedVote(Coordinator):
    """It rolls back without reading the ledger again."""

    def prepare_shard(self, operation_id: UUID, shard: int, on_progress: Callable[[ShardProgress], None]) -> None:
        ledger = self._ledger

        class Hasty:
            def __getattr__(self, name: str) -> Any:
                return getattr(ledger, name)

            def vote(_, operation_id: UUID, counts: ShardCounts) -> Answer:  # noqa: N805
                answer: Answer = ledger.vote(operation_id, counts)
                if answer is Answer.REFUSED:
                    self.participants[shard].rollback_prepared(self.gid(operation_id, shard))
                return answer

        hasty = Coordinator(
            cluster=self._cluster,
            ledger=Hasty(),  # type: ignore[arg-type]
            participants=self.participants,
            invalidation=self._invalidation,
            dispatcher=self._dispatcher,
            fan_out=self._fan_out,
            observer=self._observer,
            crash_points=self._crash,
        )
        hasty.prepare_shard(operation_id, shard, on_progress)


class VoteWithoutTheCommandTag(SimulatedShard):
    def _judge_tag(self, tag: str) -> None:
        """Accept every answer of the server that raised no error."""


class OneInFlightByNotExists(SimulatedLedger):
    def _enter(self, transaction: Transaction) -> bool:
        return True  # the check was made a statement ago


class DecisionWithoutCompareAndSet(SimulatedLedger):
    def commit(self, operation_id: UUID) -> Answer:
        operation = self.get(operation_id)
        if operation is None or operation.state is not OperationState.PREPARING:
            return Answer.REFUSED
        if len(operation.votes) < self._shard_count:
            return Answer.REFUSED
        with self._server.transaction() as transaction:
            self._decide(transaction, self._catalog.rows[operation_id])
        return Answer.TAKEN


class DeadlineReadBeforeTheDecision(SimulatedLedger):
    """It is read with the operation, in an earlier statement: a process that then sleeps or waits decides too late."""

    def _decide_in_time(self, transaction: Transaction, row: Row) -> bool:
        in_time = self._in_time(row)
        self._scheduler.pause("decide")
        if in_time:
            self._decide(transaction, row)
        return in_time


class DecisionWithoutTheDeadline(SimulatedLedger):
    """Only recovery checks the deadline: a process that wakes with all votes in decides, however late."""

    def _decide_in_time(self, transaction: Transaction, row: Row) -> bool:
        self._decide(transaction, row)
        return True


class VoteWithoutTheDeadline(SimulatedLedger):
    def _may_vote(self, row: Row) -> bool:
        return True


class DispatchWithoutTheDeadline(SimulatedLedger):
    def _may_dispatch(self, row: Row) -> bool:
        return True


class AbortWithoutCompareAndSet(SimulatedLedger):
    """An aborting process read the state a statement ago, or lost a decision that another process has made since."""

    def abort(
        self, operation_id: UUID, failure: Failure, *, from_states: Sequence[OperationState], if_late: bool = False
    ) -> bool:
        row = self._catalog.rows[operation_id]
        with self._server.transaction() as transaction:
            transaction.lock(row.lock, timeout_s=5)
            transaction.write(lambda: row.become(OperationState.ABORTED))
        return True


class LedgerReadBeforeWhatIsPrepared(Coordinator):
    def recover(self) -> None:
        ledger = self._ledger
        known = {one.operation.id: one.operation.state for one in ledger.open_operations()}

        class Early:
            def __getattr__(self, name: str) -> Any:
                return getattr(ledger, name)

            def states(self, operation_ids: Iterable[UUID]) -> Mapping[UUID, OperationState]:
                late = ledger.states(operation_ids)
                return {one: known.get(one, late[one] if late[one].final else None) for one in late}  # type: ignore[misc]

        self._ledger = Early()  # type: ignore[assignment]
        try:
            super().recover()
        finally:
            self._ledger = ledger


class AbortedVisitedOnce(Coordinator):
    """Only the abort itself visits the shards; recovery treats the operation as done."""

    def _settle(self, participant: Participant, gid: Gid, state: OperationState | None) -> None:
        if state is OperationState.ABORTED:
            return
        super()._settle(participant, gid, state)


class LockUnderRepeatableRead(SimulatedShard):
    """The snapshot is as old as the wait for the lock."""

    def _begin(self, transaction: Transaction) -> Callable[[], Mapping[int, set[int]]]:
        users = {user: set(segments) for user, segments in self._data.users.items()}
        transaction.lock(self._data.lock)
        return lambda: users

    def _begin_event(self, transaction: Transaction) -> Callable[[], Mapping[int, int]]:
        rules = dict(self._data.rules)
        transaction.lock(self._data.lock, exclusive=False)
        return lambda: rules


class GenerationsDroppedBeforeTheCommits(Coordinator):
    def _complete(self, operation: Operation) -> None:
        self._publish(operation)
        self._fan_out(lambda participant: self._commit_shard(operation, participant), self.participants)
        self._ledger.finish(operation.id)
        self.start_next()


MUTANTS = {
    "unknown gid rolled back": Parts(coordinator=UnknownGidRolledBack),
    "not found means committed": Parts(coordinator=NotFoundMeansCommitted),
    "rollback before the abort is recorded": Parts(coordinator=RollbackBeforeTheAbortIsRecorded),
    "rollback after a refused vote without reading again": Parts(coordinator=RollbackAfterARefusedVote),
    "a vote without the command tag": Parts(shard=VoteWithoutTheCommandTag),
    "one in flight by NOT EXISTS": Parts(ledger=OneInFlightByNotExists),
    "a decision that is no compare-and-set": Parts(ledger=DecisionWithoutCompareAndSet),
    "a decision without the deadline": Parts(ledger=DecisionWithoutTheDeadline),
    "the deadline read before the decision": Parts(ledger=DeadlineReadBeforeTheDecision),
    "a vote without the deadline": Parts(ledger=VoteWithoutTheDeadline),
    "a dispatch without the deadline": Parts(ledger=DispatchWithoutTheDeadline),
    "an abort that is no compare-and-set": Parts(ledger=AbortWithoutCompareAndSet),
    "the ledger read before what is prepared": Parts(coordinator=LedgerReadBeforeWhatIsPrepared),
    "ABORTED visited once": Parts(coordinator=AbortedVisitedOnce),
    "the lock under REPEATABLE READ": Parts(shard=LockUnderRepeatableRead),
    "generations dropped before the commits": Parts(coordinator=GenerationsDroppedBeforeTheCommits),
}
