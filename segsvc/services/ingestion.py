"""User events become users, bits and counters: one batch, one shard, one transaction.

A batch may be repeated, late, out of order or half of another: its sender sends it again until it gets a report, and
every event either moves its user forward or has no effect (``domain.user_fold``). A report promises: every event of the
batch that it does not list as dead is in PostgreSQL, or had no effect, and no later read finds an older state in the
cache.
"""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from collections.abc import Set as AbstractSet
from contextlib import AbstractContextManager
from dataclasses import dataclass
from typing import Protocol

import numpy as np

from segsvc.domain.events import CreateUser, Unstorable, UserEvent
from segsvc.domain.sharding import shard_of
from segsvc.domain.user_fold import Phase, StoredUser, UserFold, UserRow, fold
from segsvc.failpoints import CrashPoints
from segsvc.log import get_logger
from segsvc.services.user_bits import Int64s, ShardBits, clear_users, evaluate_again, place_users

log = get_logger(__name__)

BATCH_S = 6.0
"""Bound of each statement of a batch, and of the time until its last statement begins. The sender waits 15 s, so it
learns that the batch was too much. A batch of one event has the session's bound instead."""


class UserTransaction(ShardBits, Protocol):
    """One transaction of a shard that changes users. Data the database refuses raises ``Unstorable``."""

    def lock(self) -> int:
        """Wait for operations on the shard and for other batches; keep both out until the transaction ends.

        Returns:
            The slot that the next new user gets.
        """

    def find(self, user_ids: Sequence[int]) -> Mapping[int, StoredUser]:
        """Those of these users that exist, their rows locked in the order of their ids. ``user_ids`` is sorted."""

    def find_tombstones(self, user_ids: Sequence[int]) -> AbstractSet[int]:
        """Those of these users that were deleted."""

    def known(self, user_ids: Int64s) -> Int64s:
        """Those of these users that exist or were deleted, in any order; their rows are not locked. ``user_ids`` is
        sorted."""

    def insert(self, user_ids: Int64s, first_slot: int, versions: Int64s | int, attributes: Sequence[str]) -> None:
        """Write new users, one after the other in the slots from ``first_slot`` on.

        Args:
            versions: one for each user, or one for all.
            attributes: JSON text, one for each user.
        """

    def update(self, users: Sequence[UserRow]) -> None:
        """Replace attributes and version, and raise row_version."""

    def remove(self, user_ids: Sequence[int]) -> None:
        """Delete users and their overrides."""

    def insert_tombstones(self, versions: Mapping[int, int]) -> None:
        """Write tombstones: user id → version of the newest event."""

    def advance(self, next_slot: int, users_added: int) -> None:
        """Store the next free slot, and add to the number of users (negative: fewer)."""


class UserStore(Protocol):
    """The shards, as far as changes of users need them."""

    @property
    def shard_count(self) -> int: ...

    def transaction(self, shard: int, *, timeout_s: float | None) -> AbstractContextManager[UserTransaction]:
        """Open a transaction; the end of the block commits, an exception rolls back.

        Args:
            timeout_s: bound of each statement; and no condition is evaluated once this much time has passed. None: the
                session's bound of a statement.

        Raises:
            Unstorable: the database refused the data.
            LockTimeout: the shard's lock was not acquired in time; nothing was done.
            ServiceError: SHARD_UNAVAILABLE or DEADLINE_EXCEEDED (whether a commit took effect is then unknown),
                OVERLOADED.
        """


class CacheInvalidation(Protocol):
    """The cache, as far as a change of users must reach it."""

    def drop_entries(self, shard: int, user_ids: Sequence[int]) -> None:
        """Drop the cache's entries of these users, and make fills fail that began before.

        Raises:
            ServiceError: CACHE_UNAVAILABLE: some of the entries may still be there.
        """


class OtherShards(ValueError):
    """The sender of a batch and this process do not count the same number of shards; the text shows where."""


@dataclass(frozen=True, slots=True)
class BatchReport:
    """How a batch ended.

    Attributes:
        applied: events that changed a user.
        ignored: events without an effect: duplicates, and those overtaken by newer ones.
        dead: (index in the batch, reason) of events that the database will always refuse.
    """

    applied: int
    ignored: int
    dead: tuple[tuple[int, str], ...] = ()


class Ingestion:
    """Applies batches of user events."""

    def __init__(self, users: UserStore, cache: CacheInvalidation, crash_points: CrashPoints) -> None:
        self._users = users
        self._cache = cache
        self._crash = crash_points

    def apply_batch(self, shard: int, events: Sequence[UserEvent]) -> BatchReport:
        """Apply events, all of one shard.

        An event that the database refuses is found by halving the batch, so that no other event fails with it.

        Raises:
            LockTimeout, ServiceError: the batch could not be applied now. Part of it may have been applied; send the
                whole batch again or, after DEADLINE_EXCEEDED, in smaller batches.
            OtherShards: an event belongs to another shard, as this process counts them; nothing was applied.
        """
        shard_count = self._users.shard_count
        for event in events:
            if shard_of(event.user_id, shard_count) != shard:
                raise OtherShards(f"an event of user {event.user_id} was sent to shard {shard} of {shard_count}")

        applied = 0
        dead: list[tuple[int, str]] = []
        stale: set[int] = set()
        parts = [range(len(events))] if events else []

        while parts:
            part = parts.pop()
            try:
                effects, concerned = self._apply(shard, [events[index] for index in part])
            except Unstorable as refusal:
                if len(part) == 1:
                    dead.append((part[0], f"the database refused the event (SQLSTATE {refusal.code})"))
                else:
                    middle = len(part) // 2
                    parts += [part[middle:], part[:middle]]  # the first half comes first: it is popped from the end
                continue
            applied += effects
            stale |= concerned

        self._crash.reach("events-committed-not-reported", shard=shard)
        if stale:
            # After COMMIT, before the report. If it fails, or this process dies, there is no report and the batch
            # comes again: its events then have no effect, and the entries are dropped again. New users are never among
            # these, so creations go on while the cache is down.
            self._cache.drop_entries(shard, sorted(stale))

        dead.sort()
        return BatchReport(applied, len(events) - applied - len(dead), tuple(dead))

    def _apply(self, shard: int, events: Sequence[UserEvent]) -> tuple[int, AbstractSet[int]]:
        """Apply events in one transaction: how many had an effect, and the users whose entries may be stale now."""
        with self._users.transaction(shard, timeout_s=BATCH_S if len(events) > 1 else None) as tx:
            next_slot = tx.lock()
            if all(type(event) is CreateUser for event in events):
                return _create(tx, next_slot, events), frozenset()
            return _fold(tx, next_slot, events)


def _create(tx: UserTransaction, next_slot: int, events: Sequence[UserEvent]) -> int:
    """Apply a batch of creations only, as nearly all batches are: the same result as ``_fold``, computed by columns.

    For a user who does not exist, the first creation counts; for a user who exists or was deleted, none counts. Rows of
    existing users are read without a lock: to create or delete a user takes the row of shard_state, which this
    transaction holds. The cache never holds an entry of a user who did not exist.

    Returns:
        How many creations had an effect.
    """
    user_ids, first = np.unique(np.fromiter((event.user_id for event in events), np.int64), return_index=True)
    known = tx.known(user_ids)
    if known.size:
        new = np.isin(user_ids, known, invert=True)
        user_ids, first = user_ids[new], first[new]
    if user_ids.size:
        attributes = [event.attributes for event in events if isinstance(event, CreateUser)]
        tx.insert(user_ids, next_slot, 0, [attributes[index] for index in first.tolist()])
        place_users(tx, next_slot, user_ids)
        tx.advance(next_slot + user_ids.size, user_ids.size)
    return user_ids.size


def _fold(tx: UserTransaction, next_slot: int, events: Sequence[UserEvent]) -> tuple[int, AbstractSet[int]]:
    """Apply events of any kinds, user by user."""
    users = _load(tx, sorted({event.user_id for event in events}))
    effects = fold(users, events)

    created: list[UserRow] = []
    changed: list[UserRow] = []
    removed: list[tuple[int, UserFold]] = []
    tombstones: dict[int, int] = {}
    # Ascending ids throughout: rows are written in the order in which they were locked.
    for user_id, user in users.items():
        if user.is_new:
            created.append(_row(user_id, user, next_slot + len(created)))
            continue
        if user.is_changed:
            changed.append(_row(user_id, user, user.slot))
        elif user.is_removed:
            removed.append((user_id, user))
        if user.needs_tombstone:
            tombstones[user_id] = user.version

    if created:
        user_ids = np.array([user.user_id for user in created], dtype=np.int64)
        versions = np.array([user.version for user in created], dtype=np.int64)
        tx.insert(user_ids, next_slot, versions, [user.attributes for user in created])
        place_users(tx, next_slot, user_ids)

    if changed:
        tx.update(changed)
        evaluate_again(
            tx,
            np.array([user.slot for user in changed], dtype=np.int64),
            np.array([user.user_id for user in changed], dtype=np.int64),
        )

    if removed:
        clear_users(tx, np.array([user.slot for _, user in removed], dtype=np.int64))
        tx.remove([user_id for user_id, _ in removed])
    if tombstones:
        tx.insert_tombstones(tombstones)
    if created or removed:
        tx.advance(next_slot + len(created), len(created) - len(removed))

    return effects, {user_id for user_id, user in users.items() if user.may_be_cached_stale}


def _load(tx: UserTransaction, user_ids: Sequence[int]) -> dict[int, UserFold]:
    """The users as the shard holds them now; ``user_ids`` ascending, and so is the result."""
    stored = tx.find(user_ids)
    deleted = tx.find_tombstones(user_ids)

    users: dict[int, UserFold] = {}
    for user_id in user_ids:
        if user_id in stored:
            found = stored[user_id]
            users[user_id] = UserFold(Phase.CREATED, found.slot, found.version, Phase.CREATED)
        elif user_id in deleted:
            users[user_id] = UserFold(Phase.DELETED, phase=Phase.DELETED)
        else:
            users[user_id] = UserFold()
    return users


def _row(user_id: int, user: UserFold, slot: int | None) -> UserRow:
    if slot is None or user.attributes is None:
        raise AssertionError("a user to write has a slot and attributes")
    return UserRow(user_id, slot, user.version, user.attributes)
