"""Compares the cache's answers with the shards.

An entry may be newer than the snapshot it is compared with, and for a moment older than a change that is committed
and not yet acknowledged. So a difference is only suspected at first, and then checked again: read the entry, then
the shard in a new snapshot, then the entry once more. An entry that was in use before and after that fresh read and
differs from it was stale at that moment; if it stays so, no change in progress explains it.
"""

from __future__ import annotations

import time
from collections.abc import Callable, Sequence
from contextlib import AbstractContextManager
from dataclasses import dataclass
from typing import Final, Protocol

import numpy as np

from segsvc.domain import bits
from segsvc.domain.membership import EPOCH, FIRST_SEGMENT, SLOT, Entry
from segsvc.domain.sharding import BLOCK_SLOTS
from segsvc.domain.stored import Int64s, OverrideColumns
from segsvc.services.check.blocks import Chunk, ShardSnapshot, load_chunk
from segsvc.services.check.patches import PatchLookup
from segsvc.services.check.report import Difference, Kind, Report

SETTLE_S: Final = 5.0
"""How long a difference must stay before it is reported: many times as long as a change takes from its commit to its
acknowledgement."""
_POLL_S: Final = 0.2
_LOOKUP_USERS_MAX: Final = 1024


class EntryLookup(Protocol):
    """The cache as the hot path reads it."""

    def lookup(self, user_ids: Sequence[int]) -> Sequence[Entry | None]:
        """What the hot path would answer with now, in the order of the users; None: a miss."""


Lists = dict[int, tuple[int, ...]]
"""User -> ids of the segments the user is in, in the order of their slugs."""


def effective_lists(chunk: Chunk, block: int) -> Lists:
    """Every user of one block of a chunk with the segments that an answer must list."""
    member = bits.unpack(np.ascontiguousarray(chunk.packed[:, block]))
    _apply_overrides(member, chunk, block)

    user_ids = chunk.user_ids[block]
    there = np.flatnonzero(user_ids)
    # By user, then by segment: row by row of the transposed matrix.
    rows, columns = np.nonzero(member.T[there])
    ids = np.array([segment.id for segment in chunk.segments], dtype=np.int64)[columns].tolist()
    ends = np.cumsum(np.bincount(rows, minlength=there.size)).tolist()
    starts = [0, *ends[:-1]]
    return {
        user_id: tuple(ids[start:end])
        for user_id, start, end in zip(user_ids[there].tolist(), starts, ends, strict=True)
    }


def _apply_overrides(member: bits.Flags, chunk: Chunk, block: int) -> None:
    overrides: OverrideColumns = chunk.overrides
    if not overrides.slots.size:
        return

    index_of = {segment.id: index for index, segment in enumerate(chunk.segments)}
    start = (chunk.first + block) * BLOCK_SLOTS
    here = np.flatnonzero((overrides.slots >= start) & (overrides.slots < start + BLOCK_SLOTS))
    for position in here.tolist():
        index = index_of.get(int(overrides.segment_ids[position]))
        if index is not None:
            member[index, int(overrides.slots[position]) - start] = bool(overrides.included[position])


class CacheCheck:
    """The comparison of one shard's entries.

    Args:
        fresh: opens a new snapshot of the shard.
        changing: ids of the segments that a COMMITTED operation is changing now: entries may show the old or the new
            state.
        slugs: by segment id; the order in which ``reader`` lists segments. The slugs of all segments that are compared
            are put in here before the reader is asked.
        patches: names the patch that makes an entry wrong; None: the entry is named.
    """

    def __init__(
        self,
        reader: EntryLookup,
        shard: int,
        report: Report,
        *,
        fresh: Callable[[], AbstractContextManager[ShardSnapshot]],
        changing: Callable[[], frozenset[int]],
        slugs: dict[int, str],
        settle_s: float = SETTLE_S,
        patches: PatchLookup | None = None,
    ) -> None:
        self._patches = patches
        self._reader = reader
        self._shard = shard
        self._report = report
        self._fresh = fresh
        self._changing = changing
        self._slugs = slugs
        self._settle_s = settle_s
        self._suspects: dict[int, int] = {}

    def compare(self, chunk: Chunk, epoch: int) -> None:
        """Compare the entries of a chunk's users; those that differ become suspects.

        Args:
            epoch: the shard's, of the same snapshot.
        """
        self._slugs.update((segment.id, segment.slug) for segment in chunk.segments)
        for block in range(chunk.count):
            expected = effective_lists(chunk, block)
            slots = slots_of_users(chunk, block)
            for user_id, entry in self._entries(list(expected)).items():
                self._report.entries += 1
                right = entry[FIRST_SEGMENT:] == expected[user_id] and entry[SLOT] == slots[user_id]
                if not right or entry[EPOCH] > epoch:
                    self._suspects[user_id] = chunk.first + block

    def compare_deleted(self, user_ids: Int64s) -> None:
        """Deleted users must not be answered from the cache. Those that are become suspects; a later lookup decides."""
        ids = user_ids.tolist()
        for first in range(0, len(ids), _LOOKUP_USERS_MAX):
            for user_id in self._entries(ids[first : first + _LOOKUP_USERS_MAX]):
                self._suspects[user_id] = -1

    def settle(self) -> None:
        """Check the suspects again until they are gone or have stayed for long enough; report those that stayed."""
        until = time.monotonic() + self._settle_s
        stale: dict[int, _Stale] = {}
        while self._suspects:
            stale = self._check_again()
            self._suspects = {user_id: block for user_id, block in self._suspects.items() if user_id in stale}
            if time.monotonic() >= until:
                break
            time.sleep(_POLL_S)

        self._report.add_all(
            Kind.CACHE,
            len(self._suspects),
            (self._difference(user_id, stale[user_id]) for user_id in sorted(self._suspects)),
        )
        self._suspects = {}

    def _check_again(self) -> dict[int, _Stale]:
        """Entries in use around a fresh read that differ from it."""
        before = self._entries(list(self._suspects))

        fresh: Lists = {}
        slots: dict[int, int] = {}
        with self._fresh() as snapshot:
            epoch, _ = snapshot.epochs()
            segments = sorted(snapshot.segments(), key=lambda segment: segment.slug)
            self._slugs.update((segment.id, segment.slug) for segment in segments)
            for block in sorted({self._suspects[user_id] for user_id in before} - {-1}):
                chunk, _ = load_chunk(snapshot, segments, block, 1)
                fresh |= effective_lists(chunk, 0)
                slots |= slots_of_users(chunk, 0)

        # In this order: an operation that is no longer in flight here changed the cache before it ended, and the second
        # read of the entries sees that.
        changing = self._changing()
        after = self._entries(list(before))

        found = {
            user_id: _Stale(entry, fresh.get(user_id), slots.get(user_id), epoch)
            for user_id, entry in after.items()
            if entry == before[user_id]
        }
        return {user_id: stale for user_id, stale in found.items() if stale.differs(changing)}

    def _difference(self, user_id: int, stale: _Stale) -> Difference:
        where = f"cache entry of user {user_id}"
        if stale.expected is None or stale.slot is None:
            found, expected = f"it lists segments {_listed(stale.listed)}", "the shard says there is no such user"
        elif stale.entry[EPOCH] > stale.epoch:
            found, expected = f"its epoch is {stale.entry[EPOCH]}", f"the shard is in epoch {stale.epoch}"
        elif stale.entry[SLOT] != stale.slot:
            found, expected = f"its slot is {stale.entry[SLOT]}", f"the shard says {stale.slot}"
        else:
            named = None if self._patches is None else self._named(user_id, stale.listed, stale.expected, stale.slot)
            if named is not None:
                return named
            found, expected = (
                f"it lists segments {_listed(stale.listed)}",
                f"the shard says {_listed(stale.expected)}",
            )
        return Difference(Kind.CACHE, self._shard, where, found, expected)

    def _named(self, user_id: int, listed: tuple[int, ...], expected: tuple[int, ...], slot: int) -> Difference | None:
        """The patch that makes a reader's answer wrong, or the entry's epoch that keeps one away; None: neither."""
        assert self._patches is not None
        (stored,) = self._patches.stored(self._shard, [user_id])
        if stored is None:
            return None
        for segment_id in sorted(set(listed) ^ set(expected)):
            of_segment = [patch for patch in self._patches.patches(self._shard) if patch.segment_id == segment_id]
            if not of_segment:
                continue
            patch, member = of_segment[-1], segment_id in expected
            state = self._patches.slot(self._shard, patch, slot)
            if state is None:
                continue
            if patch.epoch <= stored[EPOCH]:
                if state.member == member:
                    found = f"its epoch is {stored[EPOCH]}, so the patch of epoch {patch.epoch} is not laid over it"
                    where = f"cache entry of user {user_id}"
                    return Difference(Kind.CACHE, self._shard, where, found, "it lists what was before that patch")
            elif state.member != member:
                where = f"patch of epoch {patch.epoch}, segment {segment_id}, user {user_id} (slot {slot})"
                return Difference(
                    Kind.CACHE, self._shard, where, f"bit is {int(state.member)}", f"the shard says {int(member)}"
                )
        return None

    def _entries(self, user_ids: Sequence[int]) -> dict[int, Entry]:
        """What a reader would take from the cache for these users; users with a miss are left out."""
        found: dict[int, Entry] = {}
        for first in range(0, len(user_ids), _LOOKUP_USERS_MAX):
            page = user_ids[first : first + _LOOKUP_USERS_MAX]
            entries = zip(page, self._reader.lookup(page), strict=True)
            found |= {user_id: entry for user_id, entry in entries if entry is not None}
        return found


@dataclass(frozen=True, slots=True)
class _Stale:
    """An entry, and what the shard says of its user.

    Attributes:
        expected: the user's list; None: there is no such user.
        slot: the user's slot; None: as above.
        epoch: the shard's.
    """

    entry: Entry
    expected: tuple[int, ...] | None
    slot: int | None
    epoch: int

    @property
    def listed(self) -> tuple[int, ...]:
        return self.entry[FIRST_SEGMENT:]

    def differs(self, changing: frozenset[int]) -> bool:
        if self.expected is None or self.entry[SLOT] != self.slot or self.entry[EPOCH] > self.epoch:
            return True
        return _differs(self.listed, self.expected, changing)


def slots_of_users(chunk: Chunk, block: int) -> dict[int, int]:
    """Every user of one block of a chunk with the user's slot."""
    user_ids = chunk.user_ids[block]
    there = np.flatnonzero(user_ids)
    slots = (chunk.first + block) * BLOCK_SLOTS + there
    return dict(zip(user_ids[there].tolist(), slots.tolist(), strict=True))


def _differs(listed: tuple[int, ...], expected: tuple[int, ...], changing: frozenset[int]) -> bool:
    return [item for item in listed if item not in changing] != [item for item in expected if item not in changing]


def _listed(segment_ids: tuple[int, ...]) -> str:
    return "[" + ", ".join(map(str, segment_ids)) + "]"
