"""Statistics of a segment, counted on all shards at once."""

from __future__ import annotations

from typing import Protocol

from segsvc.domain.errors import segment_not_found
from segsvc.domain.segment import Segment
from segsvc.domain.statistics import SegmentStatistics, ShardStatistics
from segsvc.fan_out import ThreadFanOut
from segsvc.services.segments import SegmentService


class ShardCounter(Protocol):
    """The shards, as far as counting a segment needs them."""

    @property
    def shard_count(self) -> int: ...

    def count(self, shard: int, segment_id: int, *, timeout_s: float | None) -> ShardStatistics:
        """Raises SHARD_UNAVAILABLE, DEADLINE_EXCEEDED."""


class StatisticsService:
    """Counts a segment.

    Args:
        fan_out: visits the shards; its threads bound how many statements run at once.
    """

    def __init__(self, segments: SegmentService, counter: ShardCounter, fan_out: ThreadFanOut) -> None:
        self._segments = segments
        self._counter = counter
        self._fan_out = fan_out

    def get(self, slug: str, *, timeout_s: float | None = None) -> SegmentStatistics:
        """Count the segment on every shard, now.

        Raises:
            ServiceError: SEGMENT_NOT_FOUND, FIELD_REQUIRED, FIELD_INVALID, CATALOG_UNAVAILABLE, SHARD_UNAVAILABLE
                (one shard that does not answer is enough: half a count would be a wrong count), DEADLINE_EXCEEDED.
        """
        segment = self._segments.get(slug, timeout_s=timeout_s)
        shards = self._fan_out(
            lambda shard: self._counter.count(shard, segment.id, timeout_s=timeout_s),
            range(self._counter.shard_count),
        )
        if not all(shard.known for shard in shards):
            require_same(self._segments, segment, timeout_s)
        return SegmentStatistics(segment, shards)


def require_same(segments: SegmentService, segment: Segment, timeout_s: float | None) -> None:
    """Called when a shard does not know a segment that the catalog knew.

    Either the segment was deleted meanwhile, or its creation is not yet committed on this shard (or its deletion
    already is). In the second case the catalog still has it, and on this shard it has no members.

    Raises:
        ServiceError: SEGMENT_NOT_FOUND in the first case.
    """
    if segments.get(segment.slug, timeout_s=timeout_s).uid != segment.uid:
        raise segment_not_found(segment.slug)
