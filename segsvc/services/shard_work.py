"""The work of an operation on one shard: a rollout's rule is evaluated for every user, then bits are written.

The first part needs no lock. The second part is inside the transaction that the commit protocol prepares, under the
shard's lock, and evaluates again those users who have changed since the first.

Deterministic: the same shard and the same plan give the same bits and counts, so that the work can be done again
after any crash, and counted again while its first copy is prepared.
"""

from __future__ import annotations

import time
from collections.abc import Callable, Iterator, Sequence
from contextlib import AbstractContextManager
from typing import Protocol

import numpy as np
import numpy.typing as npt

from segsvc.conditions import parse_condition
from segsvc.conditions.tree import attributes_of
from segsvc.domain import bits
from segsvc.domain.bucketing import buckets
from segsvc.domain.errors import Reason
from segsvc.domain.evaluation import Evaluation, Position
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

CONDITION_BLOCKS_MAX = 4000
"""The most blocks for which a condition is evaluated at a time: at most 16 MB of slots. More than CHUNK_BLOCKS, because
the server takes longer per user to read a part of the shard than to read all of it."""
CONDITION_BLOCKS_FIRST = 16
"""Blocks for which it is evaluated first, to see how long it takes."""
CONDITION_S = 0.5
"""About how long it is evaluated at a time: between two such times the task shows that it lives. Otherwise recovery
would take it for lost, and send another, which would do the same work beside it."""

SLOTS_AT_ONCE = 50_000
"""Users who changed that are evaluated at a time."""
AGAIN_S = 0.1
"""An evaluation that took longer is followed by one of those who changed meanwhile, still before the lock: so few are
left for the time under it."""
AGAIN_MAX = 5
"""If users change faster than the rule can be evaluated for them, this ends it: the rest is done under the lock."""


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

    def absent_attributes(self, names: Sequence[str], slots: Int64s | None = None) -> Sequence[str]:
        """Those of these attribute names that no user in these slots has (None: no user of the shard), in any order."""

    def position(self) -> Position:
        """Which transactions this one's snapshot sees."""

    def changed_since(self, position: Position) -> Int64s:
        """Slots of the users whom transactions have changed or deleted that this position does not see."""

    def users_at(self, slots: Int64s) -> bits.UserIds:
        """The user in each of these slots, which ascend; 0: there is none."""

    def condition_holds(self, condition: str, slots: Int64s) -> npt.NDArray[np.bool_]:
        """For which of the users in these slots a condition holds; False where there is no user."""

    def segment_bits(self, segment_id: int, first_block: int, blocks: int) -> bits.Packed: ...

    def write_segment_bits(self, segment_id: int, first_block: int, old: bits.Packed, new: bits.Packed) -> None:
        """Store the blocks that differ; the row of a block without a bit set is deleted."""

    def put_rule(self, segment_id: int, rule: Rule, rule_count: int, frozen_slot: int | None) -> None: ...

    def insert_segment(self, segment: ShardSegment) -> None: ...

    def delete_segment(self, segment_id: int) -> None:
        """Delete the segment with its bits and its overrides."""


class OperationWork:
    """The work of an operation, as a participant needs it. Implements ``postgres.shard.participant.Work``."""

    def evaluate(
        self,
        snapshots: Callable[[], AbstractContextManager[ShardTransaction]],
        operation: Operation,
        on_progress: ProgressHook,
    ) -> Evaluation | None:
        """Evaluate a rollout's rule for every user of the shard, without a lock; None: the operation is no rollout."""
        plan = operation.plan
        if plan.kind is not OperationKind.ROLL_OUT:
            return None

        with snapshots() as tx:
            evaluation = _evaluate(tx, plan, on_progress)
        for _ in range(AGAIN_MAX):
            if evaluation.took_s <= AGAIN_S:
                break
            with snapshots() as tx:
                evaluation = _catch_up(tx, plan, evaluation, on_progress)
        return evaluation

    def perform(
        self,
        tx: ShardTransaction,
        operation: Operation,
        on_progress: ProgressHook,
        *,
        write: bool,
        earlier: Evaluation | None = None,
    ) -> ShardCounts:
        """Do an operation's work on one shard, or only count it.

        Args:
            write: False counts what True would change, and changes nothing.
            earlier: what ``evaluate`` found; only those who have changed since are evaluated. None: all are.

        Raises:
            WorkFailed: the shard cannot do it, now or later.
        """
        plan = operation.plan
        if plan.kind is OperationKind.CREATE:
            return _create(tx, plan, write=write)
        if plan.kind is OperationKind.DELETE:
            return _delete(tx, plan, write=write)

        _existing(tx, plan)
        evaluation = _evaluate(tx, plan, on_progress) if earlier is None else _catch_up(tx, plan, earlier, on_progress)
        return _roll_out(tx, plan, evaluation, on_progress, write=write)


def count_roll_out(tx: ShardTransaction, plan: OperationPlan) -> ShardCounts:
    """What a roll-out would change on one shard. A segment that the shard does not know has no members there yet."""
    evaluation = _evaluate(tx, plan, lambda _: None)
    return _roll_out(tx, plan, evaluation, lambda _: None, write=False)


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


def _rule(plan: OperationPlan) -> Rule:
    if plan.rule is None:
        raise ValueError("a roll-out has a rule")
    return plan.rule


def _evaluate(tx: ShardTransaction, plan: OperationPlan, on_progress: ProgressHook) -> Evaluation:
    """Evaluate the rule for every user of the shard. One bit for each of them is small enough to keep in memory."""
    began = time.monotonic()
    rule = _rule(plan)
    position = tx.position()
    next_slot = tx.next_slot()
    blocks = _blocks(next_slot)

    holds = _condition_bits(tx, rule.condition, blocks, on_progress) if rule.condition else ~bits.empty(blocks)
    below = bits.empty(blocks)
    for first, count in _chunks(blocks):
        user_ids = tx.directory(first, count)
        there = user_ids > 0
        holds[first : first + count] &= bits.pack(there)
        below[first : first + count] = bits.pack(there & (buckets(user_ids, plan.salt) < rule.threshold))

    # An attribute that no user has is often a misspelling. Only such a name costs another read of every user.
    names = sorted(attributes_of(parse_condition(rule.condition).root)) if rule.condition else []
    absent = tuple(sorted(tx.absent_attributes(names))) if names else ()
    return Evaluation(position, next_slot, holds, below, absent, time.monotonic() - began)


def _condition_bits(tx: ShardTransaction, condition: str, blocks: int, on_progress: ProgressHook) -> bits.Packed:
    """The users of the shard for whom a condition holds. This step takes longest, so it reports that work goes on."""
    packed = bits.empty(blocks)
    first, count = 0, min(CONDITION_BLOCKS_FIRST, CONDITION_BLOCKS_MAX)
    while first < blocks:
        count = min(count, blocks - first)
        began = time.monotonic()
        packed[first : first + count] = bits.at_slots(tx.condition_slots(condition, first, count), first, count)
        first += count
        on_progress(ShardProgress(tx.shard, ShardState.WORKING, 0, blocks))

        took_s = max(time.monotonic() - began, 1e-6)
        count = max(1, min(CONDITION_BLOCKS_MAX, int(count * CONDITION_S / took_s)))
    return packed


def _catch_up(tx: ShardTransaction, plan: OperationPlan, earlier: Evaluation, on_progress: ProgressHook) -> Evaluation:
    """An earlier evaluation, with those users evaluated again who were changed, deleted or created since.

    Slots are given out in the order of commits: who was created since has a slot that was not given out then.
    """
    began = time.monotonic()
    rule = _rule(plan)
    position = tx.position()
    next_slot = tx.next_slot()
    blocks = _blocks(next_slot)

    added = bits.empty(blocks - len(earlier.holds))
    holds, below = np.concatenate([earlier.holds, added]), np.concatenate([earlier.below, added])
    changed = tx.changed_since(earlier.position)
    slots = np.union1d(changed[changed < earlier.next_slot], np.arange(earlier.next_slot, next_slot))

    absent = list(earlier.absent_attributes)
    for start in range(0, slots.size, SLOTS_AT_ONCE):
        part = slots[start : start + SLOTS_AT_ONCE]
        user_ids = tx.users_at(part)
        there = user_ids > 0
        bits.put(holds, part, there & tx.condition_holds(rule.condition, part) if rule.condition else there)
        bits.put(below, part, there & (buckets(user_ids, plan.salt) < rule.threshold))
        if absent:
            absent = sorted(tx.absent_attributes(absent, part))
        on_progress(ShardProgress(tx.shard, ShardState.WORKING, 0, blocks))
    return Evaluation(position, next_slot, holds, below, tuple(absent), time.monotonic() - began)


def _roll_out(
    tx: ShardTransaction, plan: OperationPlan, evaluation: Evaluation, on_progress: ProgressHook, *, write: bool
) -> ShardCounts:
    """Compare what the rule says with the stored bits, and store those that differ.

    ``added`` and ``removed`` count users whose membership changes, overrides included both before and after, so that
    members afterwards = members before + added - removed.

    Args:
        evaluation: of every user that this transaction sees.
    """
    rule = _rule(plan)
    blocks_total = len(evaluation.holds)
    new_bits = evaluation.holds & evaluation.below

    added = removed = members = blocks_done = 0
    for (first, count), old, included, excluded in _membership_chunks(
        tx, plan.segment_id, blocks_total, tx.overridden(plan.segment_id)
    ):
        new = new_bits[first : first + count]
        before = (old | included) & ~excluded
        after = (new | included) & ~excluded
        members += bits.popcount(after)
        added += bits.popcount(after & ~before)
        removed += bits.popcount(before & ~after)

        if write:
            tx.write_segment_bits(plan.segment_id, first, old, new)
        blocks_done += count
        on_progress(ShardProgress(tx.shard, ShardState.WORKING, blocks_done, blocks_total, added, removed))

    if write:
        frozen_slot = evaluation.next_slot - 1 if rule.policy is Policy.FROZEN else None
        tx.put_rule(plan.segment_id, rule, bits.popcount(new_bits), frozen_slot)
    matched = bits.popcount(evaluation.holds)
    return ShardCounts(tx.shard, matched, added, removed, members, evaluation.absent_attributes)
