"""The bridge reads the records that kafka-python reads, and takes them as it does."""

from __future__ import annotations

import random
from typing import Any

import pytest
from hypothesis import example, given
from hypothesis import strategies as st
from kafka import TopicPartition
from kafka.consumer.fetcher import Fetcher
from kafka.errors import CorruptRecordError
from kafka.record import MemoryRecords
from kafka.record.default_records import DefaultRecordBatch
from kafka.record.memory_records import MemoryRecordsBuilder

from tasks.kafka_records import PartitionRecords, read_records

WHERE = TopicPartition("create-user", 0)
GZIP = 1

sizes = st.sampled_from([0, 1, 63, 64, 65, 127, 128, 8191, 8192, 20_000])
contents = st.one_of(st.none(), st.binary(max_size=5), sizes.map(bytes))
times = st.sampled_from([0, 1, 63, 64, 10**6, 10**12])
messages = st.tuples(contents, contents, times, st.lists(st.tuples(st.text(max_size=3), contents), max_size=2))
batches = st.lists(messages, min_size=1, max_size=5)


def encoded(batches: list[list[Any]], *, magic: int = 2, compression: int = 0, gap: int = 0) -> bytes:
    """Batches as a broker sends them, ``gap`` offsets between each two."""
    offset, parts = 0, []
    for messages in batches:
        builder: Any = MemoryRecordsBuilder(magic, compression, 1 << 24)
        for key, value, time, headers in messages:
            builder.append(timestamp=1_700_000_000_000 + time, key=key, value=value, headers=headers)
        builder.close()
        data = bytearray(builder.buffer())
        data[:8] = offset.to_bytes(8, "big")  # not part of the checksum
        offset += len(messages) + gap
        parts.append(bytes(data))
    return b"".join(parts)


def theirs(data: bytes, fetch_offset: int = 0) -> Any:
    library: Any = Fetcher
    return library.PartitionRecords(fetch_offset, WHERE, MemoryRecords(data))


def ours(data: bytes, fetch_offset: int = 0) -> Any:
    cls: Any = PartitionRecords
    return cls(fetch_offset, WHERE, MemoryRecords(data))


@given(st.lists(batches, max_size=4), st.integers(0, 12), st.integers(0, 2), st.sampled_from([0, GZIP]), st.randoms())
def test_the_same_records_however_many_are_taken_at_once(
    batches: list[list[Any]], fetch_offset: int, gap: int, compression: int, sizes: random.Random
) -> None:
    data = encoded(batches, gap=gap, compression=compression)
    expected = [(record.offset, record.key, record.value) for record in theirs(data, fetch_offset).take()]
    assert ours(data, fetch_offset).take() == expected
    records, taken = ours(data, fetch_offset), []
    while records:
        size = sizes.randint(1, 4)
        some = records.take(size)
        assert len(some) <= size
        taken += some
        # Whoever begins anew from here gets the others.
        assert taken + ours(data, records.next_fetch_offset).take() == expected
    assert taken == expected


def test_where_the_next_fetch_begins_when_all_is_taken() -> None:
    data = encoded([[(None, b"v", 0, [])] * 3] * 2, gap=5)
    for records in (theirs(data), ours(data)):
        while records:
            records.take(4)
        assert records.next_fetch_offset == 8 + 3


def test_many_records_in_one_batch() -> None:
    batch = [(str(n).encode(), b"x" * (n % 200), n, []) for n in range(20_000)]
    taken = ours(encoded([batch])).take()
    assert taken == [(n, str(n).encode(), b"x" * (n % 200)) for n in range(20_000)]


def test_records_of_a_format_before_headers_came() -> None:
    data = encoded([[(b"k", b"v", 0, []), (None, None, 1, [])]], magic=1)
    assert ours(data).take() == [(record.offset, record.key, record.value) for record in theirs(data).take()]


def test_a_batch_that_was_damaged_on_the_way_is_not_read_and_those_before_it_are() -> None:
    good, other = [(b"k", b"1", 0, [])], [(b"k", b"2", 0, [])]
    data = bytearray(encoded([good, other]))
    data[-3] ^= 1
    records = ours(bytes(data))
    assert records.take(10) == [(0, b"k", b"1")]
    with pytest.raises(CorruptRecordError, match="crc"):
        records.take(10)


@given(batches, st.integers(0), st.integers(0, 255))
@example([(b"k", b"v", 0, [])], 0, 0)
def test_what_is_no_record_is_refused_or_read_as_kafka_python_reads_it(batch: list[Any], at: int, byte: int) -> None:
    data = bytearray(encoded([batch]))
    header: Any = DefaultRecordBatch
    body = data[header.HEADER_STRUCT.size :]
    body[at % len(body)] = byte
    data[header.HEADER_STRUCT.size :] = body
    try:
        read = read_records(bytes(body), 0, len(batch), 0)
    except (IndexError, ValueError):
        return
    if byte > 127:
        return  # kafka-python takes the attributes, a single byte, for a number that may go on
    library: Any = DefaultRecordBatch(bytes(data))
    try:
        expected = [(record.offset, record.key, record.value) for record in library]
    except (CorruptRecordError, UnicodeDecodeError):
        return  # headers, which are passed over here
    assert read == expected
