"""What is remembered of Kafka's topics: how far they were read, what was lost in them, which dead letters are done."""

from __future__ import annotations

from dataclasses import dataclass
from datetime import datetime


@dataclass(frozen=True, slots=True)
class EventPosition:
    """How far a partition was read.

    Attributes:
        topic_id: Kafka's own name of the topic, another one if the topic is made again; empty: it has none.
        next_offset: everything before it is finished.
    """

    topic: str
    partition: int
    topic_id: str
    next_offset: int


@dataclass(frozen=True, slots=True)
class EventLoss:
    """Events that Kafka dropped before they were read.

    Attributes:
        end_offset: behind the last of them; None: nobody knows.
        reason: how it came about, for people.
    """

    topic: str
    partition: int
    first_offset: int
    end_offset: int | None
    reason: str

    @property
    def count_max(self) -> int | None:
        """How many at most: markers of transactions and what compaction has taken are among the offsets."""
        return None if self.end_offset is None else self.end_offset - self.first_offset

    @property
    def offsets(self) -> str:
        """The range, for people."""
        if self.end_offset is None:
            return f"from {self.first_offset} on"
        return f"{self.first_offset} to {self.end_offset - 1}"


@dataclass(frozen=True, slots=True)
class FoundLoss:
    """A loss as it was noted."""

    id: int
    loss: EventLoss
    find_time: datetime
    acknowledge_time: datetime | None


Ranges = tuple[tuple[int, int], ...]
"""Offsets as half-open ranges, ascending, apart from each other."""


def covered(ranges: Ranges, start: int, end: int) -> int:
    """How many of the offsets from ``start`` up to, not including, ``end`` are in the ranges."""
    return sum(max(0, min(last, end) - max(first, start)) for first, last in ranges)


def contains(ranges: Ranges, offset: int) -> bool:
    """Whether an offset is in the ranges."""
    return any(first <= offset < last for first, last in ranges)
