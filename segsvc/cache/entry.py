"""The value of a user's key: the one place that knows its bytes.

    offset  bytes
         0      1  "V"
         1     10  nonce of the shard's generation under which it was filled
        11      1  format: 2
        12      8  valid_until_us    signed, little-endian, as all that follow
        20      8  row_version
        28      8  read_time_us
        36      4  epoch             unsigned; the shard's, of the same snapshot as the segment ids
        40      4  slot              unsigned; names the user in patches
        44   4 × n segment ids       unsigned, in the order of their slugs

A read compares the first 12 bytes at once: value, generation and format must all be right, or it is a miss. A new
format gets a new number; entries of the old format are then misses, and are filled again. An entry whose epoch is
older than the generation's newest patch needs the later patches laid over it: ``patches``.
"""

from __future__ import annotations

import struct
from collections.abc import Iterable, Sequence
from typing import Final, NamedTuple

import numpy as np

from segsvc.domain.membership import FIRST_SEGMENT, VALID_UNTIL, Entry, EntryColumns

NONCE_BYTES: Final = 10
RUN_ID_BYTES: Final = 40
GENERATION_BYTES: Final = RUN_ID_BYTES + NONCE_BYTES + 8
FORMAT: Final = b"\x02"
PREFIX_BYTES: Final = 1 + NONCE_BYTES + 1
EPOCH_OFFSET: Final = 36
HEADER_BYTES: Final = 44
_WORDS: Final = HEADER_BYTES // 4


class _Layouts(dict[int, struct.Struct | None]):
    """Length of a value -> its struct; None for a length that no value can have. Filled on demand."""

    def __missing__(self, length: int) -> struct.Struct | None:
        count, odd = divmod(length - HEADER_BYTES, 4)
        layout = struct.Struct(f"<qqqII{count}I") if count >= 0 and not odd else None
        self[length] = layout
        return layout


_layouts: Final = _Layouts()


def prefix(nonce: bytes) -> bytes:
    """The first bytes of every usable value of a generation."""
    return b"V" + nonce + FORMAT


class Generation(NamedTuple):
    """What a generation key holds.

    Attributes:
        nonce: of the generation; usable entries carry it.
        newest: epoch of the newest patch that was published under it; 0: there is none, and every entry is complete.
    """

    nonce: bytes
    newest: int


def generation_of(value: bytes | None, run_id: bytes) -> Generation | None:
    """The content of a generation key; None if it is absent, malformed or of another run of the server."""
    if value is None or len(value) != GENERATION_BYTES or not value.startswith(run_id):
        return None
    return Generation(
        value[RUN_ID_BYTES : RUN_ID_BYTES + NONCE_BYTES],
        int.from_bytes(value[RUN_ID_BYTES + NONCE_BYTES :], "little", signed=True),
    )


def nonce_of(value: bytes | None, run_id: bytes) -> bytes | None:
    """The nonce in a generation key's value; None if it is absent, malformed or of another run of the server."""
    generation = generation_of(value, run_id)
    return None if generation is None else generation.nonce


def encode(nonce: bytes, entry: Entry) -> bytes:
    """The value of an entry under a generation.

    Raises:
        struct.error: a segment id, the epoch or the slot is above 2**32 - 1.
    """
    layout = _layouts[HEADER_BYTES + 4 * (len(entry) - FIRST_SEGMENT)]
    if layout is None:
        raise ValueError("an entry has at least its five fixed fields")
    return prefix(nonce) + layout.pack(*entry)


def decode(value: bytes | None, usable_prefix: bytes | None, now_us: int) -> Entry | None:
    """The entry in a user's key; None: a miss.

    Args:
        value: what the key holds; None: there is no such key.
        usable_prefix: ``prefix`` of the shard's generation; None: the shard has none.
        now_us: the time now; an entry whose valid_until is not later is a miss.
    """
    return decode_all([value], [usable_prefix], now_us)[0]


def decode_all(
    values: Iterable[bytes | None], usable_prefixes: Iterable[bytes | None], now_us: int
) -> list[Entry | None]:
    """``decode`` for many values at once: a function call for each would cost as much as all the rest."""
    layouts = _layouts
    found: list[Entry | None] = []
    for value, usable_prefix in zip(values, usable_prefixes, strict=True):
        if value is not None and usable_prefix is not None and value.startswith(usable_prefix):
            layout = layouts[len(value)]
            if layout is not None:
                entry = layout.unpack_from(value, PREFIX_BYTES)
                if entry[VALID_UNTIL] > now_us:
                    found.append(entry)
                    continue
        found.append(None)
    return found


def encode_columns(nonce: bytes, columns: EntryColumns) -> Sequence[bytes]:
    """The values of many users in the order of the columns: as ``encode``, without a Python step for each segment."""
    users = len(columns.user_ids)
    lengths = columns.counts + _WORDS
    ends = np.cumsum(lengths)
    starts = ends - lengths

    header = np.zeros(
        users,
        dtype=[
            ("prefix", f"S{PREFIX_BYTES}"),
            ("valid_until_us", "<i8"),
            ("row_version", "<i8"),
            ("read_time_us", "<i8"),
            ("epoch", "<u4"),
            ("slot", "<u4"),
        ],
    )
    header["prefix"] = prefix(nonce)
    header["valid_until_us"] = columns.valid_until_us
    header["row_version"] = columns.row_versions
    header["read_time_us"] = columns.read_time_us
    header["epoch"] = columns.epoch
    header["slot"] = columns.slots

    words = np.empty(int(lengths.sum()), dtype="<u4")
    in_header = np.zeros(words.size, dtype=np.bool_)
    header_at = (starts[:, None] + np.arange(_WORDS)).ravel()
    in_header[header_at] = True
    words[header_at] = header.view("<u4")
    words[~in_header] = columns.segment_ids

    data = words.tobytes()
    return [data[4 * start : 4 * end] for start, end in zip(starts.tolist(), ends.tolist(), strict=True)]
