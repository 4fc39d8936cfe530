"""Users come into a shard's blocks and leave them: directory, bits and counters, whatever the number of segments.

Bits say what the rules say, overrides apart. The caller's transaction shares the shard's lock, so no rule changes
under it, and holds the row of shard_state, so nobody else reads and writes these blocks: read, modify, write is safe.
"""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from typing import Protocol

import numpy as np
import numpy.typing as npt

from segsvc.domain import bits
from segsvc.domain.bucketing import buckets
from segsvc.domain.errors import Reason, ServiceError
from segsvc.domain.segment import Policy, ShardSegment
from segsvc.domain.sharding import BLOCK_SLOTS

ROWS_AT_ONCE = 65_536
"""Rows of bits (128 bytes each) held at a time while users leave: bounds memory, whatever the number of segments."""

Int64s = npt.NDArray[np.int64]


class ShardBits(Protocol):
    """Directory, bits and counters within a transaction."""

    def rules(self) -> Sequence[ShardSegment]:
        """The shard's segments that have a rule, by id."""

    def directory(self, blocks: Sequence[int]) -> Mapping[int, Int64s]:
        """User ids of those of these blocks that exist, 1024 each, 0 where there is no user."""

    def put_directory(self, directory: Mapping[int, Int64s]) -> None:
        """Write blocks of the directory, new ones too."""

    def bit_rows(self, blocks: Sequence[int]) -> bits.BitRows:
        """Every segment's bits in these blocks, by block and segment; rows without a bit set do not exist."""

    def put_bit_rows(self, rows: bits.BitRows) -> None:
        """Write rows of bits, new ones too; one without a bit set is deleted."""

    def add_to_rule_counts(self, added: Mapping[int, int]) -> None:
        """Add to segments' counters: segment id → bits set (negative: cleared)."""


def place_users(tx: ShardBits, first_slot: int, user_ids: Int64s) -> None:
    """Give new users the slots from ``first_slot`` on, and their bits.

    Raises:
        ServiceError: INTERNAL for a rule that this release cannot evaluate.
    """
    first_block = first_slot // BLOCK_SLOTS
    offset = first_slot - first_block * BLOCK_SLOTS
    block_count = -(-(offset + user_ids.size) // BLOCK_SLOTS)
    new_slots = slice(offset, offset + user_ids.size)

    # Blocks after the first are new: slots are given out densely.
    directory = np.zeros(block_count * BLOCK_SLOTS, dtype=np.int64)
    directory[:BLOCK_SLOTS] = tx.directory([first_block]).get(first_block, 0)
    directory[new_slots] = user_ids
    tx.put_directory(dict(enumerate(directory.reshape(block_count, BLOCK_SLOTS), start=first_block)))

    open_rules = [segment for segment in tx.rules() if _takes_newcomers(segment)]
    packed = np.zeros((len(open_rules), block_count, bits.empty(1).shape[1]), dtype=np.uint8)
    counts: dict[int, int] = {}
    flags = np.zeros(block_count * BLOCK_SLOTS, dtype=np.bool_)
    for n, segment in enumerate(open_rules):
        members = evaluate(segment, user_ids)
        count = int(np.count_nonzero(members))
        if count:
            counts[segment.id] = count
            flags[new_slots] = members
            packed[n] = bits.pack(flags.reshape(block_count, BLOCK_SLOTS))
    if not counts:
        return
    touched = packed.any(axis=2)
    which_segment, which_block = np.nonzero(touched)
    rows = bits.BitRows(
        which_block + first_block,
        np.array([segment.id for segment in open_rules], dtype=np.int64)[which_segment],
        packed[which_segment, which_block],
    )
    if offset:
        _merge(rows, tx.bit_rows([first_block]))
    tx.put_bit_rows(rows)
    tx.add_to_rule_counts(counts)


def evaluate(segment: ShardSegment, user_ids: Int64s) -> npt.NDArray[np.bool_]:
    """Which users a segment's rule says are members, overrides apart.

    A condition is evaluated where the attributes are: its result, selected by the database, belongs here, and-ed to
    the buckets. Without one the ids are enough.
    """
    rule = segment.rule
    if rule is None:
        return np.zeros(user_ids.shape, dtype=np.bool_)
    if rule.condition:
        raise ServiceError(
            Reason.INTERNAL, "a rule has a condition, which this release cannot evaluate", {"slug": segment.slug}
        )
    return buckets(user_ids, segment.salt) < rule.threshold


def clear_users(tx: ShardBits, slots: Int64s) -> None:
    """Take users out of the directory and out of every segment, FROZEN ones included: they are gone."""
    blocks, block_of_slot = np.unique(slots // BLOCK_SLOTS, return_inverse=True)
    leaving = np.zeros((blocks.size, BLOCK_SLOTS), dtype=np.bool_)
    leaving[block_of_slot, slots % BLOCK_SLOTS] = True
    leaving_packed = bits.pack(leaving)
    blocks_at_once = max(1, ROWS_AT_ONCE // max(len(tx.rules()), 64))
    removed: dict[int, int] = {}
    for start in range(0, blocks.size, blocks_at_once):
        chunk = slice(start, start + blocks_at_once)
        wanted = blocks[chunk].tolist()
        directory = tx.directory(wanted)
        # A block without a row is a fault of the shard, which the checker names; it does not stop a deletion.
        tx.put_directory(
            {
                block: np.where(gone, 0, directory[block])
                for block, gone in zip(wanted, leaving[chunk], strict=True)
                if block in directory
            }
        )
        rows = tx.bit_rows(wanted)
        cleared = rows.packed & leaving_packed[np.searchsorted(blocks, rows.blocks)]
        changed = cleared.any(axis=1)
        if not changed.any():
            continue
        cleared = cleared[changed]
        segment_ids = rows.segment_ids[changed]
        tx.put_bit_rows(bits.BitRows(rows.blocks[changed], segment_ids, rows.packed[changed] & ~cleared))
        lost = np.bitwise_count(cleared).sum(axis=1, dtype=np.int64)
        for segment_id, count in zip(segment_ids.tolist(), lost.tolist(), strict=True):
            removed[segment_id] = removed.get(segment_id, 0) - count
    if removed:
        tx.add_to_rule_counts(removed)


def _takes_newcomers(segment: ShardSegment) -> bool:
    """A FROZEN rule keeps out everyone whose slot is later than its rollout: everyone new."""
    return segment.rule is not None and segment.rule.policy is Policy.LIVE


def _merge(rows: bits.BitRows, stored: bits.BitRows) -> None:
    """Add the bits that a block has already. ``rows`` is changed; ``stored`` is of one block, by segment."""
    if not stored.blocks.size:
        return
    in_block = np.flatnonzero(rows.blocks == stored.blocks[0])
    at = np.searchsorted(stored.segment_ids, rows.segment_ids[in_block])
    known = at < stored.segment_ids.size
    known[known] = stored.segment_ids[at[known]] == rows.segment_ids[in_block[known]]
    rows.packed[in_block[known]] |= stored.packed[at[known]]
