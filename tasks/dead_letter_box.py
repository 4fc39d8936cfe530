"""Dead letters as people look at them: read from ``<topic>.dlq``, and sent once more to where they came from.

Reading takes part in no group and moves nothing. Sending again is harmless as any redelivery is: users' events end in
the same state however often they come. What is still unreadable becomes a new dead letter.
"""

from __future__ import annotations

from collections.abc import Iterator, Sequence
from dataclasses import dataclass
from datetime import UTC, datetime
from typing import Any, Final

from kafka import KafkaConsumer, TopicPartition
from kafka.structs import OffsetAndMetadata

from segsvc.config import Settings
from segsvc.domain.events import TOPICS
from tasks.dead_letters import SUFFIX
from tasks.kafka_clients import Message, Sender, make_consumer

GROUP_SUFFIX: Final = "-dead-letters"
"""Of the group whose offsets say what ``retry --all`` has sent already; nobody consumes in it."""
_POLL_MS: Final = 500
_SEND_AT_ONCE: Final = 500


@dataclass(frozen=True, slots=True)
class Letter:
    """One dead letter.

    Attributes:
        id: ``<topic>/<partition>/<offset>`` in the dead-letter topic, the suffix left out.
        topic: where the event came from, and goes to again.
        origin: ``partition/offset`` in that topic; empty if the headers do not say it.
        raw: the event's bytes; None: it had none.
    """

    id: str
    topic: str
    time: datetime
    reason: str
    origin: str
    key: bytes | None
    raw: bytes | None


class LetterNotFound(Exception):
    """There is no such letter: never was, or the topic's retention has dropped it."""


class DeadLetterBox:
    """The dead letters of all topics. Connects when made.

    Raises:
        KafkaError, OSError: from any method, the brokers cannot be reached.
    """

    def __init__(self, settings: Settings) -> None:
        self._prefix = settings.kafka_topic_prefix
        box_settings = settings.model_copy(update={"kafka_group": settings.kafka_group + GROUP_SUFFIX})
        self._consumer: KafkaConsumer = make_consumer(box_settings, _SEND_AT_ONCE)
        self._sender = Sender(settings)

    def close(self) -> None:
        self._sender.close()
        self._consumer.close(autocommit=False)

    def letters(self, *, only_new: bool = False) -> Iterator[Letter]:
        """All letters there are now, topic by topic and partition by partition, oldest first.

        Args:
            only_new: leave out what ``retry_all`` has sent already.
        """
        for partition, start, end in self._ranges(only_new=only_new):
            yield from self._read(partition, start, end)

    def letter(self, letter_id: str) -> Letter:
        """Raises LetterNotFound."""
        topic, _, place = letter_id.partition("/")
        number, _, offset = place.partition("/")
        if topic in TOPICS and number.isdigit() and offset.isdigit():
            wanted = TopicPartition(self._prefix + topic + SUFFIX, int(number))
            for partition, start, end in self._ranges(only_new=False):
                if partition == wanted and start <= int(offset) < end:
                    for letter in self._read(partition, int(offset), int(offset) + 1):
                        return letter
        raise LetterNotFound(letter_id)

    def retry(self, letters: Sequence[Letter]) -> list[bool]:
        """Send letters once more to the topics that they came from; which of them the broker has."""
        outcomes: list[bool] = []
        for letter in letters:
            outcomes += self._sender.send(self._prefix + letter.topic, [(letter.key, letter.raw, [])])
        return outcomes

    def retry_all(self) -> Iterator[tuple[int, int]]:
        """Send everything that this has not sent before: (sent so far, all) as it goes.

        Noted after the broker's acknowledgement: a letter may be sent twice, and is never left out.

        Raises:
            KafkaError: the broker did not take a letter; those before it are sent and noted.
        """
        ranges = self._ranges(only_new=True)
        total = sum(end - start for _, start, end in ranges)
        sent = 0
        for partition, start, end in ranges:
            topic = partition.topic.removesuffix(SUFFIX)
            for first in range(start, end, _SEND_AT_ONCE):
                last = min(end, first + _SEND_AT_ONCE)
                batch: list[Message] = [(letter.key, letter.raw, []) for letter in self._read(partition, first, last)]
                if not all(self._sender.send(topic, batch)):
                    raise OSError(f"{topic}: the broker did not take a letter ({self._sender.failure})")
                self._consumer.commit({partition: OffsetAndMetadata(last, "", -1)})
                sent += last - first
                yield sent, total

    def _ranges(self, *, only_new: bool) -> list[tuple[TopicPartition, int, int]]:
        """(partition, first offset, offset after the last) of each partition that has letters."""
        partitions = [
            TopicPartition(topic, number)
            for topic in (self._prefix + name + SUFFIX for name in TOPICS)
            for number in sorted(self._consumer.partitions_for_topic(topic) or ())
        ]
        if not partitions:
            return []
        starts = self._consumer.beginning_offsets(partitions)
        ends = self._consumer.end_offsets(partitions)
        found = []
        for partition in partitions:
            start, end = int(starts[partition]), int(ends[partition])
            if only_new:
                start = max(start, int(self._consumer.committed(partition) or 0))
            if start < end:
                found.append((partition, start, end))
        return found

    def _read(self, partition: TopicPartition, start: int, end: int) -> Iterator[Letter]:
        self._consumer.assign([partition])
        self._consumer.seek(partition, start)
        while (self._consumer.position(partition) or 0) < end:
            for record in self._consumer.poll(timeout_ms=_POLL_MS).get(partition, ()):
                if record.offset >= end:
                    return
                yield self._letter(record)

    def _letter(self, record: Any) -> Letter:
        headers = {name: value.decode("utf-8", "replace") for name, value in record.headers or ()}
        topic = record.topic.removeprefix(self._prefix).removesuffix(SUFFIX)
        partition, offset = headers.get("segsvc-partition", ""), headers.get("segsvc-offset", "")
        return Letter(
            id=f"{topic}/{record.partition}/{record.offset}",
            topic=topic,
            time=datetime.fromtimestamp(record.timestamp / 1000, UTC),
            reason=headers.get("segsvc-reason", "not said"),
            origin=f"{partition}/{offset}" if partition else "",
            key=record.key,
            raw=record.value,
        )
