"""What the commit protocol needs: a ledger, participants, and a few helpers. ``twophase.protocol`` is the protocol.

The interfaces are small on purpose, so that a simulation and PostgreSQL can both implement them.
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
from segsvc.domain.patch import Patch

ProgressHook = Callable[[ShardProgress], None]
"""Called with how far a shard is: a hint for people. May be called often; must not raise."""


class Finish(Enum):
    """How COMMIT PREPARED or ROLLBACK PREPARED ended."""

    DONE = "done"
    NOT_FOUND = "not found"
    """There is no such gid *now*. This does not say whether it was committed: only the fence does."""
    BUSY = "busy"
    """Another process is ending it, or its PREPARE has not finished: try again."""


class Answer(Enum):
    """The ledger's answer to a vote or a decision."""

    TAKEN = "taken"
    """It is durable. A vote that a twin has cast before counts as taken too."""
    REFUSED = "refused"
    """The operation is not PREPARING, or a decision lacks a vote: read it again."""
    LATE = "late"
    """It is PREPARING and past its deadline: it can only be aborted."""


class WorkFailed(Exception):
    """The work on a shard cannot succeed, now or later: the operation must be aborted. ``failure`` says why."""

    def __init__(self, failure: Failure) -> None:
        super().__init__(failure.message)
        self.failure = failure


UNKNOWN: Final = "UNKNOWN"
UNREAD: Final = "UNREAD"
IN_DOUBT_STATES: Final = (*(state.name for state in OperationState), UNKNOWN, UNREAD)
"""What a prepared transaction is in doubt under: the state of its operation; UNKNOWN: the ledger has no such operation;
UNREAD: the ledger cannot be reached."""


@dataclass(frozen=True, slots=True)
class OpenOperation:
    """An operation that is not final, with its times by the catalog's clock.

    Attributes:
        quiet: no dispatch, vote or progress for a while: no process seems to work on it.
        age_s: for how long it has been in its state.
    """

    operation: Operation
    quiet: bool
    age_s: float


class Ledger(Protocol):
    """The operations in the catalog. Every method is one transaction; all raise CATALOG_UNAVAILABLE in an outage,
    after which the outcome is unknown and must be read again."""

    def get(self, operation_id: UUID) -> Operation | None:
        """The operation as it is now, votes included; None: no operation has this id."""

    def states(self, operation_ids: Iterable[UUID]) -> Mapping[UUID, OperationState]:
        """States of the operations that exist."""

    def open_operations(self) -> Sequence[OpenOperation]:
        """All operations in flight, and the oldest QUEUED one, which may start next."""

    def late(self) -> Sequence[Operation]:
        """All operations that are PREPARING and past their deadline."""

    def start_next(self) -> Operation | None:
        """Move the QUEUED operation whose turn it is to PREPARING, or to ABORTED if it is not valid any more (and go on
        with the next). The segment that was served least recently is next, with its oldest operation. None: the queue
        is empty, or another operation is in flight."""

    def claim_dispatch(self, operation_id: UUID) -> bool:
        """Whether the caller must send a fresh chord: the operation is PREPARING, quiet and not late. Starts its quiet
        time from zero."""

    def vote(self, operation_id: UUID, counts: ShardCounts) -> Answer:
        """Record a shard's vote while PREPARING and not late."""

    def commit(self, operation_id: UUID) -> Answer:
        """The decision: PREPARING with all votes and not late → COMMITTED, in one transaction with the segment's
        change. Raises WorkFailed if the change can never be made."""

    def abort(
        self, operation_id: UUID, failure: Failure, *, from_states: Sequence[OperationState], if_late: bool = False
    ) -> bool:
        """Decide against the operation: one of ``from_states`` → ABORTED. False: it was in none of these states; or,
        with ``if_late``, its deadline has not passed."""

    def all_shards_committed(self, operation_id: UUID) -> float:
        """Note that every shard of a COMMITTED operation has committed, unless it is noted already. Seconds since it
        was noted first, by the catalog's clock; 0 if the operation is not COMMITTED any more."""

    def finish(self, operation_id: UUID) -> bool:
        """COMMITTED → DONE. False: another process did it."""


class Participant(Protocol):
    """One shard. All methods raise SHARD_UNAVAILABLE in an outage, after which the outcome is unknown."""

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
            segsvc.domain.errors.ServiceError: transient; the outcome is unknown, ask again.
            LockTimeout: the lock was not acquired in time; nothing was done.
            WorkFailed: it can never succeed.
        """

    def count(self, operation: Operation) -> ShardCounts:
        """What ``prepare`` counted, counted again without changing anything. Valid while its gid is prepared: that
        transaction's lock keeps out every change of the shard's users."""

    def commit_prepared(self, gid: Gid) -> Finish: ...

    def rollback_prepared(self, gid: Gid) -> Finish: ...

    def redo(self, operation: Operation) -> None:
        """The work and the fence in one ordinary transaction; does nothing if the fence is there."""

    def read_patch(self, operation: Operation) -> Patch | None:
        """What a committed operation changed in the lists of this shard's users, as of one snapshot. None: the shard
        does not know its epoch any more."""


class Published(Enum):
    """How the publication of a patch ended. Each end is as good as the others for readers: none of them sees a list of
    before the operation."""

    APPENDED = "appended"
    KNOWN = "known"
    """A twin has published the operation, or a later one was published."""
    NONE = "none"
    """The shard's cache has no generation, hence no hit that could be outdated."""
    DROPPED = "dropped"
    """The operation before it was not published, so the generation was dropped."""


class Invalidation(Protocol):
    """The cache, as far as a bulk change needs it. All methods raise CACHE_UNAVAILABLE: whether they took effect is
    unknown, so old entries may still be hits."""

    @property
    def entries_gone_after_s(self) -> float:
        """How long after a change an entry that was read before it can still be there."""

    def write_patch(self, shard: int, patch: Patch) -> bytes:
        """Write a patch where readers do not look yet. Returns the token of this copy."""

    def append_patch(self, shard: int, patch: Patch, token: bytes) -> Published:
        """Make readers lay this copy of the patch over older entries."""

    def drop_generations(self, shards: Sequence[int]) -> None:
        """Make every entry of these shards a miss. Always allowed, and always right."""


class Dispatcher(Protocol):
    """Celery, as far as the protocol needs it. A message may be lost."""

    def dispatch(self, operation: Operation, shards: Sequence[int]) -> None:
        """Send a chord: one header task for each of these shards, and the finalizer. Raises BROKER_UNAVAILABLE."""


class FanOut(Protocol):
    """Runs a visit for each participant, so that a shard out of reach delays only its own visit."""

    def __call__(self, visit: Callable[[Participant], None], participants: Sequence[Participant], /) -> object:
        """Return when all visits have ended. Raises the first error, after all have ended."""


class Observer(Protocol):
    """Receives what people should know. Decides nothing, and must not raise."""

    def raise_alarm(self, what: str, **where: object) -> None:
        """Report what recovery must not decide by itself, or what should never happen."""

    def in_doubt(self, shard: int, oldest_s: Mapping[str, float]) -> None:
        """Report what recovery found prepared on a shard: for each of ``IN_DOUBT_STATES``, the age of the oldest
        prepared transaction; 0: there is none. Not called for a shard that could not be reached."""

    def not_ended(self, oldest_s: Mapping[OperationState, float]) -> None:
        """Report, for each state that is not final, the age of the oldest operation in it: how long it has been in this
        state; 0: there is none."""
