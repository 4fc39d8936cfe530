"""Dead letters for people: read from ``<topic>.dlq``, sent again to the topic that they came from, or dismissed.

Reading joins no group and moves no offset. The catalog knows which letters are *done*: sent again or dismissed.
Sending again is as harmless as any redelivery: users' events end in the same state however often they come. An event
that still cannot be applied becomes a new dead letter, in place of the one that is done.
"""

from __future__ import annotations

from collections.abc import Iterator, Sequence
from dataclasses import dataclass
from datetime import UTC, datetime
from typing import Final

from kafka import TopicPartition
from kafka.errors import KafkaError

from segsvc.bridge.batches import Record, Unreadable, headers_of
from segsvc.bridge.clients import Message, Sender
from segsvc.bridge.dead_letters import (
    BYTES_HEADER,
    CONTENT_HEADER,
    EVENT,
    OFFSET_HEADER,
    PARTITION_HEADER,
    REASON_HEADER,
    SUFFIX,
)
from segsvc.bridge.kafka_state import KafkaState
from segsvc.config import Settings
from segsvc.domain.event_records import Ranges, contains
from segsvc.domain.events import TOPICS
from segsvc.postgres.catalog.event_records import PostgresEventRecords

GROUP_SUFFIX: Final = "-dead-letters"
"""Ends the name of the group that identifies this reader in the brokers' logs. The group has no members and no
offsets."""
_POLL_MS: Final = 500
_SEND_AT_ONCE: Final = 500


@dataclass(frozen=True, slots=True)
class Letter:
    """One dead letter.

    Attributes:
        id: ``<topic>/<partition>/<offset>`` in the dead-letter topic, the suffix left out.
        topic: where the event came from, and where it is sent again.
        origin: ``partition/offset`` in that topic; empty if the headers do not have it.
        raw: the event's bytes; None: it had none.
        content: what ``raw`` is: ``event``, or ``record``, ``batch`` or ``key`` as they were on the wire.
        size: how many bytes it had; None: ``raw`` has them all.
        done: whether it was sent again or dismissed.
    """

    id: str
    topic: str
    time: datetime
    reason: str
    origin: str
    key: bytes | None
    raw: bytes | None
    content: str = EVENT
    size: int | None = None
    done: bool = False

    @property
    def whole(self) -> bool:
        """Whether the letter has the whole event: only such a letter can be sent again."""
        return self.size is None and self.content == EVENT


KAFKA_ERRORS: Final = (KafkaError, OSError)
"""What a box raises while the brokers cannot be reached, or refuse."""


class LetterNotFound(Exception):
    """There is no such letter: it never existed, or the topic's retention has dropped it."""


@dataclass(frozen=True, slots=True)
class _Part:
    """Letters of one partition: from the offset ``start`` up to, not including, ``end``, and which of them are done."""

    where: TopicPartition
    topic_id: str
    start: int
    end: int
    done: Ranges

    def open_runs(self, most: int) -> Iterator[tuple[int, int]]:
        """Offsets that are not done, as half-open ranges of at most ``most`` offsets."""
        start = self.start
        for first, last in (*self.done, (self.end, self.end)):
            while start < min(first, self.end):
                stop = min(first, self.end, start + most)
                yield start, stop
                start = stop
            start = max(start, last)


class DeadLetterBox:
    """The dead letters of all topics. Connects when made.

    Raises:
        KafkaError, OSError: from any method, the brokers cannot be reached.
        ServiceError: from any method, the catalog cannot be reached.
    """

    def __init__(self, settings: Settings, records: PostgresEventRecords) -> None:
        self._prefix = settings.kafka_topic_prefix
        self._records = records
        group = {"kafka_group": settings.kafka_group + GROUP_SUFFIX}
        self._kafka = KafkaState(settings.model_copy(update=group), _SEND_AT_ONCE)
        self._sender = Sender(settings)

    def close(self) -> None:
        self._sender.close()
        self._kafka.close()

    def letters(self, *, only_new: bool = False) -> Iterator[Letter]:
        """All letters that exist now, topic by topic and partition by partition, oldest first.

        Args:
            only_new: leave out those that are done.
        """
        for part in self._parts():
            for first, end in part.open_runs(1 << 62) if only_new else [(part.start, part.end)]:
                yield from self._read(part, first, end)

    def letter(self, letter_id: str) -> Letter:
        """The letter with this id. Raises LetterNotFound."""
        part, offset = self._place(letter_id)
        for letter in self._read(part, offset, offset + 1):
            return letter
        raise LetterNotFound(letter_id)

    def retry(self, letter: Letter) -> bool:
        """Send a letter again to the topic that it came from, and note that it is done.

        The note follows the broker's acknowledgement: a letter may be sent twice, and is never left out.

        Returns:
            Whether the broker has taken it.
        """
        if not self._sender.send(self._prefix + letter.topic, [(letter.key, letter.raw, [])])[0]:
            return False
        self.dismiss(letter)
        return True

    def retry_all(self) -> Iterator[tuple[int, int, int]]:
        """Send all whole letters that are not done. Yields (sent so far, left out so far, all) as it goes.

        Raises:
            OSError: the broker did not take a letter; the batches before it are sent and noted.
        """
        parts = self._parts()
        total = sum(end - first for part in parts for first, end in part.open_runs(1 << 62))

        sent = left_out = 0
        for part in parts:
            topic = part.where.topic.removesuffix(SUFFIX)
            for first, end in part.open_runs(_SEND_AT_ONCE):
                letters = [letter for letter in self._read(part, first, end) if letter.whole]
                batch: list[Message] = [(letter.key, letter.raw, []) for letter in letters]
                if batch and not all(self._sender.send(topic, batch)):
                    raise OSError(f"{topic}: the broker did not take a letter ({self._sender.failure})")

                for one, behind in _runs([int(letter.id.rpartition("/")[2]) for letter in letters]):
                    self._note_done(part, one, behind)
                sent += len(letters)
                left_out += end - first - len(letters)
                yield sent, left_out, total

    def dismiss(self, letter: Letter) -> None:
        """Note that a letter is done."""
        part, offset = self._place(letter.id)
        self._note_done(part, offset, offset + 1)

    def dismiss_all(self) -> int:
        """Note that all letters that exist now are done. Returns how many of them were not done before."""
        count = 0
        for part in self._parts():
            count += sum(end - first for first, end in part.open_runs(1 << 62))
            self._note_done(part, part.start, part.end)
        return count

    def _note_done(self, part: _Part, first: int, end: int) -> None:
        self._records.note_letters_done(part.where.topic, part.topic_id, part.where.partition, first, end)

    def _place(self, letter_id: str) -> tuple[_Part, int]:
        """The part and the offset of a letter. Raises LetterNotFound."""
        topic, _, place = letter_id.partition("/")
        number, _, offset = place.partition("/")
        if topic in TOPICS and number.isdecimal() and offset.isdecimal():
            wanted = TopicPartition(self._prefix + topic + SUFFIX, int(number))
            for part in self._parts():
                if part.where == wanted and part.start <= int(offset) < part.end:
                    return part, int(offset)
        raise LetterNotFound(letter_id)

    def _parts(self) -> list[_Part]:
        """Each partition that has letters."""
        found: list[_Part] = []
        for topic in self._kafka.letter_topics():
            ranges = self._kafka.ranges(self._kafka.partitions([topic]))
            topic_id = self._kafka.topic_id(topic)
            done = self._records.letters_done(topic, topic_id)
            found += [
                _Part(where, topic_id, start, end, done.get(where.partition, ()))
                for where, (start, end) in ranges.items()
                if start < end
            ]
        return found

    def _read(self, part: _Part, start: int, end: int) -> Iterator[Letter]:
        consumer, where = self._kafka.consumer, part.where
        consumer.assign([where])
        consumer.seek(where, start)
        while (consumer.position(where) or 0) < end:
            for record in consumer.poll(timeout_ms=_POLL_MS).get(where, ()):
                if record.offset >= end:
                    return
                yield self._letter(part, record)

    def _letter(self, part: _Part, record: Record | Unreadable) -> Letter:
        topic = part.where.topic.removeprefix(self._prefix).removesuffix(SUFFIX)
        letter_id = f"{topic}/{part.where.partition}/{record.offset}"
        done = contains(part.done, record.offset)

        if isinstance(record, Unreadable):  # not a letter that the bridge wrote
            reason = f"the letter cannot be read: {record.reason}"
            epoch = datetime.fromtimestamp(0, UTC)
            return Letter(
                letter_id, topic, epoch, reason, "", record.key, record.value, record.content, record.size, done
            )

        headers = headers_of(record.headers)
        partition, offset = headers.get(PARTITION_HEADER, ""), headers.get(OFFSET_HEADER, "")
        size = headers.get(BYTES_HEADER, "")
        return Letter(
            id=letter_id,
            topic=topic,
            time=datetime.fromtimestamp(max(0, record.timestamp) / 1000, UTC),
            reason=headers.get(REASON_HEADER, "not said"),
            origin=f"{partition}/{offset}" if partition else "",
            key=record.key,
            raw=record.value,
            content=headers.get(CONTENT_HEADER, EVENT),
            size=int(size) if size.isdecimal() else None,
            done=done,
        )


def _runs(offsets: Sequence[int]) -> Iterator[tuple[int, int]]:
    """Ascending offsets as half-open ranges."""
    start = 0
    for index in range(1, len(offsets) + 1):
        if index == len(offsets) or offsets[index] != offsets[index - 1] + 1:
            yield offsets[start], offsets[index - 1] + 1
            start = index
