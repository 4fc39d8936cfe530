"""A shard's patches as the cache holds them: the one place that knows the bytes of the list and of the chunks.

A bulk change (a rollout, a deletion, an import) sets one segment for all users of a shard. Instead of emptying the
cache, it publishes a *patch*: the segment's new bit of each slot, and a bit for each slot whose user changed for other
reasons since the operation before. A reader lays it over the entries that are older.

The list, ``{s}:p``, belongs to one generation::

    offset  bytes
         0     10  nonce of the generation
        10 36 × n  patches, oldest first, with epochs that follow each other without a gap:
                   8 epoch, 4 segment id (unsigned), 16 token, 8 valid_until_us; numbers are little-endian

A chunk, ``{s}:c:<token>:<n>``, holds the slots from ``n × CHUNK_SLOTS`` on. The token is random and of one publication
only, so a chunk never changes: readers keep it as long as they like::

    offset  bytes
         0      1  which halves follow: 1 members, 2 changed, 3 both, 0 none. A half that is left out has no bit set
         1   h × n the halves, a bit for each slot (bit 0 of byte 0 is the first slot); in the last chunk they may be
                   shorter than in all other chunks: slots behind the end have no bit set
"""

from __future__ import annotations

import secrets
import struct
from collections.abc import Iterator
from typing import Final, NamedTuple

import numpy as np

from segsvc.cache.entry import NONCE_BYTES
from segsvc.domain import bits
from segsvc.domain.membership import NEVER_US
from segsvc.domain.patch import Patch
from segsvc.domain.sharding import BLOCK_BYTES, BLOCK_SLOTS

CHUNK_BLOCKS: Final = 32
CHUNK_SLOTS: Final = CHUNK_BLOCKS * BLOCK_SLOTS
"""Slots in a chunk: 4 KB for each half. Smaller ones cost more keys and more round trips until a front has them all;
larger ones make a read that needs a single bit wait for more bytes."""
HALF_BYTES_MAX: Final = CHUNK_BLOCKS * BLOCK_BYTES
CHUNK_SHIFT: Final = CHUNK_SLOTS.bit_length() - 1
TOKEN_BYTES: Final = 16

_MEMBERS, _CHANGED = 1, 2
_ITEM: Final = struct.Struct(f"<qI{TOKEN_BYTES}sq")
ITEM_BYTES: Final = _ITEM.size


class PatchNote(NamedTuple):
    """One patch in a shard's list.

    Attributes:
        epoch: of the operation.
        segment_id: the segment that it set.
        token: of the publication; in the names of the chunks.
        valid_until_us: from then on, entries older than this patch are misses; NEVER_US: never. The operation brought
            overrides that end, which older entries know nothing of.
    """

    epoch: int
    segment_id: int
    token: bytes
    valid_until_us: int


def new_token() -> bytes:
    """A token for one publication. A second publication of the same operation gets another one: it must not replace
    chunks that a reader is about to fetch."""
    return secrets.token_hex(TOKEN_BYTES // 2).encode()


def encode_note(note: PatchNote) -> bytes:
    """Raises struct.error for a segment id above 2**32 - 1."""
    return _ITEM.pack(*note)


def decode_list(value: bytes | None, nonce: bytes) -> list[PatchNote]:
    """The patches of a generation; an empty list if the key is lost, malformed or of another generation."""
    if value is None or len(value) <= NONCE_BYTES or not value.startswith(nonce):
        return []
    if (len(value) - NONCE_BYTES) % ITEM_BYTES:
        return []
    notes = [PatchNote(*fields) for fields in _ITEM.iter_unpack(memoryview(value)[NONCE_BYTES:])]
    first = notes[0].epoch
    gap = any(note.epoch != epoch for epoch, note in enumerate(notes, first))
    return [] if gap else notes


def tokens_of(value: bytes | None) -> set[bytes]:
    """The tokens in a list, whatever its generation; none if it is lost or malformed."""
    return set() if value is None else {note.token for note in decode_list(value, value[:NONCE_BYTES])}


def note_of(patch: Patch, token: bytes) -> PatchNote:
    """How a patch that was published under a token stands in the list."""
    until_us = NEVER_US if patch.valid_until_us is None else patch.valid_until_us
    return PatchNote(patch.epoch, patch.segment_id, token, until_us)


def encode_chunks(patch: Patch) -> Iterator[bytes]:
    """The values of a patch's chunks, in their order."""
    blocks = -(-patch.slots // BLOCK_SLOTS)
    members = np.zeros((blocks, BLOCK_BYTES), dtype=np.uint8)
    if patch.members is not None:
        members[: len(patch.members)] = patch.members[:blocks]
    changed = bits.at_slots(patch.changed.astype(np.int64), 0, blocks)
    for first in range(0, blocks, CHUNK_BLOCKS):
        rows = slice(first, first + CHUNK_BLOCKS)
        yield _encode_chunk(members[rows].tobytes(), changed[rows].tobytes())


def chunk_count(next_slot: int) -> int:
    """Number of chunks for the slots below ``next_slot``."""
    return -(-next_slot // CHUNK_SLOTS)


def _encode_chunk(members: bytes, changed: bytes) -> bytes:
    has_members, has_changed = any(members), any(changed)
    which = _MEMBERS * has_members | _CHANGED * has_changed
    return bytes((which,)) + (members if has_members else b"") + (changed if has_changed else b"")


class Chunk(NamedTuple):
    """One chunk; None for a half that has no bit set."""

    members: bytes | None
    changed: bytes | None


def decode_chunk(value: bytes | None) -> Chunk | None:
    """None: the key is lost or malformed."""
    if not value:
        return None
    which, halves = value[0], value[1:]
    if which == 0 and not halves:
        return Chunk(None, None)
    if which in (_MEMBERS, _CHANGED) and 0 < len(halves) <= HALF_BYTES_MAX:
        half = halves.ljust(HALF_BYTES_MAX, b"\0")
        return Chunk(half, None) if which == _MEMBERS else Chunk(None, half)
    if which == _MEMBERS | _CHANGED and 0 < len(halves) <= 2 * HALF_BYTES_MAX and len(halves) % 2 == 0:
        middle = len(halves) // 2
        return Chunk(halves[:middle].ljust(HALF_BYTES_MAX, b"\0"), halves[middle:].ljust(HALF_BYTES_MAX, b"\0"))
    return None


def changed_in(value: bytes | None, number: int) -> list[int]:
    """Slots of the users who changed, as the value of the chunk with this number says; none if it is lost."""
    chunk = decode_chunk(value)
    if chunk is None or chunk.changed is None:
        return []
    flags = np.unpackbits(np.frombuffer(chunk.changed, dtype=np.uint8), bitorder="little")
    return (np.flatnonzero(flags) + number * CHUNK_SLOTS).tolist()
