"""What is known of one user's memberships, as the shards give it, the cache keeps it and the front answers with it."""

from __future__ import annotations

from dataclasses import dataclass
from typing import Final

import numpy as np
import numpy.typing as npt

Entry = tuple[int, ...]
"""One user's memberships: ``(valid_until_us, row_version, read_time_us, block, *segment_ids)``.

A plain tuple, because the hot path makes one for every call. Times are microseconds since 1970 by the shard's clock;
the segment ids stand in the order of their slugs, so that an answer needs no sorting.
"""

VALID_UNTIL: Final = 0
"""The nearest expiry of an override that this entry depends on; NEVER_US: there is none."""
ROW_VERSION: Final = 1
READ_TIME: Final = 2
"""When the shard was read: the entry holds at least everything that was acknowledged before this."""
BLOCK: Final = 3
FIRST_SEGMENT: Final = 4

NEVER_US: Final = 2**63 - 1


@dataclass(frozen=True, slots=True)
class LoadedUser:
    """One user as a shard gives it, overrides laid over the rule's bits.

    Attributes:
        segment_ids: segments the user is in, in no order.
        valid_until_us: nearest expiry of an override of this user; NEVER_US: none expires.
        read_time_us: the shard's clock when the statement began.
    """

    user_id: int
    block: int
    row_version: int
    read_time_us: int
    valid_until_us: int
    segment_ids: tuple[int, ...]


@dataclass(frozen=True, slots=True)
class Grant:
    """Permission to fill some users' entries of one shard: only while the lease with this token is in place.

    Attributes:
        nonce: the shard's cache generation when the lease was given; entries filled under it carry it.
        token: the lease's token, used in one call only.
        user_ids: the users for whom the lease was given; for others the cache is in use or blocked.
        busy: how many were refused although no entry of theirs is a hit: leased to others, or blocked by a writer.
    """

    nonce: bytes
    token: bytes
    user_ids: frozenset[int]
    busy: int = 0


@dataclass(frozen=True, slots=True)
class EntryColumns:
    """Entries of many users side by side, for filling in bulk.

    Attributes:
        user_ids: int64, one a user.
        blocks: uint32, one a user.
        row_versions: int64, one a user.
        valid_until_us: int64, one a user.
        read_time_us: of all of them.
        counts: int64, segments of each user.
        segment_ids: uint32, all users' one after another, each user's in the order of the slugs.
    """

    user_ids: npt.NDArray[np.int64]
    blocks: npt.NDArray[np.uint32]
    row_versions: npt.NDArray[np.int64]
    valid_until_us: npt.NDArray[np.int64]
    read_time_us: int
    counts: npt.NDArray[np.int64]
    segment_ids: npt.NDArray[np.uint32]


@dataclass(frozen=True, slots=True)
class UserBlock:
    """All users of one block and what their memberships depend on, of one moment.

    Attributes:
        user_ids: int64, one a slot; 0: no user.
        row_versions: int64, one a slot; 0 where there is no user.
        segment_ids: int64: segments with a bit set in this block.
        packed: uint8, shape (segments, 128): their bits, in the order of ``segment_ids``.
        overrides: int64, shape (overrides, 4): bit in the block, segment id, 1 for in or 0 for out, valid_until_us.
            Only those that have not expired.
        read_time_us: the shard's clock when the statement began.
    """

    block: int
    user_ids: npt.NDArray[np.int64]
    row_versions: npt.NDArray[np.int64]
    segment_ids: npt.NDArray[np.int64]
    packed: npt.NDArray[np.uint8]
    overrides: npt.NDArray[np.int64]
    read_time_us: int


@dataclass(frozen=True, slots=True)
class Sweep:
    """A complete run of the warmer over one shard.

    Attributes:
        nonce: of the generation under which all entries were filled.
        next_slot: every user below it was warmed.
        ended_s: when, in seconds since 1970.
    """

    nonce: bytes
    next_slot: int
    ended_s: int


@dataclass(frozen=True, slots=True)
class CacheMemory:
    """Memory of the cache's server. ``max_bytes`` None: it has no bound of its own."""

    used_bytes: int
    max_bytes: int | None
