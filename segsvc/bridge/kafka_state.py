"""What the brokers report about topics and about the bridge's group, read without joining the group."""

from __future__ import annotations

import time
from collections.abc import Iterable, Mapping, Sequence
from dataclasses import dataclass
from typing import Any, Final

from kafka import TopicPartition

from segsvc.bridge.batches import Record
from segsvc.bridge.clients import GroupConsumer, make_consumer
from segsvc.bridge.dead_letters import SUFFIX
from segsvc.config import Settings
from segsvc.domain.event_records import EventPosition, Ranges, covered
from segsvc.domain.events import TOPICS

_POLL_MS: Final = 100


@dataclass(frozen=True, slots=True)
class PartitionState:
    """One partition, and the group's position in it.

    Attributes:
        start: the first offset that still exists.
        stable_end: the offset after the last message that may be read: an open transaction begins there, or the
            partition ends.
        committed: the offset where the group goes on; None: it has none.
    """

    where: TopicPartition
    start: int
    stable_end: int
    committed: int | None

    @property
    def lag(self) -> int:
        """Messages that may be read and are not finished."""
        return max(0, self.stable_end - max(self.start, self.committed or 0))


class KafkaState:
    """Reads the state from the brokers. Used by one thread.

    Raises:
        KafkaError, OSError: from any method, the brokers cannot be reached.
    """

    def __init__(self, settings: Settings, poll_records: int = 1, *, read_uncommitted: bool = False) -> None:
        self._prefix = settings.kafka_topic_prefix
        self.consumer: GroupConsumer = make_consumer(settings, poll_records, read_uncommitted=read_uncommitted)

    def close(self) -> None:
        self.consumer.close(autocommit=False)

    def refresh(self) -> None:
        """Learn which topics exist now."""
        self.consumer.topics()

    def topic_id(self, topic: str) -> str:
        """Kafka's own id of a topic. A topic of the same name that is made later has a different id.

        Empty: the brokers have no such ids, or there is no such topic.
        """
        cluster: Any = self.consumer.__dict__["_cluster"]
        return str(cluster.topic_id(topic) or "")

    def partitions(self, topics: Iterable[str]) -> list[TopicPartition]:
        """The partitions of these topics; topics that do not exist are left out."""
        return [
            TopicPartition(topic, number)
            for topic in topics
            for number in sorted(self.consumer.partitions_for_topic(topic) or ())
        ]

    def ranges(self, partitions: Sequence[TopicPartition]) -> dict[TopicPartition, tuple[int, int]]:
        """For each partition: the first offset that exists, and the offset after the last message that may be read."""
        if not partitions:
            return {}
        starts = self.consumer.beginning_offsets(partitions)
        ends = self.consumer.end_offsets(partitions)
        return {where: (int(starts[where]), int(ends[where])) for where in partitions}

    def committed(self, where: TopicPartition) -> int | None:
        """The offset where the group goes on; None: it has none."""
        offset = self.consumer.committed(where)
        return None if offset is None else int(offset)

    def states(self, partitions: Sequence[TopicPartition]) -> list[PartitionState]:
        """How far the group is in these partitions."""
        # Committed first: events finished in between make the lag look larger than it is, never smaller than 0.
        committed = {where: self.committed(where) for where in partitions}
        return [
            PartitionState(where, start, end, committed[where])
            for where, (start, end) in self.ranges(partitions).items()
        ]

    def read(
        self, starts: Mapping[TopicPartition, int], ends: Mapping[TopicPartition, int], within_s: float
    ) -> dict[TopicPartition, int]:
        """The number of messages in these ranges, without markers and gaps, as far as the time allows.

        Returns:
            the number for each partition; a partition that could not be read to its end is left out.
        """
        counts = dict.fromkeys(starts, 0)
        self.consumer.assign(list(starts))
        for where, offset in starts.items():
            self.consumer.seek(where, offset)

        deadline = time.monotonic() + within_s
        unread = set(starts)
        while unread and time.monotonic() < deadline:
            for where, records in self.consumer.poll(timeout_ms=_POLL_MS).items():
                counts[where] += sum(record.offset < ends[where] for record in records)
            positions = self.consumer.positions()
            unread = {where for where in unread if positions.get(where, 0) < ends[where]}

        return {where: count for where, count in counts.items() if where not in unread}

    def first_time(self, where: TopicPartition, offset: int, within_s: float) -> float | None:
        """When the first message from this offset on was written, in seconds since 1970; None: there is none."""
        self.consumer.assign([where])
        self.consumer.seek(where, offset)
        deadline = time.monotonic() + within_s
        while time.monotonic() < deadline:
            for record in self.consumer.poll(timeout_ms=_POLL_MS).get(where, ()):
                if isinstance(record, Record):
                    return record.timestamp / 1000
        return None

    def event_topics(self) -> dict[str, str]:
        """The topics of user events: name on the brokers → name in the contract."""
        return {self._prefix + topic: topic for topic in TOPICS}

    def letter_topics(self) -> dict[str, str]:
        """The topics of dead letters: name on the brokers → the contract's name of their events' topic."""
        return {self._prefix + topic + SUFFIX: topic for topic in TOPICS}

    def letters_waiting(self, topic: str, done: Mapping[int, Ranges]) -> int:
        """Number of letters in a dead-letter topic that were neither sent again nor dismissed.

        Args:
            done: for each partition, the offsets of the letters that were sent again or dismissed.
        """
        return sum(
            end - start - covered(done.get(where.partition, ()), start, end)
            for where, (start, end) in self.ranges(self.partitions([topic])).items()
        )


def position(where: TopicPartition, topic_id: str, next_offset: int) -> EventPosition:
    return EventPosition(where.topic, where.partition, topic_id, next_offset)
