"""Batches as a broker may send them: sound records are read, unreadable ones reported in place, in bounded memory."""

from __future__ import annotations

import random
import struct
import tracemalloc
import zlib
from collections.abc import Sequence

import pytest
import zstandard
from kafka.record.memory_records import MemoryRecordsBuilder

from segsvc.bridge.batches import PREFIX_BYTES_MAX, Damaged, Record, Unreadable, batches_of, headers_of
from segsvc.bridge.codecs import INFLATED_BYTES_MAX
from tests import kafka_raw as raw

CODECS = [0, raw.GZIP, raw.SNAPPY, raw.LZ4, raw.ZSTD]
EVENTS = [b'{"user_id": %d}' % number for number in range(1, 6)]


def read(data: bytes, start: int = 0) -> list[Record | Unreadable]:
    return [told for batch in batches_of(data) for told in batch.records(start)]


def values(told: Sequence[Record | Unreadable]) -> list[tuple[int, bytes | None]]:
    return [(one.offset, one.value) for one in told if isinstance(one, Record)]


def only(told: Sequence[Record | Unreadable]) -> Unreadable:
    [found] = [one for one in told if isinstance(one, Unreadable)]
    return found


@pytest.mark.parametrize("codec", CODECS)
def test_every_codec_is_read(codec: int) -> None:
    data = raw.event_batch(EVENTS, codec=codec, base=7) + raw.event_batch([None, b"x" * 90_000], codec=codec, base=12)
    assert values(read(data)) == [*enumerate(EVENTS, 7), (12, None), (13, b"x" * 90_000)]
    assert values(read(data, start=10)) == [(10, EVENTS[3]), (11, EVENTS[4]), (12, None), (13, b"x" * 90_000)]
    assert values(read(data[:-1])) == [*enumerate(EVENTS, 7)]  # the broker has cut off the last batch


@pytest.mark.parametrize("codec", CODECS[:4])
@pytest.mark.parametrize("magic", [0, 1, 2])
def test_what_kafka_python_writes_is_read(codec: int, magic: int) -> None:
    if magic == 0 and codec == raw.LZ4:
        pytest.skip("it has no library for that")
    builder = MemoryRecordsBuilder(magic, codec, 1 << 20)
    for number, event in enumerate(EVENTS):
        builder.append(1_700_000_000_000 + number, b"key", event, [])
    builder.close()
    told = read(bytes(builder.buffer()))
    assert values(told) == [*enumerate(EVENTS)]
    if magic:
        assert [one.timestamp for one in told if isinstance(one, Record)] == [1_700_000_000_000 + n for n in range(5)]


def test_headers_are_not_looked_at_and_cannot_be_wrong() -> None:
    records = raw.record(0, b"a", headers=[(b"\xff\xfe", b"x"), (b"name", b"v")]) + raw.record(1, b"b")
    told = read(raw.batch(records, 2))
    assert values(told) == [(0, b"a"), (1, b"b")]
    assert isinstance(told[0], Record)
    assert headers_of(told[0].headers) == {"��": "x", "name": "v"}
    assert headers_of(b"\x08junk") == {}


@pytest.mark.parametrize(
    ("body", "codec"),
    [
        (b"no gzip at all", raw.GZIP),
        (b"", raw.GZIP),
        (raw.COMPRESS[raw.GZIP](b"x" * 5000)[:-20], raw.GZIP),
        (raw.XERIAL + struct.pack(">i", 1 << 30), raw.SNAPPY),
        (b"\xff\xff\xff\xff\x0f", raw.SNAPPY),
        (b"no frame", raw.LZ4),
        (raw.COMPRESS[raw.LZ4](random.Random(1).randbytes(9000))[:12], raw.LZ4),
        (b"no frame", raw.ZSTD),
        (b"anything", 5),
        (b"anything", 7),
    ],
    ids=[
        "gzip-none",
        "gzip-empty",
        "gzip-short",
        "snappy-block",
        "snappy-claim",
        "lz4-none",
        "lz4-short",
        "zstd-none",
        "codec-5",
        "codec-7",
    ],
)
def test_data_of_no_codec(body: bytes, codec: int) -> None:
    data = raw.batch(b"", 3, base=4, codec=codec, body=body) + raw.event_batch(EVENTS[:1], base=7)
    told = read(data)
    assert values(told) == [(7, EVENTS[0])]
    gone = only(told)
    assert (gone.offset, gone.through, gone.why, gone.content) == (4, 6, "codec", "batch")
    assert gone.value == data[: gone.size]


def test_data_that_ends_too_early_gives_what_is_before() -> None:
    records = b"".join(raw.record(delta, b"y" * 3000) for delta in range(1000))
    body = zstandard.ZstdCompressor().compress(records)
    told = read(raw.batch(b"", 1000, codec=raw.ZSTD, body=body[: len(body) // 2]))
    assert told[-1] == only(told)
    assert values(told) == [(offset, b"y" * 3000) for offset in range(len(told) - 1)]
    assert (only(told).offset, only(told).through) == (len(told) - 1, 999)


@pytest.mark.parametrize("codec", CODECS)
def test_a_large_record_leaves_its_beginning_and_those_behind_it(codec: int) -> None:
    large = b"[" + b" " * (70_000_000 if codec == raw.GZIP else 20_000_000) + b"]"
    records = raw.record(0, b"a") + raw.record(1, large, key=b"7") + raw.record(2, b"b")
    data = raw.batch(records, 3, codec=codec)
    del records

    tracemalloc.start()
    told = read(data)
    _, peak = tracemalloc.get_traced_memory()
    tracemalloc.stop()

    assert peak < 12_000_000
    assert values(told) == [(0, b"a"), (2, b"b")]
    gone = only(told)
    assert (gone.offset, gone.through, gone.why, gone.content, gone.key) == (1, 1, "too-large", "event", b"7")
    assert gone.value == large[:PREFIX_BYTES_MAX]
    assert gone.size == len(large)
    assert gone.reason == f"event: must be at most 65536 bytes, is {len(large)}"


def bomb(codec: int, size: int) -> bytes:
    """A record of that size, compressed piece by piece: it is never whole in memory."""
    zeros = bytes(1 << 20)
    head = b"\0" + raw.varint(0) + raw.varint(0) + raw.sized(b"k") + raw.varint(size)
    length = len(head) + size + 1
    compressor = zlib.compressobj(wbits=31) if codec == raw.GZIP else zstandard.ZstdCompressor().compressobj()
    parts = [compressor.compress(raw.varint(length) + head)]
    parts += [compressor.compress(zeros) for _ in range(size >> 20)]
    parts += [compressor.compress(b"\0"), compressor.flush()]
    return b"".join(parts)


@pytest.mark.parametrize("codec", [raw.GZIP, raw.ZSTD])
def test_a_batch_that_inflates_to_too_much_is_let_go_in_bounded_memory(codec: int) -> None:
    size = 200 << 20
    data = raw.batch(b"", 5, codec=codec, body=bomb(codec, size)) + raw.event_batch(EVENTS[:1], base=5)

    tracemalloc.start()
    told = read(data)
    _, peak = tracemalloc.get_traced_memory()
    tracemalloc.stop()

    assert peak < 12_000_000
    assert values(told) == [(5, EVENTS[0])]
    gone = only(told)
    assert (gone.offset, gone.through, gone.why, gone.size) == (0, 4, "inflates", size)
    assert gone.value == bytes(PREFIX_BYTES_MAX)
    assert gone.reason.endswith(f"the batch inflates to more than {INFLATED_BYTES_MAX} bytes")


def test_a_record_that_is_none_between_sound_bounds_is_alone() -> None:
    wrong = raw.sized(b"\0" + raw.varint(0) + raw.varint(1) + raw.varint(1000) + b"key")
    told = read(raw.batch(raw.record(0, b"a") + wrong + raw.record(2, b"b"), 3))
    assert values(told) == [(0, b"a"), (2, b"b")]
    gone = only(told)
    assert (gone.offset, gone.through, gone.why, gone.content) == (1, 1, "record", "record")
    assert gone.value == wrong[1:]


@pytest.mark.parametrize(
    ("data", "sound", "gone"),
    [
        # The batch claims more records than it has, or fewer.
        (raw.event_batch(EVENTS, stored=9), 5, (5, 4)),
        (raw.event_batch(EVENTS, stored=9, last_delta=8), 5, (5, 8)),
        (raw.event_batch(EVENTS, stored=3, last_delta=4), 3, (3, 4)),
        (raw.event_batch(EVENTS, stored=0), 0, (0, 4)),
        (raw.event_batch(EVENTS, stored=-1), 0, (0, 4)),
        # Other bytes follow the records.
        (raw.batch(raw.record(0, EVENTS[0]) + b"junk", 1), 1, (1, 0)),
        (raw.batch(raw.record(0, EVENTS[0]) + b"junk", 1, codec=raw.LZ4), 1, (1, 0)),
        # Offsets outside the range of the batch, or not rising.
        (raw.batch(raw.record(0, EVENTS[0]) + raw.record(9, b""), 2), 1, (1, 1)),
        (raw.batch(raw.record(0, EVENTS[0]) + raw.record(0, b""), 2), 1, (1, 1)),
        (raw.batch(raw.record(0, EVENTS[0]) + raw.record(-3, b""), 2), 1, (1, 1)),
        # Invalid lengths.
        (raw.batch(raw.record(0, EVENTS[0]) + raw.varint(-5) + b"junk", 2), 1, (1, 1)),
        (raw.batch(raw.record(0, EVENTS[0]) + raw.varint(1 << 40) + b"junk", 2), 1, (1, 1)),
        (raw.batch(raw.record(0, EVENTS[0]) + b"\xff" * 20, 2), 1, (1, 1)),
    ],
    ids=[
        "more",
        "more-offsets",
        "fewer",
        "none",
        "negative",
        "behind",
        "behind-lz4",
        "far-offset",
        "same-offset",
        "lower-offset",
        "negative-length",
        "long",
        "no-number",
    ],
)
def test_batches_that_lie(data: bytes, sound: int, gone: tuple[int, int]) -> None:
    told = read(data)
    assert values(told) == [*enumerate(EVENTS[:sound])]
    assert (only(told).offset, only(told).through) == gone
    assert only(told).why == "record"


@pytest.mark.parametrize("at", [12, 20, 23, 61, 80, -1])
def test_bytes_that_were_damaged_on_their_way(at: int) -> None:
    """The checksum covers all but the offset, the length, the epoch and the format's number."""
    data = bytearray(raw.event_batch(EVENTS, base=3))
    data[at] ^= 0x55
    if at == 12:  # the epoch: it is not used
        assert values(read(bytes(data))) == [*enumerate(EVENTS, 3)]
        return

    with pytest.raises(Damaged) as error:
        read(bytes(data))
    # The batch's own numbers are used where two of them agree.
    assert error.value.through == (None if at == 23 else 7)
    assert error.value.raw == data


@pytest.mark.parametrize("length", [-1, -100, 0, 13, 1 << 30])
def test_a_length_that_is_none(length: int) -> None:
    data = bytearray(raw.event_batch(EVENTS))
    data[8:12] = struct.pack(">i", length)
    with pytest.raises(Damaged) as error:
        read(bytes(data))
    assert error.value.through is None


def test_any_damage_is_reported_and_never_raised() -> None:
    """Random bytes in a batch with a valid checksum: each offset is read or reported as damaged; nothing is raised."""
    luck = random.Random(20)
    for round_ in range(600):
        codec = luck.choice([*CODECS, 5, 6])
        body = bytearray(raw.COMPRESS.get(codec, bytes)(b"".join(raw.record(n, b"v" * n) for n in range(20))))
        for _ in range(luck.randint(1, 4)):
            body[luck.randrange(len(body))] = luck.randrange(256)
        data = raw.batch(b"", 20, codec=codec, body=bytes(body), base=100)

        reached = 99
        for told in read(data):
            assert told.offset > reached, round_
            reached = max(reached, told.through if isinstance(told, Unreadable) else told.offset)
        assert reached == 119, round_
