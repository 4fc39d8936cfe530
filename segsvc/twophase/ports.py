"""What the commit protocol needs of the world: a ledger, participants, and a few hands. ``twophase`` is the protocol.

Small on purpose, so that a simulation and PostgreSQL can both stand behind it.
"""

from __future__ import annotations

from collections.abc import Callable, Iterable, Mapping, Sequence
from dataclasses import dataclass
from enum import Enum
from typing import Final, Protocol
from uuid import UUID

from segsvc.domain.operation import (
    Failure,
    Gid,
    Operation,
    OperationState,
    PreparedTransaction,
    ShardCounts,
    ShardProgress,
)

ProgressHook = Callable[[ShardProgress], None]
"""Told how far a shard is: a hint for people. May be called often; must not raise."""


class Finish(Enum):
    """How COMMIT PREPARED or ROLLBACK PREPARED ended."""

    DONE = "done"
    NOT_FOUND = "not found"
    """No such gid *now*. Says nothing about what became of it: only the fence does."""
    BUSY = "busy"
    """Somebody else is at it, or its PREPARE is not through: try again."""


class Answer(Enum):
    """What the ledger says to a vote or a decision."""

    TAKEN = "taken"
    """It is durable: also a vote that a twin has cast before."""
    REFUSED = "refused"
    """The operation is not PREPARING, or a decision lacks a vote: read it again."""
    LATE = "late"
    """It is PREPARING and past its deadline: nothing can become of it but its abort."""


class WorkFailed(Exception):
    """The work on a shard cannot succeed, now or later: the operation must be aborted. ``failure`` says why."""

    def __init__(self, failure: Failure) -> None:
        super().__init__(failure.message)
        self.failure = failure


UNKNOWN: Final = "UNKNOWN"
UNREAD: Final = "UNREAD"
STANDINGS: Final = (*(state.name for state in OperationState), UNKNOWN, UNREAD)
"""How a prepared transaction stands: the state of its operation; or there is none; or the ledger cannot be asked."""


@dataclass(frozen=True, slots=True)
class OpenOperation:
    """An operation that is not final, with what the catalog's clock says of it.

    Attributes:
        quiet: no dispatch, vote or progress for a while: nobody seems to work on it.
        age_s: for how long it has been in its state.
    """

    operation: Operation
    quiet: bool
    age_s: float


class Ledger(Protocol):
    """The operations in the catalog. Every method is one transaction; all raise CATALOG_UNAVAILABLE in an outage,
    after which the outcome is unknown and must be read again."""

    def get(self, operation_id: UUID) -> Operation | None:
        """The operation as it is now, votes included; None: there is none of this id."""

    def states(self, operation_ids: Iterable[UUID]) -> Mapping[UUID, OperationState]:
        """States of those that exist."""

    def open_operations(self) -> Sequence[OpenOperation]:
        """All that are PREPARING or COMMITTED, and of those that are QUEUED the oldest, which may start next."""

    def late(self) -> Sequence[Operation]:
        """All that are PREPARING and past their deadline."""

    def start_next(self) -> Operation | None:
        """Move the QUEUED operation whose turn it is to PREPARING, or to ABORTED if it is not valid any more (and go on
        with the next). The turn is that of the segment that was served least recently; within it, of the oldest. None:
        the queue is empty, or another operation is in flight."""

    def claim_dispatch(self, operation_id: UUID) -> bool:
        """Whether the caller is the one to send a fresh chord: PREPARING, quiet, and not late; resets the quiet
        time."""

    def vote(self, operation_id: UUID, counts: ShardCounts) -> Answer:
        """Record a shard's vote while PREPARING and not late."""

    def commit(self, operation_id: UUID) -> Answer:
        """The decision: PREPARING with all votes and not late → COMMITTED, in one transaction with the segment's
        change. Raises WorkFailed if the change can never be made."""

    def abort(
        self, operation_id: UUID, failure: Failure, *, from_states: Sequence[OperationState], if_late: bool = False
    ) -> bool:
        """Decide against: one of ``from_states`` → ABORTED. False: it was in none of them; or, with ``if_late``, its
        deadline has not passed."""

    def all_shards_committed(self, operation_id: UUID) -> float:
        """Note that every shard of a COMMITTED operation has committed, unless it is noted already. Seconds since it
        was noted first, by the catalog's clock; 0 if the operation is not COMMITTED any more."""

    def finish(self, operation_id: UUID) -> bool:
        """COMMITTED → DONE. False: somebody else did it."""


class Participant(Protocol):
    """One shard. All raise SHARD_UNAVAILABLE in an outage, after which the outcome is unknown."""

    @property
    def shard(self) -> int: ...

    def has_fence(self, operation_id: UUID) -> bool:
        """Whether the operation's work is committed here."""

    def prepared(self) -> Sequence[PreparedTransaction]:
        """All prepared transactions of this shard's database."""

    def is_prepared(self, gid: Gid) -> bool: ...

    def prepare(self, operation: Operation, gid: Gid, on_progress: ProgressHook) -> ShardCounts | None:
        """Lock, fence, work, PREPARE TRANSACTION. None: a twin's fence was there, nothing was prepared.

        Raises:
            segsvc.domain.errors.ServiceError: transient; nothing is known, ask again.
            LockTimeout: the lock was not to be had in time; nothing was done.
            WorkFailed: it can never succeed.
        """

    def count(self, operation: Operation) -> ShardCounts:
        """What ``prepare`` counted, counted again without changing anything: valid while its gid is prepared, whose
        lock keeps every user change of the shard out."""

    def commit_prepared(self, gid: Gid) -> Finish: ...

    def rollback_prepared(self, gid: Gid) -> Finish: ...

    def redo(self, operation: Operation) -> None:
        """The work and the fence in one ordinary transaction; does nothing if the fence is there."""


class Invalidation(Protocol):
    """The cache, as far as a bulk change needs it."""

    @property
    def entries_gone_after_s(self) -> float:
        """How long after a change an entry that was read before it can still be there."""

    def drop_generations(self, shards: Sequence[int]) -> None:
        """Make every entry of these shards a miss. Raises CACHE_UNAVAILABLE: some may still be hits."""


class Dispatcher(Protocol):
    """Celery, as far as the protocol needs it. Delivery is a hope, not a promise."""

    def dispatch(self, operation: Operation, shards: Sequence[int]) -> None:
        """Send a chord: one header task for each of these shards, and the finalizer. Raises BROKER_UNAVAILABLE."""


class FanOut(Protocol):
    """Runs a visit for each participant, so that one out of reach delays only itself."""

    def __call__(self, visit: Callable[[Participant], None], participants: Sequence[Participant], /) -> object:
        """Return when all visits have ended. Raises the first error, after all have ended."""


class Observer(Protocol):
    """Told what people should know. Decides nothing, and must not raise."""

    def raise_alarm(self, what: str, **where: object) -> None:
        """Something that recovery must not decide by itself, or that should never happen."""

    def in_doubt(self, shard: int, oldest_s: Mapping[str, float]) -> None:
        """What recovery found prepared on a shard: for each of ``STANDINGS``, the age of the oldest; 0: there is none.

        Not told of a shard that could not be asked."""

    def not_ended(self, oldest_s: Mapping[OperationState, float]) -> None:
        """For each state that is not final, for how long the operation that has been in it longest has been; 0: there
        is none."""
