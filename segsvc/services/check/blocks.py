"""Recomputes one shard chunk by chunk: directory, slots, bits and counters from users, rules and overrides.

All data comes from one snapshot of the shard. Every change of a shard is one transaction, so a snapshot is consistent
at any time, with traffic or without.
"""

from __future__ import annotations

from collections import Counter
from collections.abc import Iterator, Sequence
from dataclasses import dataclass
from typing import Final, Protocol

import numpy as np
import numpy.typing as npt

from segsvc.domain import bits
from segsvc.domain.bucketing import buckets
from segsvc.domain.segment import Policy, ShardSegment
from segsvc.domain.sharding import BLOCK_BYTES, BLOCK_SLOTS, shard_of
from segsvc.domain.stored import DirectoryRows, Int64s, OverrideColumns, StateRow, UserColumns
from segsvc.services.check.report import Difference, Kind, Report

CHUNK_BLOCKS_MAX: Final = 128
"""Blocks in one chunk: the arrays of one segment (1 MB) then stay in the processor's cache."""
CHUNK_ROWS_MAX: Final = 1 << 17
"""Membership rows in one chunk, about 20 MB: with thousands of segments a chunk has fewer blocks."""


class ShardSnapshot(Protocol):
    """One shard at one moment. A range of blocks is ``[first, first + count)``."""

    def state(self) -> StateRow: ...

    def segments(self) -> Sequence[ShardSegment]: ...

    def users(self, first: int, count: int) -> UserColumns: ...

    def directory(self, first: int, count: int) -> DirectoryRows: ...

    def bit_rows(self, first: int, count: int) -> bits.BitRows: ...

    def overrides(self, first: int, count: int) -> OverrideColumns: ...

    def condition_slots(self, condition: str, first: int, count: int) -> Int64s:
        """Slots of the users for whom a rule's condition holds: the only method that evaluates conditions."""

    def epochs(self) -> tuple[int, int | None]:
        """The shard's epoch, and the newest that a fence has begun; None: no fence has begun one."""

    def epoch_began_s(self, epoch: int) -> float | None:
        """How long ago this epoch began; None: it is not known."""

    def changed_slots(self, epoch: int) -> Int64s:
        """Slots of the users who were changed or deleted in an epoch; a slot may occur twice."""

    def users_outside(self, slots: int) -> Sequence[tuple[int, int]]:
        """(id, slot) of users whose slot is not below this number, or is negative."""

    def odd_directory_rows(self, blocks: int) -> Sequence[tuple[int, int]]:
        """(block, bytes) of rows outside ``[0, blocks)``, or without a block's size."""

    def odd_bit_rows(self, blocks: int) -> Sequence[tuple[int, int, int]]:
        """(block, segment, bytes) of rows outside ``[0, blocks)``, or without a block's size."""

    def living_tombstones(self) -> Sequence[int]:
        """Deleted users who exist nevertheless."""

    def misplaced_tombstones(self, shard_count: int) -> Sequence[int]:
        """Deleted users who belong to another shard."""

    def orphaned_overrides(self) -> Sequence[tuple[int, int]]:
        """(user, segment) of overrides whose user or segment the shard does not have."""


@dataclass(frozen=True, slots=True)
class Chunk:
    """A range of blocks, recomputed.

    Attributes:
        user_ids: the user that each slot must have, from the users' own rows (count × 1024; 0: no user).
        packed: the bits that each of ``segments`` must have (segments × count × 128).
        overrides: the overrides, which every reader applies to the bits.
    """

    first: int
    count: int
    segments: Sequence[ShardSegment]
    user_ids: bits.UserIds
    packed: npt.NDArray[np.uint8]
    overrides: OverrideColumns


def load_chunk(
    snapshot: ShardSnapshot, segments: Sequence[ShardSegment], first: int, count: int
) -> tuple[Chunk, bits.BitRows]:
    """Recompute a range of blocks. Returns the stored rows too, which the bits of FROZEN rules are taken from."""
    users = snapshot.users(first, count)
    by_slot = np.zeros(count * BLOCK_SLOTS, dtype=np.int64)
    by_slot[users.slots - first * BLOCK_SLOTS] = users.ids
    user_ids = by_slot.reshape(count, BLOCK_SLOTS)

    rows = snapshot.bit_rows(first, count)
    packed = np.zeros((len(segments), count, BLOCK_BYTES), dtype=np.uint8)
    for index, segment in enumerate(segments):
        packed[index] = _expected_bits(snapshot, segment, first, user_ids, rows)
    return Chunk(first, count, segments, user_ids, packed, snapshot.overrides(first, count)), rows


def _expected_bits(
    snapshot: ShardSnapshot, segment: ShardSegment, first: int, user_ids: bits.UserIds, rows: bits.BitRows
) -> bits.Packed:
    """The bits that a segment must have, without overrides."""
    count = len(user_ids)
    rule = segment.rule
    if rule is None:
        return bits.empty(count)

    member = (user_ids > 0) & (buckets(user_ids, segment.salt) < rule.threshold)
    if rule.policy is Policy.FROZEN:
        member &= slots_of(first, count) <= _frozen_slot(segment)
    packed = bits.pack(member)

    if rule.condition and rule.policy is Policy.FROZEN:
        # The users for whom the condition held at the rollout cannot be recomputed from today's attributes. The stored
        # bits are taken as given, for the users that can be members at all.
        packed &= stored_bits(rows, segment.id, first, count)
    elif rule.condition:
        packed &= bits.at_slots(snapshot.condition_slots(rule.condition, first, count), first, count)
    return packed


def _frozen_slot(segment: ShardSegment) -> int:
    return -1 if segment.frozen_slot is None else segment.frozen_slot


def slots_of(first: int, count: int) -> Int64s:
    """The slot numbers of a range of blocks (count × 1024)."""
    start = first * BLOCK_SLOTS
    return np.arange(start, start + count * BLOCK_SLOTS, dtype=np.int64).reshape(count, BLOCK_SLOTS)


def stored_bits(rows: bits.BitRows, segment_id: int, first: int, count: int) -> bits.Packed:
    """The bits that are stored for one segment."""
    packed = bits.empty(count)
    start, end = np.searchsorted(rows.segment_ids, [segment_id, segment_id + 1])
    packed[rows.blocks[start:end] - first] = rows.packed[start:end]
    return packed


class ShardCheck:
    """Compares one shard with its recomputed state; reports differences as it goes."""

    def __init__(self, snapshot: ShardSnapshot, shard: int, shard_count: int, report: Report) -> None:
        self._snapshot = snapshot
        self._shard = shard
        self._shard_count = shard_count
        self._report = report
        self._rule_counts: Counter[int] = Counter()
        self._users = 0
        self.state = snapshot.state()
        self.blocks = -(-self.state.next_slot // BLOCK_SLOTS)
        # In the order of their slugs, as answers list them.
        self.segments = sorted(snapshot.segments(), key=lambda segment: segment.slug)

    def chunks(self) -> Iterator[Chunk]:
        """Compare chunk after chunk, and yield each one for further comparisons. At the end, compare the totals."""
        self._check_odd_rows()
        size = max(1, min(CHUNK_BLOCKS_MAX, CHUNK_ROWS_MAX // max(1, len(self.segments))))
        for first in range(0, self.blocks, size):
            chunk, rows = load_chunk(self._snapshot, self.segments, first, min(size, self.blocks - first))
            self._check_users(chunk)
            self._check_directory(chunk)
            self._check_rows(rows)
            for index, segment in enumerate(self.segments):
                self._check_bits(chunk, index, stored_bits(rows, segment.id, first, chunk.count))
            yield chunk
        self._check_counters()

    def _add(self, kind: Kind, where: str, found: str, expected: str) -> None:
        self._report.add(kind, self._shard, where, found, expected)

    def _check_odd_rows(self) -> None:
        next_slot = self.state.next_slot
        for user_id, slot in self._snapshot.users_outside(next_slot):
            # A user in the last block is counted when that block is compared.
            self._users += not 0 <= slot < self.blocks * BLOCK_SLOTS
            self._add(Kind.SLOT, f"user {user_id}", f"slot is {slot}", f"slots given out are 0 to {next_slot - 1}")

        for block, size in self._snapshot.odd_directory_rows(self.blocks):
            self._add_odd(Kind.DIRECTORY, f"directory, block {block}", block, size, BLOCK_SLOTS * 8)
        for block, segment_id, size in self._snapshot.odd_bit_rows(self.blocks):
            self._add_odd(
                Kind.BITS_ROW, f"memberships of segment {segment_id}, block {block}", block, size, BLOCK_BYTES
            )

        for user_id in self._snapshot.living_tombstones():
            self._add(Kind.TOMBSTONE, f"user {user_id}", "is deleted and exists", "a deleted user is nowhere else")
        for user_id in self._snapshot.misplaced_tombstones(self._shard_count):
            self._add_misplaced(f"deleted user {user_id}", user_id)

        for user_id, segment_id in self._snapshot.orphaned_overrides():
            where = f"override of user {user_id} for segment {segment_id}"
            self._add(Kind.OVERRIDE, where, "the user or the segment does not exist", "it goes with them")

    def _add_odd(self, kind: Kind, where: str, block: int, size: int, size_expected: int) -> None:
        if size != size_expected:
            self._add(kind, where, f"the row has {size} bytes", f"it must have {size_expected}")
        else:
            self._add(kind, where, f"block {block} is stored", f"there are {self.blocks} blocks")

    def _add_misplaced(self, where: str, user_id: int) -> None:
        right = shard_of(user_id, self._shard_count)
        self._add(Kind.WRONG_SHARD, where, "is here", f"the shard is {user_id} mod {self._shard_count} = {right}")

    def _check_users(self, chunk: Chunk) -> None:
        ids = chunk.user_ids
        there = ids != 0
        self._users += int(there.sum())
        for user_id in ids[there & (ids % self._shard_count != self._shard)].tolist():
            self._add_misplaced(f"user {user_id}", user_id)

    def _check_directory(self, chunk: Chunk) -> None:
        rows = self._snapshot.directory(chunk.first, chunk.count)
        stored = np.zeros_like(chunk.user_ids)
        stored[rows.blocks - chunk.first] = rows.user_ids

        blocks, slots = np.nonzero(stored != chunk.user_ids)
        self._report.add_all(
            Kind.DIRECTORY,
            len(blocks),
            (
                Difference(
                    Kind.DIRECTORY,
                    self._shard,
                    f"directory, block {chunk.first + block}, slot {slot}",
                    f"it names {_whom(stored[block, slot])}",
                    f"the users' rows say {_whom(chunk.user_ids[block, slot])}",
                )
                for block, slot in zip(blocks.tolist(), slots.tolist(), strict=True)
            ),
        )

    def _check_rows(self, rows: bits.BitRows) -> None:
        """Rows that should not exist at all: of unknown segments, or without a bit."""
        known = np.isin(rows.segment_ids, [segment.id for segment in self.segments])
        empty = ~rows.packed.any(axis=1)

        for index in np.flatnonzero(~known).tolist():
            where = f"memberships of segment {rows.segment_ids[index]}, block {rows.blocks[index]}"
            self._add(Kind.BITS_ROW, where, "the row is there", "the shard has no such segment")
        for index in np.flatnonzero(known & empty).tolist():
            where = f"memberships of segment {rows.segment_ids[index]}, block {rows.blocks[index]}"
            self._add(Kind.BITS_ROW, where, "the row has no bit set", "such a row is not kept")

    def _check_bits(self, chunk: Chunk, index: int, stored: bits.Packed) -> None:
        segment = chunk.segments[index]
        members = bits.popcount(stored)
        self._rule_counts[segment.id] += members
        self._report.memberships += members

        wrong = stored ^ chunk.packed[index]
        if not wrong.any():
            return

        blocks, slots = np.nonzero(bits.unpack(wrong))
        self._report.add_all(
            Kind.BIT,
            len(blocks),
            (
                self._bit_difference(chunk, index, stored, block, slot)
                for block, slot in zip(blocks.tolist(), slots.tolist(), strict=True)
            ),
        )

    def _bit_difference(self, chunk: Chunk, index: int, stored: bits.Packed, block: int, slot: int) -> Difference:
        segment = chunk.segments[index]
        found = bool(bits.unpack(stored[block : block + 1])[0, slot])
        user_id = int(chunk.user_ids[block, slot])
        place = f"block {chunk.first + block}, bit {slot}"
        number = (chunk.first + block) * BLOCK_SLOTS + slot

        rule = segment.rule
        if user_id == 0:
            where, expected = place, "the slot has no user"
        else:
            where = f"user {user_id} ({place})"
            if rule is None:
                expected = "the segment was never rolled out"
            elif rule.policy is Policy.FROZEN and number > _frozen_slot(segment):
                expected = f"slot {number} came after the frozen roll-out, which saw slots to {_frozen_slot(segment)}"
            else:
                expected = f"the rule says {int(not found)}"

        return Difference(
            Kind.BIT, self._shard, f"segment {segment.slug} ({segment.id}), {where}", f"bit is {int(found)}", expected
        )

    def _check_counters(self) -> None:
        self._report.users += self._users
        if self.state.user_count != self._users:
            found = f"user_count is {self.state.user_count}"
            self._add(Kind.COUNTER, "shard_state", found, f"there are {self._users} users")

        for segment in self.segments:
            counted = self._rule_counts[segment.id]
            where = f"segment {segment.slug} ({segment.id})"
            if segment.rule_count != counted:
                self._add(Kind.COUNTER, where, f"rule_count is {segment.rule_count}", f"{counted} bits are set")

            frozen = segment.rule is not None and segment.rule.policy is Policy.FROZEN
            if frozen and segment.frozen_slot is None:
                self._add(Kind.SEGMENT, where, "frozen_slot is absent", "a FROZEN rule has one")
            elif not frozen and segment.frozen_slot is not None:
                self._add(Kind.SEGMENT, where, f"frozen_slot is {segment.frozen_slot}", "only a FROZEN rule has one")


def _whom(user_id: np.int64) -> str:
    return f"user {user_id}" if user_id else "no user"
