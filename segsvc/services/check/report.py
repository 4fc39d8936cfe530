"""The checker's report: each difference with an exact text, and how much was compared."""

from __future__ import annotations

from collections import Counter
from collections.abc import Iterable
from dataclasses import dataclass, field
from enum import Enum
from itertools import islice
from typing import Any, Final

DIFFERENCES_KEPT_MAX: Final = 100
"""Differences that are kept with their text; all are counted. One fault in a rule can cause a million differences."""


class Kind(Enum):
    """Kinds of differences; the values are the names in the JSON report."""

    BIT = "bit"
    BITS_ROW = "bits_row"
    DIRECTORY = "directory"
    SLOT = "slot"
    COUNTER = "counter"
    SEGMENT = "segment"
    OVERRIDE = "override"
    TOMBSTONE = "tombstone"
    WRONG_SHARD = "wrong_shard"
    FENCE = "fence"
    EPOCH = "epoch"
    PREPARED = "prepared"
    CACHE = "cache"


@dataclass(frozen=True, slots=True)
class Difference:
    """One difference between what is stored and what must be.

    Attributes:
        shard: the shard that has it; None: the catalog.
        where: the place of the difference, without the shard: ``segment checkout (7), user 42 (block 0, bit 41)``.
        found: what is stored: ``bit is 1``.
        expected: what must be stored: ``the rule says 0``.
    """

    kind: Kind
    shard: int | None
    where: str
    found: str
    expected: str

    def __str__(self) -> str:
        place = "catalog" if self.shard is None else f"shard {self.shard}"
        return f"{place}, {self.where}: {self.found}, {self.expected}"

    def to_json(self) -> dict[str, Any]:
        return {
            "kind": self.kind.value,
            "shard": self.shard,
            "where": self.where,
            "found": self.found,
            "expected": self.expected,
            "text": str(self),
        }


@dataclass(slots=True)
class Report:
    """What was compared and what differs.

    Attributes:
        users: existing users.
        segments: segments on the shards, each counted once.
        memberships: bits that are set.
        entries: cache entries that a reader would have used.
        differences: the first ``DIFFERENCES_KEPT_MAX`` differences.
        counts: the numbers of all differences, by kind.
        cache_checked: False: the caller left the cache out.
        duration_s: duration of the whole check.
    """

    users: int = 0
    segments: int = 0
    memberships: int = 0
    entries: int = 0
    differences: list[Difference] = field(default_factory=list)
    counts: Counter[Kind] = field(default_factory=Counter)
    cache_checked: bool = True
    duration_s: float = 0.0

    @property
    def total(self) -> int:
        """All differences, kept or not."""
        return self.counts.total()

    def add(self, kind: Kind, shard: int | None, where: str, found: str, expected: str) -> None:
        """Report one difference."""
        self.add_all(kind, 1, [Difference(kind, shard, where, found, expected)])

    def add_all(self, kind: Kind, count: int, differences: Iterable[Difference]) -> None:
        """Report ``count`` differences; those that are not kept need not be made."""
        if count:
            self.counts[kind] += count
        self.differences.extend(islice(differences, DIFFERENCES_KEPT_MAX - len(self.differences)))

    def to_json(self) -> dict[str, Any]:
        return {
            "ok": self.total == 0,
            "users": self.users,
            "segments": self.segments,
            "memberships": self.memberships,
            "entries": self.entries,
            "cache_checked": self.cache_checked,
            "duration_s": round(self.duration_s, 3),
            "difference_count": self.total,
            "difference_counts": {kind.value: count for kind, count in self.counts.items()},
            "differences": [difference.to_json() for difference in self.differences],
        }
