"""The work of an operation on one shard, inside the transaction that the commit protocol prepares.

Deterministic: the same shard and the same plan give the same bits and counts, so that the work can be done again
after any crash, and counted again while its first copy is prepared.
"""

from __future__ import annotations

from collections.abc import Iterator, Sequence
from typing import Protocol

from segsvc.conditions import parse_condition
from segsvc.conditions.tree import attributes_of
from segsvc.domain import bits
from segsvc.domain.bucketing import buckets
from segsvc.domain.errors import Reason
from segsvc.domain.operation import (
    Failure,
    Operation,
    OperationKind,
    OperationPlan,
    ShardCounts,
    ShardProgress,
    ShardState,
)
from segsvc.domain.segment import Policy, Rule, ShardSegment
from segsvc.domain.sharding import BLOCK_SLOTS
from segsvc.domain.stored import Int64s
from segsvc.twophase.ports import ProgressHook, WorkFailed

CHUNK_BLOCKS = 1000
"""Blocks in work at a time: about 8 MB of user ids, so that memory does not grow with the number of users."""

CONDITION_BLOCKS = 4000
"""Blocks for which a condition is evaluated at a time: at most 16 MB of slots. More than CHUNK_BLOCKS, because the
server takes longer per user to read a part of the shard than to read all of it."""


class ShardTransaction(Protocol):
    """A transaction on one shard that holds the shard's exclusive lock (or one under which nothing can change)."""

    @property
    def shard(self) -> int: ...

    def next_slot(self) -> int:
        """Slots given out so far."""

    def segment(self, segment_id: int) -> ShardSegment | None: ...

    def overridden(self, segment_id: int) -> bits.OverriddenSlots: ...

    def directory(self, first_block: int, blocks: int) -> bits.UserIds: ...

    def condition_slots(self, condition: str, first_block: int, blocks: int) -> Int64s:
        """Slots of the users of a range of blocks for whom a condition holds, in any order."""

    def absent_attributes(self, names: Sequence[str]) -> Sequence[str]:
        """Those of these attribute names that no user of the shard has, in any order."""

    def segment_bits(self, segment_id: int, first_block: int, blocks: int) -> bits.Packed: ...

    def write_segment_bits(self, segment_id: int, first_block: int, old: bits.Packed, new: bits.Packed) -> None:
        """Store the blocks that differ; the row of a block without a bit set is deleted."""

    def put_rule(self, segment_id: int, rule: Rule, rule_count: int, frozen_slot: int | None) -> None: ...

    def insert_segment(self, segment: ShardSegment) -> None: ...

    def delete_segment(self, segment_id: int) -> None:
        """Delete the segment with its bits and its overrides."""


def perform(tx: ShardTransaction, operation: Operation, on_progress: ProgressHook, *, write: bool) -> ShardCounts:
    """Do an operation's work on one shard, or only count it.

    Args:
        write: False counts what True would change, and changes nothing.

    Raises:
        WorkFailed: the shard cannot do it, now or later.
    """
    kind = operation.plan.kind
    if kind is OperationKind.CREATE:
        return _create(tx, operation.plan, write=write)
    if kind is OperationKind.DELETE:
        return _delete(tx, operation.plan, write=write)
    _existing(tx, operation.plan)
    return _roll_out(tx, operation.plan, on_progress, write=write)


def count_roll_out(tx: ShardTransaction, plan: OperationPlan) -> ShardCounts:
    """What a roll-out would change on one shard. A segment that the shard does not know has no members there yet."""
    return _roll_out(tx, plan, lambda _: None, write=False)


def _create(tx: ShardTransaction, plan: OperationPlan, *, write: bool) -> ShardCounts:
    if write:
        tx.insert_segment(ShardSegment(plan.segment_id, plan.slug, plan.salt, rule=None, rule_count=0))
    return ShardCounts(tx.shard)


def _existing(tx: ShardTransaction, plan: OperationPlan) -> ShardSegment:
    segment = tx.segment(plan.segment_id)
    if segment is None:
        # The start of the operation found the segment in the catalog, and no other operation can be in flight: the
        # shard's copy is wrong.
        raise WorkFailed(
            Failure(
                Reason.INTERNAL.text,
                f"shard {tx.shard} does not know the segment; run the checker",
                {"shard": str(tx.shard), "slug": plan.slug},
            )
        )
    return segment


def _delete(tx: ShardTransaction, plan: OperationPlan, *, write: bool) -> ShardCounts:
    segment = _existing(tx, plan)

    members = segment.rule_count
    overridden = tx.overridden(segment.id)
    if overridden.included.size or overridden.excluded.size:
        members = sum(
            bits.popcount((old | included) & ~excluded)
            for _, old, included, excluded in _membership_chunks(tx, segment.id, _blocks(tx.next_slot()), overridden)
        )

    if write:
        tx.delete_segment(segment.id)
    return ShardCounts(tx.shard, matched=0, added=0, removed=members, members=0)


def _blocks(next_slot: int) -> int:
    """Number of blocks needed for this many slots."""
    return -(-next_slot // BLOCK_SLOTS)


def _chunks(total: int) -> Iterator[tuple[int, int]]:
    """(first block, number of blocks) of each chunk of ``total`` blocks."""
    for first in range(0, total, CHUNK_BLOCKS):
        yield first, min(CHUNK_BLOCKS, total - first)


def _membership_chunks(
    tx: ShardTransaction, segment_id: int, blocks: int, overridden: bits.OverriddenSlots
) -> Iterator[tuple[tuple[int, int], bits.Packed, bits.Packed, bits.Packed]]:
    """For each chunk: its range, the stored bits, and the slots that overrides include and exclude."""
    for first, count in _chunks(blocks):
        yield (
            (first, count),
            tx.segment_bits(segment_id, first, count),
            bits.at_slots(overridden.included, first, count),
            bits.at_slots(overridden.excluded, first, count),
        )


def _condition_bits(tx: ShardTransaction, condition: str, blocks: int, on_progress: ProgressHook) -> bits.Packed:
    """The users of the shard for whom a condition holds. This step takes longest, so it reports that work goes on."""
    packed = bits.empty(blocks)
    for first in range(0, blocks, CONDITION_BLOCKS):
        count = min(CONDITION_BLOCKS, blocks - first)
        packed[first : first + count] = bits.at_slots(tx.condition_slots(condition, first, count), first, count)
        on_progress(ShardProgress(tx.shard, ShardState.WORKING, 0, blocks))
    return packed


def _roll_out(tx: ShardTransaction, plan: OperationPlan, on_progress: ProgressHook, *, write: bool) -> ShardCounts:
    """Evaluate the rule for every user of the shard and store the bits that differ.

    ``added`` and ``removed`` count users whose membership changes, overrides included both before and after, so that
    members afterwards = members before + added - removed.
    """
    rule = plan.rule
    if rule is None:
        raise ValueError("a roll-out has a rule")

    next_slot = tx.next_slot()
    blocks_total = _blocks(next_slot)
    # One bit for each user of the shard is small enough to keep in memory.
    condition_bits = _condition_bits(tx, rule.condition, blocks_total, on_progress) if rule.condition else None

    matched = added = removed = members = rule_count = 0
    blocks_done = 0
    for (first, count), old, included, excluded in _membership_chunks(
        tx, plan.segment_id, blocks_total, tx.overridden(plan.segment_id)
    ):
        user_ids = tx.directory(first, count)
        condition_holds = user_ids > 0
        if condition_bits is not None:
            condition_holds &= bits.unpack(condition_bits[first : first + count])
        new = bits.pack(condition_holds & (buckets(user_ids, plan.salt) < rule.threshold))

        matched += int(condition_holds.sum())
        rule_count += bits.popcount(new)
        before = (old | included) & ~excluded
        after = (new | included) & ~excluded
        members += bits.popcount(after)
        added += bits.popcount(after & ~before)
        removed += bits.popcount(before & ~after)

        if write:
            tx.write_segment_bits(plan.segment_id, first, old, new)
        blocks_done += count
        on_progress(ShardProgress(tx.shard, ShardState.WORKING, blocks_done, blocks_total, added, removed))

    # An attribute that no user has is often a misspelling. Only such a name costs another read of every user.
    names = sorted(attributes_of(parse_condition(rule.condition).root)) if rule.condition else []
    absent = tuple(sorted(tx.absent_attributes(names))) if names else ()

    if write:
        frozen_slot = next_slot - 1 if rule.policy is Policy.FROZEN else None
        tx.put_rule(plan.segment_id, rule, rule_count, frozen_slot)
    return ShardCounts(tx.shard, matched, added, removed, members, absent)
