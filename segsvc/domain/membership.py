"""One user's memberships: as the shards return them, as the cache stores them, as the front answers with them."""

from __future__ import annotations

from collections.abc import Iterable
from dataclasses import dataclass, field
from typing import Final

import numpy as np
import numpy.typing as npt

Entry = tuple[int, ...]
"""One user's memberships: ``(valid_until_us, row_version, read_time_us, epoch, slot, *segment_ids)``.

A plain tuple, because the hot path creates one for every call. Times are microseconds since 1970 by the shard's clock.
The segment ids are in the order of their slugs, so an answer needs no sorting.
"""

VALID_UNTIL: Final = 0
"""The earliest expiry of an override that this entry depends on; NEVER_US: none expires."""
ROW_VERSION: Final = 1
READ_TIME: Final = 2
"""When the shard was read: the entry includes at least every change that was acknowledged before this time."""
EPOCH: Final = 3
"""The shard's epoch in the snapshot that the bits are from: how many operations had changed lists there by then."""
SLOT: Final = 4
FIRST_SEGMENT: Final = 5

NEVER_US: Final = 2**63 - 1


@dataclass(frozen=True, slots=True)
class LoadedUser:
    """One user as a shard returns it, with the overrides applied to the rule's bits.

    Attributes:
        segment_ids: segments the user is in, unordered.
        valid_until_us: earliest expiry of an override of this user; NEVER_US: none expires.
        read_time_us: the shard's clock when the statement began.
        epoch: the shard's, of the same snapshot as everything else.
    """

    user_id: int
    slot: int
    row_version: int
    read_time_us: int
    valid_until_us: int
    segment_ids: tuple[int, ...]
    epoch: int

    def entry(self, segment_ids: Iterable[int]) -> Entry:
        """The user's entry, with the segments in the order of their slugs."""
        return (self.valid_until_us, self.row_version, self.read_time_us, self.epoch, self.slot, *segment_ids)


@dataclass(frozen=True, slots=True)
class Grant:
    """Permission to fill the entries of some users of one shard, as long as the lease with this token exists.

    Attributes:
        nonce: the shard's cache generation when the lease was given; entries filled under the lease carry it.
        token: the lease's token, used in one call only.
        user_ids: the users for whom the lease was given; the entries of the rest are in use or barred by a writer.
        busy: number of users refused although their entry is no hit: leased to another reader, or barred by a writer.
        newest: epoch of the shard's newest patch when the lease was given; 0: there is none.
    """

    nonce: bytes
    token: bytes
    user_ids: frozenset[int]
    busy: int = 0
    newest: int = 0


@dataclass(frozen=True, slots=True)
class EntryColumns:
    """Entries of many users as columns, for filling in bulk.

    Attributes:
        user_ids: int64, one per user.
        slots: uint32, one per user.
        row_versions: int64, one per user.
        valid_until_us: int64, one per user.
        read_time_us: the same for all of them.
        epoch: the same for all of them.
        counts: int64, number of segments of each user.
        segment_ids: uint32, the users' lists one after another, each in the order of the slugs.
    """

    user_ids: npt.NDArray[np.int64]
    slots: npt.NDArray[np.uint32]
    row_versions: npt.NDArray[np.int64]
    valid_until_us: npt.NDArray[np.int64]
    read_time_us: int
    epoch: int
    counts: npt.NDArray[np.int64]
    segment_ids: npt.NDArray[np.uint32]


@dataclass(frozen=True, slots=True)
class UserBlock:
    """All users of one block and all that their memberships depend on, as of one moment.

    Attributes:
        user_ids: int64, one per slot; 0: no user.
        row_versions: int64, one per slot; 0 where there is no user.
        segment_ids: int64: segments with a bit set in this block.
        packed: uint8, shape (segments, 128): their bits, in the order of ``segment_ids``.
        overrides: int64, shape (overrides, 4): bit in the block, segment id, 1 for in or 0 for out, valid_until_us.
            Only overrides that have not expired.
        read_time_us: the shard's clock when the statement began.
        epoch: the shard's, of the same snapshot as everything else.
    """

    block: int
    user_ids: npt.NDArray[np.int64]
    row_versions: npt.NDArray[np.int64]
    segment_ids: npt.NDArray[np.int64]
    packed: npt.NDArray[np.uint8]
    overrides: npt.NDArray[np.int64]
    read_time_us: int
    epoch: int


@dataclass(frozen=True, slots=True)
class Sweep:
    """A complete run of the warmer over one shard.

    Attributes:
        nonce: the cache generation under which all entries were filled.
        next_slot: every user below it was warmed.
        ended_s: end of the run, in seconds since 1970.
        epoch: no entry below ``next_slot`` is of an earlier epoch.
        seen: epoch of the last patch whose changed users were read again.
        newest: epoch of the shard's newest patch when the sweep was looked up.
    """

    nonce: bytes
    next_slot: int
    ended_s: int
    epoch: int = 0
    seen: int = 0
    newest: int = field(default=0, compare=False)


@dataclass(frozen=True, slots=True)
class CacheMemory:
    """Memory of one cache server. ``max_bytes`` None: the server has no limit of its own."""

    server: str
    used_bytes: int
    max_bytes: int | None
