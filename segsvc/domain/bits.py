"""Blocks of bits as numpy arrays: little-endian within a byte, as PostgreSQL's ``get_bit`` on bytea reads them."""

from __future__ import annotations

from dataclasses import dataclass

import numpy as np
import numpy.typing as npt

from segsvc.domain.sharding import BLOCK_BYTES, BLOCK_SLOTS

Flags = npt.NDArray[np.bool_]
"""One boolean per slot, shape (blocks, 1024)."""
Packed = npt.NDArray[np.uint8]
"""Eight slots per byte, shape (blocks, 128)."""
UserIds = npt.NDArray[np.int64]
"""One user id per slot, 0 for an empty slot, shape (blocks, 1024)."""


@dataclass(frozen=True, slots=True)
class OverriddenSlots:
    """Slots of the users with an unexpired override of one segment."""

    included: npt.NDArray[np.int64]
    excluded: npt.NDArray[np.int64]


@dataclass(frozen=True, slots=True, kw_only=True)
class BitRows:
    """Bits of many segments in some blocks: block ``blocks[i]`` of segment ``segment_ids[i]`` is ``packed[i]``.

    Two of the columns have the same type, so the fields are keyword-only.
    """

    blocks: npt.NDArray[np.int64]
    segment_ids: npt.NDArray[np.int64]
    packed: Packed


def pack(flags: Flags) -> Packed:
    return np.packbits(flags, axis=1, bitorder="little")


def unpack(packed: Packed) -> Flags:
    return np.unpackbits(packed, axis=1, bitorder="little").view(np.bool_)


def popcount(packed: Packed) -> int:
    """Total number of set bits."""
    return int(np.bitwise_count(packed).sum(dtype=np.int64))


def empty(blocks: int) -> Packed:
    """Blocks without a bit set."""
    return np.zeros((blocks, BLOCK_BYTES), dtype=np.uint8)


def put(packed: Packed, slots: npt.NDArray[np.int64], flags: npt.NDArray[np.bool_]) -> None:
    """Set or clear the bits of these slots, in place. No slot comes twice."""
    data = packed.reshape(-1)  # a view
    places, masks = slots >> 3, np.left_shift(1, slots & 7).astype(np.uint8)
    np.bitwise_and.at(data, places, ~masks)
    np.bitwise_or.at(data, places[flags], masks[flags])


def at_slots(slots: npt.NDArray[np.int64], first_block: int, blocks: int) -> Packed:
    """Blocks in which exactly these slots are set; slots outside the range of blocks are left out."""
    flags = np.zeros(blocks * BLOCK_SLOTS, dtype=np.bool_)
    index = slots - first_block * BLOCK_SLOTS
    flags[index[(index >= 0) & (index < flags.size)]] = True
    return pack(flags.reshape(blocks, BLOCK_SLOTS))
