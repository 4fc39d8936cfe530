"""Records as the bridge takes them out of what Kafka sends: offset, key and value, and nothing else made of them.

Kafka-python makes three objects and thirteen fields of each record, in a dozen calls: half of what the bridge did. Here
it still receives, checks and takes apart the batches, and knows which of them belong to transactions that were aborted;
only the records within a batch are read by the loop below.
"""

from __future__ import annotations

from collections.abc import Callable
from typing import Any

from kafka import TopicPartition
from kafka.consumer.fetcher import Fetcher
from kafka.errors import CorruptRecordError
from kafka.record.default_records import DefaultRecord, DefaultRecordBatch

Record = tuple[int, bytes | None, bytes | None]
"""Offset, key and value of one message."""


class PartitionRecords(Fetcher.PartitionRecords):
    """Records of one partition in one answer of the broker, in order. Takes the place of kafka-python's."""

    def __init__(self, fetch_offset: int, tp: TopicPartition, records: Any, *args: Any, **options: Any) -> None:
        self._waiting: list[Record] = []
        """What is left of the batch that was taken apart last."""
        self._batch_end = 0
        """The offset after that batch."""
        super().__init__(fetch_offset, tp, _WholeBatches(records), *args, **options)

    def take(self, n: int | None = None) -> list[Record]:
        """The next records, ``n`` of them or all that are left.

        Raises:
            KafkaError: a record is damaged. Those before it were given out.
        """
        taken: list[Record] = []
        while n is None or len(taken) < n:
            if not self._waiting and not self._take_batch(raises=not taken):
                break
            missing = None if n is None else n - len(taken)
            taken += self._waiting[:missing]
            self._waiting = [] if missing is None else self._waiting[missing:]
            # Where the next fetch begins: what waits may never be taken.
            self.next_fetch_offset = taken[-1][0] + 1 if self._waiting else self._batch_end
        return taken

    def _take_batch(self, *, raises: bool) -> bool:
        """Let the next batch wait; False: there is none, or none that can be read."""
        while True:
            try:
                batches = super().take(1)
            except Exception as error:
                if raises:
                    raise
                self._next_inline_exception = error  # kafka-python raises it at the next call
                return False
            if not batches:
                return False
            [batch] = batches
            self._batch_end = self.next_fetch_offset
            # A record by itself is of a format before Kafka 0.11, and was read by kafka-python.
            records = batch.value if isinstance(batch.value, list) else [(batch.offset, batch.key, batch.value)]
            # The first batch may begin before the offset that was asked for.
            self._waiting = [one for one in records if one[0] >= self.fetch_offset]
            if self._waiting:
                return True


class _WholeBatches:
    """Batches, each of which gives a single record for all of its own, whose value is the list of them."""

    def __init__(self, records: Any) -> None:
        self._records = records

    def next_batch(self) -> Any:
        batch: Any = self._records.next_batch()
        # What is read of a control batch, its marker, is kafka-python's affair.
        if isinstance(batch, DefaultRecordBatch) and not batch.is_control_batch:
            return _WholeBatch(batch)
        return batch


class _WholeBatch(DefaultRecordBatch):
    __slots__ = ()

    # What the stubs leave out.
    _buffer: bytearray
    _pos: int
    _maybe_uncompress: Callable[[], None]

    def __init__(self, batch: Any) -> None:
        super().__init__(batch._buffer)  # noqa: SLF001  # the bytes it was made of, which have no other name

    def __iter__(self) -> Any:
        self._maybe_uncompress()
        try:
            records = read_records(bytes(self._buffer), self._pos, self.records_count, self.base_offset)
        except (IndexError, ValueError) as error:
            raise CorruptRecordError(f"Found invalid record structure: {error!r}") from error
        whole = DefaultRecord(self.size_in_bytes, self.last_offset, self.max_timestamp, 0, None, records, [])
        return iter((whole,) if records else ())


def read_records(data: bytes, at: int, count: int, base_offset: int) -> list[Record]:
    """Records in Kafka's format 2, https://kafka.apache.org/documentation/#record.

    Args:
        data: uncompressed.
        at: where the first record begins; the last one ends with the data.
        base_offset: what their offsets are told from.

    Raises:
        IndexError, ValueError: this is something else.
    """
    records: list[Record] = []
    # Numbers have one byte or two, nearly always; with more of them, what is taken for the second is above 127. The
    # lowest bit is the sign: n stands for n / 2, and an odd one is negative.
    for _ in range(count):
        length = data[at]
        at += 1
        if length > 127:
            length, at = (length + (data[at] << 7) - 128, at + 1) if data[at] < 128 else _number(data, at - 1)
        end = at + (length >> 1)
        at += 1  # attributes, which no version of Kafka uses
        while data[at] > 127:  # the time
            at += 1
        delta = data[at + 1]
        at += 2
        if delta > 127:
            delta, at = (delta + (data[at] << 7) - 128, at + 1) if data[at] < 128 else _number(data, at - 1)
        size = data[at]
        at += 1
        if size > 127:
            size, at = (size + (data[at] << 7) - 128, at + 1) if data[at] < 128 else _number(data, at - 1)
        key = None if size & 1 else data[at : (at := at + (size >> 1))]
        size = data[at]
        at += 1
        if size > 127:
            size, at = (size + (data[at] << 7) - 128, at + 1) if data[at] < 128 else _number(data, at - 1)
        value = None if size & 1 else data[at : (at := at + (size >> 1))]
        # Headers are passed over; without any there is a byte of 0, and the record must end there.
        if at >= end or delta & 1 or (data[at] == 0) != (at + 1 == end):
            raise ValueError(f"a record of {length >> 1} bytes ends elsewhere")
        at = end
        records.append((base_offset + (delta >> 1), key, value))
    if at != len(data):
        raise ValueError(f"{len(data) - at} bytes after the last record")
    return records


def _number(data: bytes, at: int) -> tuple[int, int]:
    """A variable-length number as it is written, sign last, and where it ends."""
    value, shift = 0, 0
    while True:
        byte = data[at]
        at += 1
        value |= (byte & 127) << shift
        if byte < 128:
            return value, at
        shift += 7
        if shift >= 64:
            raise ValueError("a number of more than 64 bits")
