"""What the catalog records of Kafka's topics: how far they were read, and what they wait for; lost events; dead letters
that are done."""

from __future__ import annotations

from dataclasses import dataclass
from datetime import datetime
from enum import StrEnum
from typing import Self


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


class WaitFor(StrEnum):
    """The kinds of things that a bridge waits for. ``segsvc doctor`` advises by them; they are kept in the catalog."""

    SHARD = "shard"
    FLOW = "flow"
    """The events of one topic and shard."""
    FAULTS = "faults"
    """Workers that do not fail on every event."""
    BROKER = "broker"
    KAFKA = "kafka"
    MESSAGE = "message"
    """A message in Kafka that cannot be read now."""
    DEAD_LETTERS = "dead-letters"
    DEAD_LETTER_SIZE = "dead-letter-size"
    CATALOG = "catalog"
    OTHER = "other"


@dataclass(frozen=True, slots=True, order=True)
class Wait:
    """Something that a bridge waits for.

    Attributes:
        words: what it is, for people, and different for each: ``shard 2``.
        topic: the only topic whose events wait for it; empty: events of any topic may.
    """

    kind: WaitFor
    words: str
    topic: str = ""

    def __str__(self) -> str:
        return self.words

    @property
    def code(self) -> str:
        """As the catalog keeps it. No name of a topic has a ``|`` in it."""
        return f"{self.kind.value}|{self.topic}|{self.words}"

    @classmethod
    def from_code(cls, code: str) -> Self:
        """What the catalog keeps. A text without a kind that we know, of another release, is of the kind OTHER."""
        kind, _, rest = code.partition("|")
        topic, separator, words = rest.partition("|")
        if not separator or kind not in set(WaitFor):
            return cls(WaitFor.OTHER, code)
        return cls(WaitFor(kind), words, topic)
