"""Compares what the cache's patches say of who changed with what the shards have noted, and their epochs.

Whether the bits of a segment's members are right shows in the answers: ``cache`` compares what a reader makes of
entries and patches, for every cached user, and names the patch that makes an answer wrong.
"""

from __future__ import annotations

from collections.abc import Sequence
from typing import Protocol

import numpy as np

from segsvc.domain.membership import Entry
from segsvc.domain.patch import PublishedPatch, SlotState
from segsvc.services.check.blocks import ShardSnapshot
from segsvc.services.check.report import Difference, Kind, Report


class PatchLookup(Protocol):
    """The cache as it is stored. All methods raise CACHE_UNAVAILABLE."""

    def newest_patch(self, shard: int) -> int:
        """Epoch of the newest patch of the shard's generation; 0: there is none."""

    def patches(self, shard: int) -> Sequence[PublishedPatch]:
        """The patches of the shard's generation, oldest first."""

    def slot(self, shard: int, patch: PublishedPatch, slot: int) -> SlotState | None:
        """What a patch says of a slot; None: its chunk is lost."""

    def changed(self, shard: int, patch: PublishedPatch, next_slot: int) -> tuple[Sequence[int], Sequence[range]]:
        """Slots of the users whom a patch names as changed, and the ranges of slots whose chunks are lost."""

    def stored(self, shard: int, user_ids: Sequence[int]) -> Sequence[Entry | None]:
        """The users' entries of the generation in force, without any patch; None: there is none."""


class PatchCheck:
    """The comparison of one shard's patches. Made before the snapshot that it is compared with: then all that the
    patches say has been committed before the snapshot.

    Args:
        notes_kept_s: how long a shard remembers at least who changed.
    """

    def __init__(self, lookup: PatchLookup, shard: int, report: Report, *, notes_kept_s: float) -> None:
        self._lookup = lookup
        self._shard = shard
        self._report = report
        self._notes_kept_s = notes_kept_s
        self._newest = lookup.newest_patch(shard)
        patches = lookup.patches(shard)
        self._last = patches[-1] if patches else None

    def compare(self, snapshot: ShardSnapshot) -> None:
        epoch, _ = snapshot.epochs()
        if self._newest > epoch:
            where, found = "cache generation", f"its newest patch is of epoch {self._newest}"
            self._report.add(Kind.CACHE, self._shard, where, found, f"the shard is in epoch {epoch}")
        # Of earlier epochs the shard may have forgotten who changed: no patch can need it any more.
        if self._last is not None and self._last.epoch == epoch:
            self._compare_changed(snapshot, self._last)

    def _compare_changed(self, snapshot: ShardSnapshot, patch: PublishedPatch) -> None:
        """Compare the newest patch with the notes of its epoch and the one before."""
        next_slot = snapshot.state().next_slot
        before = np.unique(snapshot.changed_slots(patch.epoch - 1))
        since = np.unique(snapshot.changed_slots(patch.epoch))
        slots, lost = self._lookup.changed(self._shard, patch, next_slot)
        said = np.array(slots, dtype=np.int64)

        # Changes of the epoch before were committed before the operation, hence before its patch was read.
        missing = np.setdiff1d(before[before < next_slot], said)
        for gone in lost:
            missing = missing[(missing < gone.start) | (missing >= gone.stop)]
        self._report_slots(patch, missing, "it does not say that the user changed", "the shard has noted a change")

        began_s = snapshot.epoch_began_s(patch.epoch - 1)
        if began_s is not None and began_s < self._notes_kept_s:  # else older notes may be forgotten
            odd = np.setdiff1d(said, np.union1d(before, since))
            self._report_slots(patch, odd, "it says that the user changed", "the shard has noted no change")

    def _report_slots(self, patch: PublishedPatch, slots: np.typing.NDArray[np.int64], found: str, noted: str) -> None:
        self._report.add_all(
            Kind.CACHE,
            slots.size,
            (
                Difference(Kind.CACHE, self._shard, f"patch of epoch {patch.epoch}, slot {slot}", found, noted)
                for slot in slots.tolist()
            ),
        )
