"""What the catalog records of Kafka's topics: how far they were read, lost events, dead letters that are done."""

from __future__ import annotations

from dataclasses import dataclass
from datetime import datetime


@dataclass(frozen=True, slots=True)
class EventPosition:
    """How far a partition was read.

    Attributes:
        topic_id: Kafka's own id of the topic, a new one if the topic is created again; empty: the topic has none.
        next_offset: all messages before it are finished.
    """

    topic: str
    partition: int
    topic_id: str
    next_offset: int


@dataclass(frozen=True, slots=True)
class EventLoss:
    """Events that Kafka dropped before they were read.

    Attributes:
        end_offset: one after the last of them; None: not known.
        reason: how the loss came about, for people.
    """

    topic: str
    partition: int
    first_offset: int
    end_offset: int | None
    reason: str

    @property
    def count_max(self) -> int | None:
        """Upper bound of the lost events: transaction markers and messages removed by compaction have offsets, too."""
        return None if self.end_offset is None else self.end_offset - self.first_offset

    @property
    def offsets(self) -> str:
        """The range, for people."""
        if self.end_offset is None:
            return f"from {self.first_offset} on"
        return f"{self.first_offset} to {self.end_offset - 1}"


@dataclass(frozen=True, slots=True)
class FoundLoss:
    """A loss as the catalog recorded it."""

    id: int
    loss: EventLoss
    find_time: datetime
    acknowledge_time: datetime | None


Ranges = tuple[tuple[int, int], ...]
"""Offsets as half-open ranges, ascending and separate from each other."""


def covered(ranges: Ranges, start: int, end: int) -> int:
    """How many of the offsets from ``start`` up to, not including, ``end`` are in the ranges."""
    return sum(max(0, min(last, end) - max(first, start)) for first, last in ranges)


def contains(ranges: Ranges, offset: int) -> bool:
    """Whether an offset is in the ranges."""
    return any(first <= offset < last for first, last in ranges)
