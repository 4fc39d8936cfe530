"""The shard behind the cache in memory: users, operations that set segments, and what was true at which moment.

Its statements are steps. They stand for ``segsvc.postgres.shard``: ``memberships`` (loads), ``user_transaction``
(overrides), ``participant`` and ``patches`` (operations). Methods that a mutant replaces are small on purpose.
"""

from __future__ import annotations

import math
import random
import zlib
from collections.abc import Callable, Iterator, Sequence
from dataclasses import dataclass, field
from datetime import UTC, datetime
from enum import Enum
from typing import Final
from uuid import UUID

import numpy as np

from segsvc.cache.patches import CHUNK_SLOTS
from segsvc.domain import bits
from segsvc.domain.membership import NEVER_US, LoadedUser
from segsvc.domain.operation import Gid, Operation, OperationKind, OperationPlan, OperationState
from segsvc.domain.override import OverrideChanges, UserOverrides
from segsvc.domain.patch import Patch
from segsvc.domain.sharding import BLOCK_SLOTS
from segsvc.twophase.ports import Finish
from tests.simulation.database import Lock, Server

SHARD = 0
SLOTS: Final = {1: 3, 2: CHUNK_SLOTS + 5}
"""The users and their slots, which are in different chunks of a patch."""
USERS = tuple(SLOTS)
LATE_USER = 2
"""Created during the run, without a word to the cache."""


class Bulk(Enum):
    ROLLOUT = "rollout"
    DELETION = "deletion"
    IMPORT = "import"
    """Includes every user in the segment by an override, until ``BulkChange.ends_at``."""


@dataclass(frozen=True)
class BulkChange:
    """An operation. Its number is the epoch that it begins."""

    number: int
    segment: int
    kind: Bulk
    ends_at: float = math.inf

    @property
    def id(self) -> UUID:
        return UUID(int=self.number)


def draw_changes(draw: random.Random, count: int) -> list[BulkChange]:
    """Operations on a few segments. A segment that was deleted is followed by one with another id."""
    live, next_id = [1, 2], 3
    changes = []
    for number in range(1, count + 1):
        segment = draw.choice(live)
        kind = draw.choice((Bulk.ROLLOUT, Bulk.ROLLOUT, Bulk.ROLLOUT, Bulk.IMPORT, Bulk.DELETION))
        ends_at = draw.choice((0.8, 2.0, 3.5, 20.0)) if kind is Bulk.IMPORT else math.inf
        if kind is Bulk.DELETION:
            live[live.index(segment)] = next_id
            next_id += 1
        changes.append(BulkChange(number, segment, kind, ends_at))

    return changes


@dataclass
class Truth:
    """What is committed, and which part of it was acknowledged.

    A member's bit depends on the segment, its last rollout, the user and the user's version: a rollout draws it again,
    and a change of the user mostly turns it. So a list of bits of two moments is soon one that was never true.

    Attributes:
        planned: all operations of the run.
        epoch: how many of them are committed.
        committed_in: by user, for each of its versions the epoch in which it was committed.
    """

    seed: int
    planned: Sequence[BulkChange]
    epoch: int = 0
    committed_in: dict[int, list[int]] = field(default_factory=dict)
    acknowledged: dict[int, int] = field(default_factory=dict)
    acknowledged_operation: int = 0
    shards_committed_at: dict[int, float] = field(default_factory=dict)
    """By operation: when it was noted that it waits for old entries to end."""
    locks: dict[int, Lock] = field(default_factory=lambda: {user: Lock() for user in USERS})
    """Locks of the users' rows: events and overrides of one user run one after the other."""

    def version(self, user: int) -> int:
        """0: there is no such user."""
        return len(self.committed_in.get(user, ()))

    def change(self, user: int) -> None:
        """Create the user, or raise its version; the user is noted under the epoch that is committed."""
        self.committed_in.setdefault(user, []).append(self.epoch)

    def commit(self, number: int) -> None:
        """An operation takes effect, once."""
        if number == self.epoch + 1:
            self.epoch = number

    def changed_since(self, epoch: int) -> list[int]:
        """Users who were changed in this epoch or later. A creation is not noted: nobody caches an unknown user."""
        return [user for user, epochs in self.committed_in.items() if any(at >= epoch for at in epochs[1:])]

    # -- lists ------------------------------------------------------------------------------------------------------

    def segments(self, user: int, epoch: int, version: int, now: float) -> tuple[int, ...]:
        ids = dict.fromkeys(change.segment for change in self.planned[:epoch])
        return tuple(sorted(one for one in ids if self.is_member(one, user, epoch, version, now)))

    def is_member(self, segment: int, user: int, epoch: int, version: int, now: float) -> bool:
        mine = [change for change in self.planned[:epoch] if change.segment == segment]
        if any(change.kind is Bulk.DELETION for change in mine):
            return False
        if any(change.ends_at > now for change in self._imports(user, epoch, segment)):
            return True
        rollouts = [change.number for change in mine if change.kind is Bulk.ROLLOUT]
        drawn = zlib.crc32(f"{self.seed}/{segment}/{rollouts[-1:]}/{user}/{version // 2}".encode())
        return bool(rollouts) and bool((drawn ^ version) & 1)

    def valid_until(self, user: int, epoch: int, now: float) -> float:
        """When the first override of a user ends; infinite: none does."""
        deleted = {change.segment for change in self.planned[:epoch] if change.kind is Bulk.DELETION}
        ends = [one.ends_at for one in self._imports(user, epoch) if one.ends_at > now and one.segment not in deleted]
        return min(ends, default=math.inf)

    def _imports(self, user: int, epoch: int, segment: int | None = None) -> Iterator[BulkChange]:
        """Imports that include a user: those that came after the user."""
        created = self.committed_in[user][0]
        for change in self.planned[created:epoch]:
            if change.kind is Bulk.IMPORT and segment in (None, change.segment):
                yield change

    def was_true(
        self, user: int, segments: Sequence[int], version: int, promised: tuple[int, int], begin: float, end: float
    ) -> bool:
        """Whether a list was the whole truth of one moment of this version of the user.

        Args:
            promised: the operation and the version of which the list must be at least.
            begin: when the read began: overrides that had ended by then have ended.
        """
        operation, oldest = promised
        if not max(oldest, 1) <= version <= self.version(user):
            return False

        epochs = self.committed_in[user]
        first = max(operation, epochs[version - 1])
        last = epochs[version] if version < len(epochs) else self.epoch
        moments = {begin, *(change.ends_at for change in self.planned if begin < change.ends_at <= end)}
        return any(
            tuple(segments) == self.segments(user, epoch, version, now)
            for epoch in range(first, last + 1)
            for now in moments
        )


class Reads:
    """The shard, for loads. Implements ``services.cold_reads.UserReads``."""

    def __init__(self, server: Server, truth: Truth) -> None:
        self._server = server
        self.truth = truth

    def load(self, shard: int, user_ids: Sequence[int], *, timeout_s: float | None = None) -> Sequence[LoadedUser]:
        rows = self.select(user_ids)
        self._server.scheduler.dawdle("SELECT answered")
        return rows

    def select(self, user_ids: Sequence[int]) -> Sequence[LoadedUser]:
        """Bits, version, overrides and epoch of one moment."""
        return self.ask("SELECT", lambda: [self.row(user) for user in user_ids if self.truth.version(user)])

    def ask(self, what: str, read: Callable[[], list[LoadedUser]]) -> list[LoadedUser]:
        return self._server.ask(what, read)

    def row(self, user: int) -> LoadedUser:
        truth, now = self.truth, self._server.scheduler.now
        version, epoch = truth.version(user), truth.epoch
        until = truth.valid_until(user, epoch, now)
        return LoadedUser(
            user_id=user,
            slot=SLOTS[user],
            row_version=version,
            read_time_us=int(now * 1e6),
            valid_until_us=NEVER_US if math.isinf(until) else int(until * 1e6),
            segment_ids=truth.segments(user, epoch, version, now),
            epoch=epoch,
        )


class Overrides:
    """The shard, for overrides. Implements ``services.overrides.OverrideStore``."""

    shard_count = 1

    def __init__(self, server: Server, truth: Truth) -> None:
        self._server = server
        self._truth = truth

    def modify(
        self,
        user_id: int,
        changes: OverrideChanges,
        request: object,
        before_commit: Callable[[], None],
        *,
        timeout_s: float | None,
    ) -> UserOverrides | None:
        truth = self._truth

        with self._server.transaction() as transaction:
            transaction.lock(truth.locks[user_id])
            if not truth.version(user_id):
                transaction.end()

                return None
            transaction.write(lambda: truth.change(user_id))
            before_commit()
        return UserOverrides((), 0, ())

    def page(self, user_id: int, after: str, limit: int, *, timeout_s: float | None) -> None:
        """Not called here."""


class Shard:
    """The shard, for operations that are decided. Implements the part of ``twophase.ports.Participant`` that they
    need."""

    shard = SHARD

    def __init__(self, server: Server, truth: Truth) -> None:
        self.server = server
        self.truth = truth

    def commit_prepared(self, gid: Gid) -> Finish:
        self.server.order("COMMIT PREPARED", lambda: self.truth.commit(gid.operation_id.int))
        return Finish.DONE

    def read_patch(self, operation: Operation) -> Patch | None:
        """None: a later operation has begun another epoch."""
        change = self.truth.planned[operation.id.int - 1]
        patch = self.select(change)
        self.server.scheduler.dawdle("patch answered")
        return patch

    def select(self, change: BulkChange) -> Patch | None:
        """All of a patch, of one moment."""
        return self.server.ask("patch", lambda: self.patch(change, self.truth.changed_since(change.number - 1)))

    def patch(self, change: BulkChange, changed: Sequence[int]) -> Patch | None:
        truth, now = self.truth, self.server.scheduler.now
        if truth.epoch != change.number:
            return None

        there = {user: SLOTS[user] for user in truth.committed_in}
        slots = max(there.values()) + 1
        included = [
            slot
            for user, slot in there.items()
            if truth.is_member(change.segment, user, truth.epoch, truth.version(user), now)
        ]
        members = bits.at_slots(np.array(included, dtype=np.int64), 0, -(-slots // BLOCK_SLOTS))
        ends = math.isfinite(change.ends_at) and change.ends_at > now
        return Patch(
            epoch=change.number,
            segment_id=change.segment,
            slots=slots,
            members=None if change.kind is Bulk.DELETION else members,
            changed=np.array(sorted(SLOTS[user] for user in changed), dtype=np.uint32),
            valid_until_us=int(change.ends_at * 1e6) if ends else None,
        )


class Ledger:
    """The catalog, for operations that are decided. Implements the part of ``twophase.ports.Ledger`` that they need."""

    def __init__(self, server: Server, truth: Truth) -> None:
        self._server = server
        self._truth = truth

    def get(self, operation_id: UUID) -> Operation:
        done = self._server.ask("state", lambda: self._truth.acknowledged_operation >= operation_id.int)
        change = self._truth.planned[operation_id.int - 1]
        kind = OperationKind.DELETE if change.kind is Bulk.DELETION else OperationKind.ROLL_OUT
        return Operation(
            id=operation_id,
            seq=change.number,
            plan=OperationPlan(kind, f"segment-{change.segment}", change.segment, UUID(int=change.segment), 0),
            state=OperationState.DONE if done else OperationState.COMMITTED,
            create_time=datetime.fromtimestamp(0, UTC),
            start_time=None,
            deadline=None,
            commit_time=None,
            end_time=None,
            failure=None,
            votes=(),
            commit_seq=change.number,
        )

    def all_shards_committed(self, operation_id: UUID) -> float:
        now = self._server.scheduler.now
        noted = self._truth.shards_committed_at
        since = self._server.order("note", lambda: noted.setdefault(operation_id.int, now))
        return self._server.scheduler.now - since

    def finish(self, operation_id: UUID) -> bool:
        def done() -> None:
            self._truth.acknowledged_operation = max(self._truth.acknowledged_operation, operation_id.int)

        self._server.order("DONE", done)
        return True

    def start_next(self) -> None:
        """The world starts them."""
