"""Adds users to a shard's blocks and removes them: directory, bits and counters, for any number of segments.

Bits hold the result of the rules, without overrides. The caller's transaction shares the shard's lock, so no rule
changes meanwhile, and holds the row of shard_state, so no other transaction changes these blocks: read, modify, write
is safe.
"""

from __future__ import annotations

from collections.abc import Iterable, Iterator, Mapping, Sequence
from typing import Protocol

import numpy as np
import numpy.typing as npt

from segsvc.domain import bits
from segsvc.domain.bucketing import UserHashes
from segsvc.domain.segment import Policy, ShardSegment
from segsvc.domain.sharding import BLOCK_SLOTS

ROWS_AT_ONCE = 65_536
"""Rows of bits (128 bytes each) held at a time while users leave: bounds memory, for any number of segments."""

Int64s = npt.NDArray[np.int64]


class ShardBits(Protocol):
    """Directory, bits and counters within a transaction."""

    def rules(self) -> Sequence[ShardSegment]:
        """The shard's segments that have a rule, by id."""

    def matching(self, conditions: Sequence[str], slots: Int64s) -> Iterable[tuple[str, npt.NDArray[np.bool_]]]:
        """For each condition in turn, for which of the users in these slots it holds, with their present attributes.

        Takes a few statements, for any number of conditions.
        """

    def directory(self, blocks: Sequence[int]) -> Mapping[int, Int64s]:
        """User ids, for the blocks that exist: 1024 each, 0 where there is no user."""

    def put_directory(self, directory: Mapping[int, Int64s]) -> None:
        """Write blocks of the directory, new ones too."""

    def bit_rows(self, blocks: Sequence[int]) -> bits.BitRows:
        """Every segment's bits in these blocks, by block and segment; rows without a bit set do not exist."""

    def put_bit_rows(self, rows: bits.BitRows, *, stored: npt.NDArray[np.bool_]) -> None:
        """Write rows of bits; a row without a bit set is not kept.

        Args:
            stored: for each row, whether one of its block and segment exists now, which is replaced.
        """

    def add_to_rule_counts(self, added: Mapping[int, int]) -> None:
        """Add to segments' counters: segment id → bits set (negative: cleared)."""


def place_users(tx: ShardBits, first_slot: int, user_ids: Int64s) -> None:
    """Give new users, whose rows are written, the slots from ``first_slot`` on, and their bits."""
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
    slots = np.arange(first_slot, first_slot + user_ids.size, dtype=np.int64)
    for n, (segment, members) in enumerate(_evaluated(tx, open_rules, slots, user_ids)):
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
        blocks=which_block + first_block,
        segment_ids=np.array([segment.id for segment in open_rules], dtype=np.int64)[which_segment],
        packed=packed[which_segment, which_block],
    )
    stored = _merge(rows, tx.bit_rows(range(first_block, first_block + block_count)), first_block)
    tx.put_bit_rows(rows, stored=stored)
    tx.add_to_rule_counts(counts)


def _evaluated(
    tx: ShardBits, segments: Sequence[ShardSegment], slots: Int64s, user_ids: Int64s
) -> Iterator[tuple[ShardSegment, npt.NDArray[np.bool_]]]:
    """Each segment with the users that its rule makes members, without overrides. All of the segments have a rule."""
    # Many segments may share a condition: it is evaluated once, in the database, where the attributes are.
    conditions = sorted({segment.rule.condition for segment in segments if segment.rule and segment.rule.condition})
    holds: dict[str, npt.NDArray[np.bool_]] = {"": np.ones(user_ids.shape, dtype=np.bool_)}
    holds.update(tx.matching(conditions, slots))

    hashes = UserHashes(user_ids)
    for segment in segments:
        if segment.rule is None:
            raise AssertionError("a segment to evaluate has a rule")
        yield segment, holds[segment.rule.condition] & hashes.below(segment.salt, segment.rule.threshold)


def evaluate_again(tx: ShardBits, slots: Int64s, user_ids: Int64s) -> None:
    """Set and clear the bits of users whose attributes have just changed.

    Rules without a condition give the same result as before, and FROZEN rules keep what the rollout found.
    """
    segments = [segment for segment in tx.rules() if _follows_changes(segment)]
    if not segments:
        return

    members = np.stack([flags for _, flags in _evaluated(tx, segments, slots, user_ids)])
    index_of = {segment.id: n for n, segment in enumerate(segments)}
    ids = np.array([segment.id for segment in segments], dtype=np.int64)
    added: dict[int, int] = {}
    for blocks, chosen in _block_chunks(slots, len(segments)):
        at = np.searchsorted(blocks, slots[chosen] // BLOCK_SLOTS)
        within = slots[chosen] % BLOCK_SLOTS
        flags = np.zeros((blocks.size, BLOCK_SLOTS), dtype=np.bool_)
        flags[at, within] = True
        concerned = bits.pack(flags)

        old = np.zeros((len(segments), *concerned.shape), dtype=np.uint8)
        stored = np.zeros(old.shape[:2], dtype=np.bool_)
        rows = tx.bit_rows(blocks.tolist())
        known = np.isin(rows.segment_ids, ids)
        rows_of = np.array([index_of[segment_id] for segment_id in rows.segment_ids[known].tolist()], dtype=np.int64)
        blocks_of = np.searchsorted(blocks, rows.blocks[known])
        old[rows_of, blocks_of] = rows.packed[known]
        stored[rows_of, blocks_of] = True

        wanted = np.zeros((len(segments), blocks.size, BLOCK_SLOTS), dtype=np.bool_)
        wanted[:, at, within] = members[:, chosen]
        new = (old & ~concerned) | bits.pack(wanted.reshape(-1, BLOCK_SLOTS)).reshape(old.shape)
        which_segment, which_block = np.nonzero((old != new).any(axis=2))
        if not which_segment.size:
            continue
        changed = new[which_segment, which_block]
        tx.put_bit_rows(
            bits.BitRows(blocks=blocks[which_block], segment_ids=ids[which_segment], packed=changed),
            stored=stored[which_segment, which_block],
        )
        gained = np.bitwise_count(changed).sum(axis=1, dtype=np.int64)
        gained -= np.bitwise_count(old[which_segment, which_block]).sum(axis=1, dtype=np.int64)
        for segment_id, count in zip(ids[which_segment].tolist(), gained.tolist(), strict=True):
            added[segment_id] = added.get(segment_id, 0) + count
    if added:
        tx.add_to_rule_counts(added)


def _block_chunks(slots: Int64s, segments: int) -> Iterator[tuple[Int64s, Int64s]]:
    """Blocks of these slots, as many at a time as memory allows, with the positions of their slots."""
    blocks = np.unique(slots // BLOCK_SLOTS)
    # Flags take a byte for each slot here, eight times their packed size.
    at_once = max(1, ROWS_AT_ONCE // (8 * max(segments, 8)))
    for start in range(0, blocks.size, at_once):
        part = blocks[start : start + at_once]
        yield part, np.flatnonzero(np.isin(slots // BLOCK_SLOTS, part))


def _follows_changes(segment: ShardSegment) -> bool:
    rule = segment.rule
    return rule is not None and rule.policy is Policy.LIVE and bool(rule.condition)


def clear_users(tx: ShardBits, slots: Int64s) -> None:
    """Remove deleted users from the directory and from every segment, FROZEN ones included."""
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
        # A block without a row is a fault of the shard, which the checker reports; it does not stop a deletion.
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
        tx.put_bit_rows(
            bits.BitRows(blocks=rows.blocks[changed], segment_ids=segment_ids, packed=rows.packed[changed] & ~cleared),
            stored=np.ones(segment_ids.size, dtype=np.bool_),
        )

        lost = np.bitwise_count(cleared).sum(axis=1, dtype=np.int64)
        for segment_id, count in zip(segment_ids.tolist(), lost.tolist(), strict=True):
            removed[segment_id] = removed.get(segment_id, 0) - count
    if removed:
        tx.add_to_rule_counts(removed)


def _takes_newcomers(segment: ShardSegment) -> bool:
    """A FROZEN rule excludes every user whose slot was given out after its rollout: every new user."""
    return segment.rule is not None and segment.rule.policy is Policy.LIVE


def _merge(rows: bits.BitRows, old: bits.BitRows, first_block: int) -> npt.NDArray[np.bool_]:
    """Add the bits that the first block has already. Returns which of the rows are stored already.

    Rows of later blocks belong to no user: there are none, unless a fault has left some. They are replaced.

    Args:
        rows: is changed.
        old: by block and segment.
    """
    width = int(max(rows.segment_ids.max(), old.segment_ids.max(initial=0))) + 1
    old_keys = (old.blocks - first_block) * width + old.segment_ids
    keys = (rows.blocks - first_block) * width + rows.segment_ids
    stored = np.isin(keys, old_keys)
    merged = np.flatnonzero(stored & (rows.blocks == first_block))
    rows.packed[merged] |= old.packed[np.searchsorted(old_keys, keys[merged])]
    return stored
