"""Reads batches of records as a broker sends them, in bounded memory, whatever they contain.

Kafka-python inflates a batch whole, copies each record several times, and raises at the first byte that it cannot
read; nothing after that byte is ever read again. Here a batch is inflated piece by piece, a large record is skipped
except for its beginning, and what cannot be read is *reported*, in the order of the offsets, so that the reader can let
it go and read on. Headers are not checked: no event needs them, so none can be wrong.

What a batch looks like: https://kafka.apache.org/documentation/#messageformat
"""

from __future__ import annotations

import struct
from collections.abc import Iterator
from typing import Any, Final

import msgspec
from kafka.errors import CorruptRecordError, UnsupportedCodecError
from kafka.record.default_records import DefaultRecordBatch
from kafka.record.legacy_records import LegacyRecordBatch
from kafka.record.util import calc_crc32c, decode_varint

from segsvc.bridge.codecs import Garbled, Inflated, TooLarge, inflate, slices
from segsvc.domain.event_limits import EVENT_BYTES_MAX

RECORD_BYTES_MAX: Final = 1_048_588
"""A larger record is not taken into memory. No event is that large, and by default no topic takes more."""
PREFIX_BYTES_MAX: Final = EVENT_BYTES_MAX
"""How much is kept, for the dead letter, of a record that is too large or cannot be read."""

_LENGTH_AT: Final = 8
_FRAME_BYTES: Final = 12
_MAGIC_AT: Final = 16
_LEGACY_MIN: Final = 14
_HEADER: Final = DefaultRecordBatch.HEADER_STRUCT
_HEADER_BYTES: Final = _HEADER.size
_CRC_FROM: Final = DefaultRecordBatch.ATTRIBUTES_OFFSET
_CODEC_MASK: Final = DefaultRecordBatch.CODEC_MASK
_LOG_APPEND_TIME: Final = DefaultRecordBatch.TIMESTAMP_TYPE_MASK
_TRANSACTIONAL: Final = DefaultRecordBatch.TRANSACTIONAL_MASK
_CONTROL: Final = DefaultRecordBatch.CONTROL_MASK
_VARINT_BYTES_MAX: Final = 10

DAMAGED: Final = "damaged"
CODEC: Final = "codec"
INFLATES: Final = "inflates"
RECORD: Final = "record"
LARGE: Final = "too-large"
FAULT: Final = "fault"
"""Why something could not be read, as labels of the metric: the batch's frame or checksum is wrong; its codec is
unknown or its data is not of that codec; it inflates to too much; a record in it is no record; a record is larger than
any event may be; reading it met a fault of ours."""


class Record(msgspec.Struct, gc=False):
    """One message. ``key``, ``value``: None: it has none. ``headers``: as on the wire; see ``headers_of``."""

    offset: int
    timestamp: int
    key: bytes | None
    value: bytes | None
    headers: bytes = b"\0"


class Unreadable(msgspec.Struct, gc=False):
    """Messages that cannot be read, or a single one that is too large to be taken into memory.

    Attributes:
        offset, through: the first and the last of these messages; if ``through`` is before ``offset``, it concerns no
            message, but a fault in the batch.
        why: one of the constants above.
        reason: what is wrong, for people.
        key, value: what could be read; only the beginning of a large one.
        content: what ``value`` is: ``event`` (the message's value), ``record`` or ``batch`` (as on the wire).
        size: how many bytes it had.
    """

    offset: int
    through: int
    why: str
    reason: str
    key: bytes | None
    value: bytes | None
    content: str
    size: int


class Damaged(Exception):
    """A batch whose frame or checksum is wrong: damaged on its way or on the disk. Another fetch may bring it sound.

    Attributes:
        through: its last offset; None: it is not known.
        raw: the beginning of its bytes.
        size: how many bytes there are.
    """

    def __init__(self, reason: str, through: int | None, raw: bytes, size: int) -> None:
        super().__init__(reason)
        self.reason = reason
        self.through = through
        self.raw = raw
        self.size = size


class Batch:
    """One batch, its frame and checksum checked.

    Raises:
        Damaged: they are wrong.
    """

    def __init__(self, raw: memoryview) -> None:
        self.raw = raw
        self.magic: int = struct.unpack_from(">b", raw, _MAGIC_AT)[0]
        if self.magic == 2:
            self._read_header(raw)
        elif self.magic in (0, 1):
            self._read_legacy_header(raw)
        else:
            raise _damaged(raw, f"its format has the number {self.magic}, and 0 to 2 are known")

    def _read_header(self, raw: memoryview) -> None:
        if len(raw) < _HEADER_BYTES:
            raise _damaged(raw, "it is shorter than the header of a batch")

        (
            self.base_offset,
            _,
            self.leader_epoch,
            _,
            crc,
            self._attributes,
            delta,
            self._first_timestamp,
            self._max_timestamp,
            self.producer_id,
            _,
            _,
            self.count,
        ) = _HEADER.unpack_from(raw)

        self.last_offset: int = self.base_offset + delta
        if calc_crc32c(raw[_CRC_FROM:]) != crc:  # type: ignore[no-untyped-call]
            # Any of its numbers may be wrong. Two that agree are taken as right; then no sound record is passed over.
            raise _damaged(raw, "its checksum is wrong", self.last_offset if self.count == delta + 1 else None)
        if delta < 0:
            raise _damaged(raw, f"its last offset lies {-delta} before its first")

    def _read_legacy_header(self, raw: memoryview) -> None:
        self.leader_epoch = -1
        self.producer_id = -1
        self._attributes = 0

        try:
            self._legacy = LegacyRecordBatch(raw, self.magic)
            well = self._legacy.validate_crc()  # type: ignore[no-untyped-call]
        except (AssertionError, struct.error, IndexError) as error:
            raise _damaged(raw, f"it is no message of the old format ({type(error).__name__})") from None

        # For a compressed message of the old format this is the last offset; otherwise it is the only one.
        self.base_offset = self.last_offset = self._legacy.base_offset
        if not well:
            raise _damaged(raw, "its checksum is wrong", self.last_offset)

    @property
    def is_transactional(self) -> bool:
        return bool(self._attributes & _TRANSACTIONAL)

    @property
    def is_control(self) -> bool:
        """Whether it is a marker of the broker, which no consumer gets."""
        return bool(self._attributes & _CONTROL)

    @property
    def is_abort_marker(self) -> bool:
        """For a control batch: whether it aborts a transaction."""
        for record in self.records(self.base_offset):
            if isinstance(record, Record) and record.key is not None and len(record.key) >= 4:
                return bool(struct.unpack_from(">h", record.key, 2)[0] == 0)
        return False

    def records(self, start: int) -> Iterator[Record | Unreadable]:
        """The messages from the offset ``start`` on, in order; what cannot be read is reported in its place."""
        return _LegacyRecords(self, self._legacy).read(start) if self.magic < 2 else _Records(self).read(start)

    def contents(self) -> Inflated:
        """The bytes of the records."""
        body = self.raw[_HEADER_BYTES:]
        codec = self._attributes & _CODEC_MASK
        return inflate(body, codec) if codec else slices(body)

    def timestamp(self, delta: int) -> int:
        """Milliseconds since 1970 of a record."""
        return int(self._max_timestamp if self._attributes & _LOG_APPEND_TIME else self._first_timestamp + delta)

    def unreadable(self, offset: int, why: str, reason: str) -> Unreadable:
        """All messages of this batch from ``offset`` on."""
        raw = bytes(self.raw[:PREFIX_BYTES_MAX])
        return Unreadable(offset, self.last_offset, why, reason, None, raw, "batch", len(self.raw))


def _damaged(raw: memoryview, reason: str, through: int | None = None) -> Damaged:
    return Damaged(f"the batch is damaged: {reason}", through, bytes(raw[:PREFIX_BYTES_MAX]), len(raw))


def batches_of(data: bytes | memoryview) -> Iterator[Batch]:
    """The batches that a broker has sent together. The last one may be cut off, and is then left out.

    Raises:
        Damaged: the next batch is damaged. Unless only its checksum is wrong, it is unknown where later batches begin.
    """
    raw = memoryview(data)
    position = 0

    while len(raw) - position > _MAGIC_AT:
        length = struct.unpack_from(">i", raw, position + _LENGTH_AT)[0]
        end = position + _FRAME_BYTES + length
        if length < _LEGACY_MIN:
            raise _damaged(raw[position:], f"its length is said to be {length} bytes")
        if end > len(raw):
            break
        yield Batch(raw[position:end])
        position = end

    if not position and raw:
        raise _damaged(raw, "it is said to be longer than all that the broker has sent")


class _Window:
    """Bytes that come piece by piece, as far as they are needed now."""

    def __init__(self, pieces: Inflated) -> None:
        self._pieces = pieces
        self.bytes = b""

    def from_(self, position: int, wanted: int) -> bool:
        """Drop the bytes before ``position``; then read until there are ``wanted`` bytes. Returns whether there are."""
        parts = [self.bytes[position:]]
        size = len(parts[0])
        while size < wanted:
            piece = next(self._pieces, None)
            if piece is None:
                break
            parts.append(piece)
            size += len(piece)
        self.bytes = b"".join(parts)
        return size >= wanted

    def skip(self, position: int, count: int) -> bool:
        """Drop the bytes before ``position`` and the next ``count`` bytes. Returns whether there were that many."""
        left = count - (len(self.bytes) - position)
        while left > 0:
            piece = next(self._pieces, None)
            if piece is None:
                return False
            self.bytes = piece
            position, left = 0, left - len(piece)
            if left <= 0:
                self.bytes = piece[len(piece) + left :]
                return True
        self.bytes = self.bytes[position + count :]
        return True


class _NoRecord(Exception):
    """The bytes between two sound bounds are not a record."""


class _Records:
    """Reads the records of one batch."""

    def __init__(self, batch: Batch) -> None:
        self._batch = batch
        self._window = _Window(batch.contents())
        self._next = batch.base_offset
        """The lowest offset that the next record may have."""

    def read(self, start: int) -> Iterator[Record | Unreadable]:
        """See ``Batch.records``."""
        self._start = start
        batch = self._batch
        try:
            yield from self._read_records()
            more = self._window.from_(0, 1)
        except TooLarge as error:
            yield batch.unreadable(max(self._next, start), INFLATES, str(error))
        except Garbled as error:
            yield batch.unreadable(max(self._next, start), error.why, str(error))
        else:
            if more:
                reason = f"the batch has {len(self._window.bytes)} bytes or more behind its {batch.count} records"
                yield batch.unreadable(max(self._next, start), RECORD, reason)

    def _read_records(self) -> Iterator[Record | Unreadable]:
        window, batch, start = self._window, self._batch, self._start
        last_offset = batch.last_offset
        position = 0
        buffer = window.bytes

        for _ in range(batch.count):
            if len(buffer) - position < _VARINT_BYTES_MAX:
                window.from_(position, _VARINT_BYTES_MAX)
                buffer, position = window.bytes, 0

            length, position = _length(buffer, position)
            if length > RECORD_BYTES_MAX:
                large = self._large(position, length)
                buffer, position = window.bytes, 0
                if large.through >= start:
                    yield large
                if large.why == INFLATES:
                    return  # everything after it is let go with it
                continue

            if len(buffer) - position < length:
                if not window.from_(position, length):
                    raise Garbled(RECORD, "the batch ends within a record")
                buffer, position = window.bytes, 0

            end = position + length
            told: Record | Unreadable
            try:
                told = _record(batch, buffer, position, end)
            except _NoRecord as error:
                # Its bounds are sound, so later records can be read. A batch's offsets have no gaps when it is made.
                raw = buffer[position:end][:PREFIX_BYTES_MAX]
                told = Unreadable(self._next, self._next, RECORD, str(error), None, raw, "record", length)

            offset = told.offset
            if not self._next <= offset <= last_offset:
                raise Garbled(RECORD, f"a record of the batch says that its offset is {offset}")
            position = end
            self._next = offset + 1
            if offset >= start:
                yield told

        window.bytes = buffer[position:]

    def _large(self, position: int, length: int) -> Unreadable:
        """Pass over a large record. Raises TooLarge, Garbled."""
        window = self._window
        window.from_(position, min(length, 3 * PREFIX_BYTES_MAX))
        told = _beginning(self._batch, window.bytes, length)

        if not self._next <= told.offset <= self._batch.last_offset:
            raise Garbled(RECORD, f"a record of the batch says that its offset is {told.offset}")

        try:
            if not window.skip(0, length):
                raise Garbled(RECORD, "the batch ends within a record")
        except TooLarge as error:
            # The record is known, and is let go with everything after it.
            told.through, told.why, told.reason = self._batch.last_offset, INFLATES, f"{told.reason}; {error}"
            window.bytes = b""

        self._next = told.through + 1
        return told


def _length(buffer: bytes, position: int) -> tuple[int, int]:
    """The length of the record that begins here, and the position after the length."""
    try:
        length, position = decode_varint(buffer, position)
    except (IndexError, ValueError):
        raise Garbled(
            RECORD, "the batch ends before the last of its records, or the length of one is no number"
        ) from None
    if length < 0:
        raise Garbled(RECORD, f"the length of a record is said to be {length} bytes")
    return length, position


def _record(batch: Batch, buffer: bytes, position: int, end: int) -> Record:
    """The record in these bytes, after its length. This is the hot path of all events. Raises _NoRecord."""
    try:
        timestamp_delta, position = decode_varint(buffer, position + 1)
        offset_delta, position = decode_varint(buffer, position)
        size, position = decode_varint(buffer, position)
        key = None
        if size >= 0:
            key = buffer[position : position + size]
            position += size
        size, position = decode_varint(buffer, position)
        value = None
        if size >= 0:
            value = buffer[position : position + size]
            position += size
    except (IndexError, ValueError):
        raise _NoRecord("the record is none: a length in it is no number") from None

    if position > end:
        raise _NoRecord("the record is none: its key or value is said to be longer than it")
    return Record(batch.base_offset + offset_delta, batch.timestamp(timestamp_delta), key, value, buffer[position:end])


def _beginning(batch: Batch, buffer: bytes, length: int) -> Unreadable:
    """The report on a large record, from its beginning after its length. Raises Garbled."""
    try:
        _, position = decode_varint(buffer, 1)
        offset_delta, position = decode_varint(buffer, position)
        key_size, position = decode_varint(buffer, position)
        key = buffer[position : position + key_size][:PREFIX_BYTES_MAX] if key_size >= 0 else None
        position += max(0, key_size)
        offset = batch.base_offset + offset_delta

        if key_size > EVENT_BYTES_MAX:
            reason = f"key: must be at most {EVENT_BYTES_MAX} bytes, is {key_size}"
            return Unreadable(offset, offset, LARGE, reason, None, key, "key", key_size)
        value_size, position = decode_varint(buffer, position)
    except (IndexError, ValueError):
        raise Garbled(RECORD, "a large record of the batch is none: a length in it is no number") from None

    value = buffer[position : position + value_size][:PREFIX_BYTES_MAX] if value_size >= 0 else None
    if value_size <= EVENT_BYTES_MAX:
        reason = f"headers: the message must be at most {RECORD_BYTES_MAX} bytes with its headers, is {length}"
    else:
        reason = f"event: must be at most {EVENT_BYTES_MAX} bytes, is {value_size}"
    return Unreadable(offset, offset, LARGE, reason, key, value, "event", max(0, value_size))


class _LegacyRecords:
    """Reads a message of the formats before Kafka 0.11, which a very old topic may still hold."""

    def __init__(self, batch: Batch, legacy: Any) -> None:
        self._batch = batch
        self._legacy = legacy

    def read(self, start: int) -> Iterator[Record | Unreadable]:
        """See ``Batch.records``."""
        batch, legacy = self._batch, self._legacy
        try:
            if legacy.compression_type:
                self._inflate()
            for record in legacy:
                if record.offset < start:
                    continue
                size = len(record.value or b"") + len(record.key or b"")
                if size > RECORD_BYTES_MAX:
                    reason = f"event: must be at most {EVENT_BYTES_MAX} bytes, is {size}"
                    value = (record.value or b"")[:PREFIX_BYTES_MAX]
                    yield Unreadable(record.offset, record.offset, LARGE, reason, None, value, "event", size)
                else:
                    yield Record(record.offset, record.timestamp or 0, record.key, record.value)
                start = record.offset + 1
        except TooLarge as error:
            yield batch.unreadable(start, INFLATES, str(error))
        except Garbled as error:
            yield batch.unreadable(start, error.why, str(error))
        except (
            CorruptRecordError,
            UnsupportedCodecError,
            AssertionError,
            struct.error,
            IndexError,
            ValueError,
        ) as error:
            yield batch.unreadable(
                start, RECORD, f"the message of the old format cannot be read ({type(error).__name__})"
            )

    def _inflate(self) -> None:
        """Put the inflated messages where kafka-python 3.0.12 would put them itself, however large they are."""
        key_at = self._legacy.KEY_OFFSET_V1 if self._batch.magic else self._legacy.KEY_OFFSET_V0
        raw = self._batch.raw
        key_size = struct.unpack_from(">i", raw, key_at)[0]
        value_at = key_at + 4 + max(0, key_size)
        value_size = struct.unpack_from(">i", raw, value_at)[0]
        if value_size < 0:
            raise Garbled(RECORD, "the compressed message has no value")

        pieces: list[bytes] = []
        size = 0
        for piece in inflate(raw[value_at + 4 : value_at + 4 + value_size], self._legacy.compression_type):
            pieces.append(piece)
            size += len(piece)
            if size > LEGACY_BYTES_MAX:
                raise TooLarge(f"the batch inflates to more than {LEGACY_BYTES_MAX:,} bytes")

        self._legacy._buffer = memoryview(b"".join(pieces))  # noqa: SLF001
        self._legacy._decompressed = True  # noqa: SLF001


LEGACY_BYTES_MAX: Final = 16 * 1024 * 1024
"""A batch of an old format is inflated as a whole, so it may be no larger than this."""


def headers_of(raw: bytes) -> dict[str, str]:
    """The headers of a message as text, whatever their bytes are; only the headers that can be read."""
    found: dict[str, str] = {}
    try:
        count, position = decode_varint(raw, 0)
        for _ in range(count):
            size, position = decode_varint(raw, position)
            name = raw[position : position + size].decode("utf-8", "replace")
            size, position = decode_varint(raw, position + size)
            found[name] = raw[position : position + max(0, size)].decode("utf-8", "replace")
            position += max(0, size)
    except (IndexError, ValueError):
        return found
    return found
