"""Kafka's codecs, inflated piece by piece: the inflated size of a few kilobytes is not known beforehand.

Kafka-python inflates a batch in one step, whatever its inflated size. The libraries are imported here and not where a
batch needs them: an installation that lacks one must fail when it starts, not treat good events as unreadable.
"""

from __future__ import annotations

import struct
import zlib
from collections.abc import Callable, Iterator, Mapping
from typing import Any, Final

import lz4.frame
import snappy
import zstandard

INFLATED_BYTES_MAX: Final = 128 * 1024 * 1024
"""Largest inflated size of a batch. A producer builds a batch of at most ``max.request.size``, usually 1 MB."""
PIECE_BYTES: Final = 1024 * 1024

_FEED_BYTES: Final = 16 * 1024
_GZIP_OR_NOT: Final = 31
_GZIP_MAGIC: Final = b"\x1f\x8b"
_ZSTD_WINDOW_MAX: Final = 1 << 27
"""The window that zstd's highest level needs, and the default limit of its decoder."""
_XERIAL_MAGIC: Final = b"\x82SNAPPY\0"
_XERIAL_HEADER_BYTES: Final = 16
_SNAPPY_RATIO_MAX: Final = 22
"""Three bytes of snappy inflate to at most 64 bytes, so a block that claims a higher ratio is false."""

Inflated = Iterator[bytes]


class Garbled(Exception):
    """The data is not what it is said to be.

    Attributes:
        why: one of the kinds that ``batches`` defines.
    """

    def __init__(self, why: str, reason: str) -> None:
        super().__init__(reason)
        self.why = why


class TooLarge(Exception):
    """The data inflates to more than is allowed."""


def slices(data: memoryview) -> Inflated:
    """Data that is not compressed, in pieces."""
    for position in range(0, len(data), PIECE_BYTES):
        yield bytes(data[position : position + PIECE_BYTES])


def inflate(data: memoryview, codec: int) -> Inflated:
    """Inflate data of the codec with this number in Kafka, in pieces of a few megabytes at most.

    Raises:
        Garbled: the codec is unknown, or the data is not of this codec; pieces yielded before are good.
        TooLarge: it inflates to more than ``INFLATED_BYTES_MAX``.
    """
    known = CODECS.get(codec)
    if known is None:
        raise Garbled("codec", f"the batch is compressed with a codec that Kafka does not have, number {codec}")
    name, inflater = known

    size = 0
    pieces = inflater(data)
    while True:
        try:
            piece = next(pieces, None)
        except (Garbled, TooLarge, MemoryError):
            raise
        except Exception as error:  # noqa: BLE001  # each library has errors of its own
            raise Garbled("codec", f"the batch is no {name} data ({type(error).__name__})") from None

        if piece is None:
            return
        size += len(piece)
        if size > INFLATED_BYTES_MAX:
            raise TooLarge(f"the batch inflates to more than {INFLATED_BYTES_MAX} bytes")
        yield piece


def _gzip(data: memoryview) -> Inflated:
    """Inflate one or more gzip members. zlib is fed in small pieces, since it copies the unread input at each call."""
    inflater: Any = zlib.decompressobj(_GZIP_OR_NOT)
    feed, position = b"", 0

    while True:
        if not feed and position < len(data):
            feed = bytes(data[position : position + _FEED_BYTES])
            position += _FEED_BYTES
        had = bool(feed)

        piece = inflater.decompress(feed, PIECE_BYTES)
        feed = inflater.unconsumed_tail
        if piece:
            yield piece

        if inflater.eof:
            feed = inflater.unused_data + bytes(data[position : position + 2])
            position += 2
            if not feed.startswith(_GZIP_MAGIC):
                return  # bytes after the last member are ignored, as Java and Python do
            inflater = zlib.decompressobj(_GZIP_OR_NOT)
        elif not piece and not had:
            raise Garbled("codec", "the batch is gzip data that ends too early")


def _snappy(data: memoryview) -> Inflated:
    """Inflate xerial's blocks, as Java writes them, or one plain block."""
    if bytes(data[: len(_XERIAL_MAGIC)]) != _XERIAL_MAGIC:
        yield _snappy_block(bytes(data))
        return

    position = _XERIAL_HEADER_BYTES
    while position < len(data):
        size = struct.unpack_from(">i", data, position)[0]
        if bytes(data[position : position + len(_XERIAL_MAGIC)]) == _XERIAL_MAGIC:
            position += _XERIAL_HEADER_BYTES  # another stream follows
            continue

        position += 4
        if not 0 < size <= len(data) - position:
            raise Garbled("codec", f"the batch has a snappy block of {size} bytes")
        yield _snappy_block(bytes(data[position : position + size]))
        position += size


def _snappy_block(block: bytes) -> bytes:
    """Inflate one block. Snappy allocates the size that a block claims before it reads it: so the claim is checked."""
    claim = shift = 0
    for byte in block[:5]:
        claim |= (byte & 0x7F) << shift
        shift += 7
        if byte < 0x80:
            break

    if claim > _SNAPPY_RATIO_MAX * len(block):
        raise Garbled("codec", f"the batch has a snappy block of {len(block)} bytes that says it makes {claim}")
    if claim > INFLATED_BYTES_MAX:
        raise TooLarge(f"the batch inflates to more than {INFLATED_BYTES_MAX} bytes")

    inflated: bytes = snappy.decompress(block)
    return inflated


def _lz4(data: memoryview) -> Inflated:
    """Inflate one frame, as Kafka writes it."""
    inflater: Any = lz4.frame.LZ4FrameDecompressor()
    feed = bytes(data)
    while not inflater.eof:
        piece = inflater.decompress(feed, PIECE_BYTES)
        feed = b""
        if piece:
            yield piece
        elif inflater.needs_input and not inflater.eof:
            raise Garbled("codec", "the batch is lz4 data that ends too early")


def _zstd(data: memoryview) -> Inflated:
    decompressor = zstandard.ZstdDecompressor(max_window_size=_ZSTD_WINDOW_MAX)
    with decompressor.stream_reader(bytes(data), read_across_frames=True) as reader:
        while piece := reader.read(PIECE_BYTES):
            yield piece


CODECS: Final[Mapping[int, tuple[str, Callable[[memoryview], Inflated]]]] = {
    1: ("gzip", _gzip),
    2: ("snappy", _snappy),
    3: ("lz4", _lz4),
    4: ("zstd", _zstd),
}
"""Name and inflater of each codec, by Kafka's number."""
