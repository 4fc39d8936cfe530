"""Segment ids as slugs. Entries hold ids, answers hold slugs."""

from __future__ import annotations

import threading
from collections.abc import Callable, Iterable, Mapping
from typing import Final, TypeVar

from segsvc.log import get_logger

log = get_logger(__name__)

T = TypeVar("T")

_READS_MAX: Final = 3


class SlugMap:
    """Which slug a segment id stands for. Only ever grows: an id is never reused and keeps its slug for life.

    Safe for any number of threads. Ids are the same on all shards, so one map serves them all; it is filled from a
    shard that used an id which is not known yet.

    Args:
        load: reads the (id, slug) pairs of a shard.
        encode: makes of a slug the bytes that the hot path needs.
    """

    def __init__(
        self, load: Callable[[int], Mapping[int, str]], encode: Callable[[str], bytes] = lambda slug: slug.encode()
    ) -> None:
        self._load = load
        self._encode = encode
        # One lock for each shard: a shard that hangs must not keep the map from learning other shards' new segments.
        self._locks: dict[int, threading.Lock] = {}
        self._slugs: dict[int, str] = {}
        self.encoded: dict[int, bytes] = {}
        """id -> encoded slug, for the hot path; absent: not known, use ``learn``."""

    @property
    def slug(self) -> Callable[[int], str]:
        """Segment id -> slug. Raises KeyError for an unknown id. (The hot path calls it: no Python step is between.)"""
        return self._slugs.__getitem__

    def unknown(self, segment_ids: Iterable[int]) -> set[int]:
        """Those of the ids that the map does not know."""
        return {segment_id for segment_id in segment_ids if segment_id not in self._slugs}

    def learn(self, shard: int, segment_ids: Iterable[int]) -> set[int]:
        """Fill the map from a shard unless it knows these ids. Returns the ids that the shard does not know either.

        Raises:
            ServiceError: the shard cannot be read.
        """
        with self._locks.setdefault(shard, threading.Lock()):
            # Checked under the lock: if many threads meet a new segment, one loads it and the rest find it in the map.
            missing = self.unknown(segment_ids)
            if not missing:
                return missing
            for segment_id, slug in self._load(shard).items():
                self.encoded[segment_id] = self._encode(slug)
                # Last: an id counts as known once this map has it, and then its encoded slug must be there.
                self._slugs[segment_id] = slug
        return self.unknown(missing)

    def read_named(
        self, shard: int, read: Callable[[], T], segment_ids: Callable[[T], Iterable[int]]
    ) -> tuple[T, set[int]]:
        """Read something from a shard, and learn the slugs of all segments in it.

        A segment that was deleted between the two reads has no slug. Leaving it out would mix two moments in one
        answer, so the first read is made again, and then finds the shard without that segment.

        Returns:
            What was read, and ids to leave out: bits that belong to no segment, which is damage that the checker
            reports. It is logged, and does not keep the rest from being answered.

        Raises:
            ServiceError: the shard cannot be read.
        """
        for _ in range(_READS_MAX):
            result = read()
            without_slug = self.unknown(segment_ids(result))
            if without_slug:
                without_slug = self.learn(shard, without_slug)
            if not without_slug:
                return result, without_slug
        log.error("bits_without_segment", shard=shard, segment_ids=sorted(without_slug))
        return result, without_slug

    def in_slug_order(self, segment_ids: Iterable[int]) -> list[int]:
        """Known ids, sorted by their slugs. Raises KeyError for an unknown one."""
        return sorted(segment_ids, key=self._slugs.__getitem__)
