"""``segsvc check``: recompute every membership from users, rules and overrides, and compare all that is stored.

Runs beside traffic. Each shard is read in one snapshot; the catalog is read before and after the shards; a cache entry
that differs is checked again (``blocks``, ``ledger`` and ``cache`` in this folder say why that is enough).
"""

from __future__ import annotations

import time
from collections.abc import Callable, Collection, Iterator, Sequence
from contextlib import AbstractContextManager
from dataclasses import dataclass
from typing import Final, Protocol
from uuid import UUID

from segsvc.domain.operation import PreparedTransaction
from segsvc.domain.segment import ShardSegment
from segsvc.domain.stored import CatalogView, Int64s
from segsvc.services.check.blocks import ShardCheck, ShardSnapshot
from segsvc.services.check.cache import SETTLE_S, CacheCheck, EntryLookup
from segsvc.services.check.ledger import LedgerCheck
from segsvc.services.check.patches import PatchCheck, PatchLookup
from segsvc.services.check.report import Report

_DELETED_PAGE: Final = 10_000

Progress = Callable[[int, int, int], None]
"""Called with (shard, blocks done, blocks in all) as the check goes on."""


class CheckedShard(ShardSnapshot, Protocol):
    """A shard's snapshot, with the parts of it that are compared with the catalog."""

    def fences(self) -> frozenset[UUID]: ...

    def prepared(self) -> Sequence[PreparedTransaction]:
        """Prepared transactions now; they are not part of the snapshot."""

    def deleted_users(self, after: int, limit: int) -> Int64s:
        """Ids of deleted users above ``after``, ascending."""


class CheckReads(Protocol):
    """Where the checker reads. All raise ServiceError UNAVAILABLE in an outage."""

    def catalog(self, *, fence_ttl_s: float, asked_for: Collection[UUID] = ()) -> CatalogView:
        """The catalog now, in one snapshot: with the operations that are not final, have ended within this time or are
        asked for, and the whole history of the segments that have an operation in the queue or in flight."""

    def shard(self, shard: int) -> AbstractContextManager[CheckedShard]:
        """A snapshot of a shard, for as long as the block lasts."""

    def changing_segments(self) -> frozenset[int]:
        """Segments of operations that are COMMITTED now."""


@dataclass(frozen=True, slots=True)
class _ShardFacts:
    """What is compared with the catalog once all shards have been read."""

    segments: Sequence[ShardSegment]
    fences: frozenset[UUID]
    epochs: tuple[int, int | None]
    prepared: Sequence[PreparedTransaction]


class Checker:
    """The check of an installation.

    Args:
        cache: None: leave the cache out.
        patches: what the cache holds of patches; None: leave them out.
        notes_kept_s: how long the shards remember at least who changed.
        fence_ttl_s: how long fences are kept at least.
        settle_s: how long a difference of the cache must stay before it is reported.
        slugs: by segment id, the order in which ``cache`` lists segments; the checker fills it. None: the cache needs
            none.
    """

    def __init__(
        self,
        reads: CheckReads,
        cache: EntryLookup | None,
        *,
        patches: PatchLookup | None = None,
        cluster: str,
        shard_count: int,
        fence_ttl_s: float,
        settle_s: float = SETTLE_S,
        slugs: dict[int, str] | None = None,
        notes_kept_s: float = 0.0,
    ) -> None:
        self._slugs = {} if slugs is None else slugs
        self._patches = patches
        self._notes_kept_s = notes_kept_s
        self._reads = reads
        self._cache = cache
        self._cluster = cluster
        self._shard_count = shard_count
        self._fence_ttl_s = fence_ttl_s
        self._settle_s = settle_s

    def run(self, progress: Progress | None = None) -> Report:
        """Compare everything. Differences are in the report, not raised.

        Raises:
            ServiceError: UNAVAILABLE: a part could not be read, so this proves nothing.
        """
        started = time.monotonic()
        report = Report(cache_checked=self._cache is not None)

        before = self._reads.catalog(fence_ttl_s=self._fence_ttl_s)
        facts = [self._check_shard(shard, report, progress) for shard in range(self._shard_count)]
        fences = frozenset().union(*(fact.fences for fact in facts))
        after = self._reads.catalog(fence_ttl_s=self._fence_ttl_s, asked_for=fences)

        ledger = LedgerCheck(before, after, cluster=self._cluster, fence_ttl_s=self._fence_ttl_s, report=report)
        ledger.check_catalog()
        for shard, fact in enumerate(facts):
            ledger.check_segments(shard, fact.segments)
            ledger.check_fences(shard, fact.fences)
            ledger.check_epoch(shard, *fact.epochs)
            ledger.check_prepared(shard, fact.prepared)

        report.segments = len({segment.id for fact in facts for segment in fact.segments})
        report.duration_s = time.monotonic() - started
        return report

    def _check_shard(self, shard: int, report: Report, progress: Progress | None) -> _ShardFacts:
        cache = self._cache_check(shard, report)
        patches = self._patch_check(shard, report)
        with self._reads.shard(shard) as snapshot:
            if patches is not None:
                patches.compare(snapshot)
            epoch, _ = snapshot.epochs()
            check = ShardCheck(snapshot, shard, self._shard_count, report)
            if progress is not None:
                progress(shard, 0, check.blocks)
            for chunk in check.chunks():
                if cache is not None:
                    cache.compare(chunk, epoch)
                if progress is not None:
                    progress(shard, chunk.first + chunk.count, check.blocks)
            if cache is not None:
                for page in _pages_of_deleted(snapshot):
                    cache.compare_deleted(page)

            facts = _ShardFacts(check.segments, snapshot.fences(), snapshot.epochs(), snapshot.prepared())

        if cache is not None:
            cache.settle()
        return facts

    def _cache_check(self, shard: int, report: Report) -> CacheCheck | None:
        if self._cache is None:
            return None
        return CacheCheck(
            self._cache,
            shard,
            report,
            fresh=lambda: self._reads.shard(shard),
            changing=self._reads.changing_segments,
            slugs=self._slugs,
            settle_s=self._settle_s,
            patches=self._patches,
        )

    def _patch_check(self, shard: int, report: Report) -> PatchCheck | None:
        if self._cache is None or self._patches is None:
            return None
        return PatchCheck(self._patches, shard, report, notes_kept_s=self._notes_kept_s)


def _pages_of_deleted(snapshot: CheckedShard) -> Iterator[Int64s]:
    last = 0
    while (page := snapshot.deleted_users(last, _DELETED_PAGE)).size:
        yield page
        last = int(page[-1])
