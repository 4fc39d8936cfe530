"""How the bridge's consumer reads fetched data: nothing in one partition stops another partition.

This replaces the part of kafka-python 3.0.12 that decodes fetched data (``Fetcher``), since the library has no setting
for another way to read a batch. In the library, an error of one partition is raised out of ``poll``, again and again,
and stops all partitions. A test compares the methods that are replaced or relied on here with their text in 3.0.12.

Four things are different here:

- Batches are read by ``batches``: in bounded memory, and what cannot be read is reported in its place.
- Data that may be sound when fetched again is tried ``TRIES`` times, while its partition rests; then it is let go.
- An error that the broker returns for one partition makes that partition rest.
- A position that is reset is noted: events between the old position and the new one may be lost.
"""

from __future__ import annotations

import time
from collections.abc import Callable, Iterator, Mapping
from dataclasses import dataclass
from typing import Any, Final

from kafka import KafkaConsumer, TopicPartition
from kafka.consumer.fetcher import Fetcher
from kafka.errors import NoError, OffsetOutOfRangeError, for_code
from kafka.protocol.consumer import IsolationLevel
from kafka.record import MemoryRecords

from segsvc.bridge.batches import DAMAGED, FAULT, INFLATES, LARGE, Batch, Damaged, Record, Unreadable, batches_of
from segsvc.log import get_logger

log = get_logger(__name__)

TRIES: Final = 3
"""How often damaged data is fetched before it is let go: it may have been damaged on the way."""
REST_S: Final = 1.0
"""How long a partition rests between two tries, and after data that costs far more to read than to send."""
POLL_BYTES_MAX: Final = 32 * 1024 * 1024
"""Most inflated bytes that one poll takes, exceeded by one record at most."""


@dataclass(slots=True)
class _Standing:
    offset: int
    reason: str
    tries: int
    rests_until: float


class Trials:
    """Partitions that cannot go on, and how often each was tried."""

    def __init__(self, clock: Callable[[], float] = time.monotonic) -> None:
        self._clock = clock
        self._standing: dict[TopicPartition, _Standing] = {}
        self._rests: dict[TopicPartition, float] = {}
        self._let_go: dict[TopicPartition, int] = {}

    def failed(self, where: TopicPartition, offset: int, reason: str) -> bool:
        """Note data that cannot be read. Returns whether to let it go; if not, the partition rests and tries again."""
        now = self._clock()
        if self._let_go.get(where) == offset:
            return True  # it follows data that was let go just now: the same fault, which has had its tries

        known = self._standing.get(where)
        if known is None or known.offset != offset:
            known = self._standing[where] = _Standing(offset, reason, 0, 0.0)

        if now >= known.rests_until:
            known.tries += 1
            known.reason = reason
            known.rests_until = now + REST_S
            log.warning(
                "unreadable_for_now",
                topic=where.topic,
                partition=where.partition,
                offset=offset,
                reason=reason,
                attempt=known.tries,
                attempts_max=TRIES,
            )
        return known.tries >= TRIES

    def let_go(self, where: TopicPartition, then: int) -> None:
        """Data that could not be read was reported to the reader, which goes on at the offset ``then``."""
        self._standing.pop(where, None)
        self._let_go[where] = then

    def stands(self, where: TopicPartition, offset: int, reason: str) -> None:
        """The broker does not return a partition's data; the partition rests, and is tried again until it does."""
        self._standing[where] = _Standing(offset, reason, 0, self._clock() + REST_S)

    def given_out(self, where: TopicPartition) -> None:
        """The broker returns a partition's data; ends what ``stands`` noted."""
        known = self._standing.get(where)
        if known is not None and not known.tries:
            del self._standing[where]

    def rest(self, where: TopicPartition) -> None:
        """Leave a partition alone for a moment."""
        self._rests[where] = self._clock() + REST_S

    def read(self, where: TopicPartition) -> None:
        """A batch of the partition could be read."""
        self._standing.pop(where, None)
        self._let_go.pop(where, None)

    def forget(self, where: TopicPartition) -> None:
        """The partition is no longer ours."""
        self.read(where)
        self._rests.pop(where, None)

    @property
    def resting(self) -> set[TopicPartition]:
        """Partitions that are not to be fetched now."""
        now = self._clock()
        self._rests = {where: until for where, until in self._rests.items() if until > now}
        return {where for where, one in self._standing.items() if one.rests_until > now} | set(self._rests)

    @property
    def standing(self) -> Mapping[TopicPartition, tuple[int, str]]:
        """Offset and reason of each partition that cannot go on now."""
        return {where: (one.offset, one.reason) for where, one in self._standing.items()}


@dataclass(frozen=True, slots=True)
class Reset:
    """The client has reset a partition's position.

    Attributes:
        before: the position that the broker refused; None: there was none, since the group had no offset.
        to: the new position.
    """

    where: TopicPartition
    before: int | None
    to: int


_Fetcher: Any = Fetcher


class SafeFetcher(_Fetcher):  # type: ignore[misc]  # the stubs do not describe its inner state
    """See above. ``make_safe`` turns a consumer's own fetcher into this."""

    trials: Trials
    resets: list[Reset]
    _refused: dict[TopicPartition, int]
    _bytes_left: int

    class PartitionRecords(_Fetcher.PartitionRecords):  # type: ignore[misc]
        """Fetched data of one partition. ``batches`` reads it."""

        trials: Trials
        bytes_taken = 0
        """Inflated bytes that the last ``take`` has read."""

        def _unpack_records(self, tp: TopicPartition, records: Any, *_: Any) -> Iterator[Record | Unreadable]:
            batches = batches_of(records._buffer)  # noqa: SLF001
            batch: Batch | None = None
            while True:
                try:
                    batch = next(batches, None)
                    if batch is None:
                        break
                    yield from self._read(batch)
                except Damaged as error:
                    offset = self.next_fetch_offset
                    if not self.trials.failed(tp, offset, error.reason):
                        break
                    yield self._let_go(tp, _damaged(error, offset))
                    break  # the place where the next batch begins may be wrong, too: fetch again
                except Exception as error:
                    # A fault of ours or of a library, or no memory for now.
                    offset = self.next_fetch_offset
                    reason = f"reading it failed ({type(error).__name__})"
                    log.exception("batch_not_read", topic=tp.topic, partition=tp.partition, offset=offset)
                    if not self.trials.failed(tp, offset, reason):
                        break
                    through = max(offset, batch.last_offset) if batch is not None else offset
                    yield self._let_go(tp, Unreadable(offset, through, FAULT, reason, None, None, "batch", 0))
                    break
            self.drain()

        def _let_go(self, tp: TopicPartition, told: Unreadable) -> Unreadable:
            self.next_fetch_offset = told.through + 1
            self.trials.let_go(tp, self.next_fetch_offset)
            return told

        def _read(self, batch: Batch) -> Iterator[Record | Unreadable]:
            """The records of a batch that the consumer gets."""
            tp = self.topic_partition
            self.leader_epoch = batch.leader_epoch
            if batch.last_offset < self.next_fetch_offset:
                return  # the broker may begin before the requested offset

            if not (self._is_aborted(batch) or batch.is_control):
                for told in batch.records(self.next_fetch_offset):
                    if type(told) is Record:
                        self.bytes_read += len(told.value or b"") + len(told.key or b"") + len(told.headers)
                        self.next_fetch_offset = told.offset + 1
                    else:
                        assert isinstance(told, Unreadable)
                        self.bytes_read += told.size
                        self.next_fetch_offset = told.through + 1
                        if told.why in (INFLATES, LARGE):
                            self.trials.rest(tp)
                    yield told

            # After the last offset that the batch had when it was made, even if compaction removed its last events.
            self.next_fetch_offset = batch.last_offset + 1
            self.trials.read(tp)

        def _is_aborted(self, batch: Batch) -> bool:
            """Whether the batch belongs to a transaction that was aborted. Decided as in kafka-python."""
            if self.isolation_level != IsolationLevel.READ_COMMITTED or batch.producer_id < 0:
                return False
            self._consume_aborted_transactions_up_to(batch.last_offset)
            if batch.is_control:
                if batch.is_abort_marker:
                    self.aborted_producer_ids.discard(batch.producer_id)
                return False
            return batch.is_transactional and batch.producer_id in self.aborted_producer_ids

        def take(self, n: int | None = None) -> list[Record | Unreadable]:
            """The next records: at most ``n``, and at most ``POLL_BYTES_MAX`` bytes, exceeded by one record at most."""
            taken: list[Record | Unreadable] = []
            before = self.bytes_read

            for told in self.record_iterator:
                taken.append(told)
                if len(taken) == n or self.bytes_read - before >= POLL_BYTES_MAX:
                    break

            self.bytes_taken = self.bytes_read - before
            self.records_read += len(taken)
            return taken

    def fetched_records(self, *args: Any, **options: Any) -> Any:
        """As ``Fetcher.fetched_records``."""
        self._bytes_left = POLL_BYTES_MAX
        return super().fetched_records(*args, **options)

    def _append(self, drained: Any, part: Any, max_records: int, update_offsets: bool) -> int:
        part.bytes_taken = 0
        count: int = super()._append(drained, part, max_records, update_offsets)
        self._bytes_left -= part.bytes_taken
        # The returned count is taken off the number of records that this poll may still take; at zero the poll ends.
        return count if self._bytes_left > 0 else max_records

    def _parse_fetched_data(self, completed_fetch: Any) -> Any:
        where, data = completed_fetch.topic_partition, completed_fetch.partition_data
        error = for_code(data.error_code)  # type: ignore[no-untyped-call]
        if error is OffsetOutOfRangeError:
            self._refused[where] = completed_fetch.fetched_offset

        try:
            parsed = super()._parse_fetched_data(completed_fetch)
        except Exception as failure:  # noqa: BLE001  # any error concerns this partition alone
            if error is not NoError:
                reason = f"the broker does not give it out ({type(failure).__name__})"
                self.trials.stands(where, completed_fetch.fetched_offset, reason)
                return None
            # No batch of the data is whole. The reader finds the same, and handles it.
            parsed = self.PartitionRecords(
                completed_fetch.fetched_offset,
                where,
                MemoryRecords(data.records),
                isolation_level=self._isolation_level,
                on_drain=self._on_partition_records_drain,
            )

        if parsed is not None:
            parsed.trials = self.trials
            self.trials.given_out(where)
        return parsed

    def _reset_offset_if_needed(self, partition: TopicPartition, timestamp: Any, offset: int) -> None:
        due = self._subscriptions.is_assigned(partition) and self._subscriptions.is_offset_reset_needed(partition)
        super()._reset_offset_if_needed(partition, timestamp, offset)
        if due and not self._subscriptions.is_offset_reset_needed(partition):
            # The client's thread appends to this list and our thread empties it; each is one atomic step.
            self.resets.append(Reset(partition, self._refused.pop(partition, None), offset))


def _damaged(error: Damaged, offset: int) -> Unreadable:
    """The report for damaged data that is let go. Only offsets that a sound batch could have are passed over."""
    through = error.through
    if through is None or not offset <= through < offset + _OFFSETS_MAX:
        through = offset
    return Unreadable(offset, through, DAMAGED, error.reason, None, error.raw, "batch", error.size)


_OFFSETS_MAX: Final = 1_000_000
"""No batch has more records than this; a damaged batch that claims more is not believed."""


def make_safe(consumer: KafkaConsumer) -> SafeFetcher:
    """Make a new consumer read with the fetcher above."""
    fetcher: Any = consumer.__dict__["_fetcher"]
    # The library has no setting for the fetcher's class, and nothing was fetched yet.
    fetcher.__class__ = SafeFetcher
    fetcher.trials = Trials()
    fetcher.resets = []
    fetcher._refused = {}  # noqa: SLF001
    fetcher._bytes_left = POLL_BYTES_MAX  # noqa: SLF001
    safe: SafeFetcher = fetcher
    return safe
