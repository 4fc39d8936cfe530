"""Members of a segment, shard by shard and by slot, with bounded memory. Implements ``services.export.MemberReader``.

A shard is read in windows: at most WINDOW_BLOCKS rows of bits, and the overrides that lie in the same slots. If there
are more overrides than WINDOW_OVERRIDES, the window ends at the last that was read; so memory depends neither on the
users nor on the overrides.
"""

from __future__ import annotations

from dataclasses import dataclass

import numpy as np
import numpy.typing as npt
import sqlalchemy as sa

from segsvc.domain import bits
from segsvc.domain.override import Effect
from segsvc.domain.sharding import BLOCK_BYTES, BLOCK_SLOTS
from segsvc.domain.statistics import MemberPage
from segsvc.postgres import tables
from segsvc.postgres.engine import Databases
from segsvc.postgres.shard.override_expiry import holds_now

WINDOW_BLOCKS = 256
WINDOW_OVERRIDES = 10_000
DIRECTORY_BLOCKS = 256
"""Directory rows read at a time: 2 MB."""

_NO_END = np.iinfo(np.int64).max

Slots = npt.NDArray[np.int64]


@dataclass(frozen=True, slots=True)
class _Window:
    """Members by slot, complete up to ``end``; an end of _NO_END: nothing follows on this shard."""

    slots: Slots
    end: int


def select_bits(connection: sa.Connection, segment_id: int, first_block: int) -> tuple[Slots, bits.Packed]:
    """The next WINDOW_BLOCKS blocks of a segment: their numbers and their bits."""
    table = tables.memberships.c
    rows = connection.execute(
        sa.select(table.block, table.bits)
        .where(table.segment_id == segment_id, table.block >= first_block)
        .order_by(table.block)
        .limit(WINDOW_BLOCKS)
    ).all()
    packed = np.frombuffer(b"".join(row.bits for row in rows), dtype=np.uint8).reshape(-1, BLOCK_BYTES)
    return np.array([row.block for row in rows], dtype=np.int64), packed


def select_overrides(connection: sa.Connection, segment_id: int, after: int, end: int) -> list[tuple[int, int]]:
    """The next WINDOW_OVERRIDES unexpired overrides of a segment in a range of slots: slot and effect."""
    table, users = tables.overrides.c, tables.users.c
    rows = connection.execute(
        sa.select(users.slot, table.effect)
        .join_from(tables.overrides, tables.users, users.id == table.user_id)
        .where(table.segment_id == segment_id, holds_now(), users.slot > after, users.slot <= end)
        .order_by(users.slot)
        .limit(WINDOW_OVERRIDES)
    ).all()
    return [(row.slot, row.effect) for row in rows]


def select_directory(connection: sa.Connection, blocks: Slots) -> dict[int, npt.NDArray[np.int64]]:
    """User ids of blocks; 0 where a slot has no user."""
    table = tables.directory.c
    rows = connection.execute(sa.select(table.block, table.user_ids).where(table.block.in_(blocks.tolist()))).all()
    return {row.block: np.frombuffer(row.user_ids, dtype="<i8") for row in rows}


def select_known(connection: sa.Connection, segment_id: int) -> bool:
    """Whether the shard has the segment."""
    table = tables.shard_segments.c
    return connection.execute(sa.select(table.id).where(table.id == segment_id)).one_or_none() is not None


class PostgresMemberReader:
    """Reads the members on the shards of an installation."""

    def __init__(self, databases: Databases) -> None:
        self._databases = databases

    @property
    def shard_count(self) -> int:
        return self._databases.shard_count

    def members(
        self, shard: int, segment_id: int, after_slot: int, limit: int, *, timeout_s: float | None
    ) -> MemberPage:
        """The next members of a shard, at most ``limit``, after a slot; all of one moment.

        Raises:
            ServiceError: SHARD_UNAVAILABLE, DEADLINE_EXCEEDED.
        """
        user_ids: list[int] = []
        exhausted = False
        # Bits, overrides and directory of one moment. Read at two moments, a user could be missed who is always a
        # member: one who becomes a member by an override while the rule drops them, or the other way round.
        with self._databases.shard_snapshot(shard, timeout_s=timeout_s) as connection:
            if not select_known(connection, segment_id):
                return MemberPage(known=False, user_ids=[], last_slot=after_slot, exhausted=True)

            while not exhausted and len(user_ids) < limit:
                window = _read_window(connection, segment_id, after_slot)
                slots = _first_blocks(window.slots[: limit - len(user_ids)])
                user_ids += _users_at(connection, slots)
                if slots.size < window.slots.size:
                    after_slot = int(slots[-1])
                else:
                    after_slot, exhausted = window.end, window.end == _NO_END
        return MemberPage(known=True, user_ids=user_ids, last_slot=after_slot, exhausted=exhausted)


def _read_window(connection: sa.Connection, segment_id: int, after_slot: int) -> _Window:
    blocks, packed = select_bits(connection, segment_id, (after_slot + 1) // BLOCK_SLOTS)
    end = _NO_END if blocks.size < WINDOW_BLOCKS else (int(blocks[-1]) + 1) * BLOCK_SLOTS - 1
    overrides = select_overrides(connection, segment_id, after_slot, end)
    if len(overrides) == WINDOW_OVERRIDES:
        end = overrides[-1][0]

    row, bit = np.nonzero(bits.unpack(packed))
    by_rule = blocks[row] * BLOCK_SLOTS + bit
    by_rule = by_rule[(by_rule > after_slot) & (by_rule <= end)]

    included = np.array([slot for slot, effect in overrides if effect == Effect.INCLUDE], dtype=np.int64)
    excluded = np.array([slot for slot, effect in overrides if effect != Effect.INCLUDE], dtype=np.int64)
    # Both are sorted and without repetitions: a segment overrides a user once.
    return _Window(np.setdiff1d(np.union1d(by_rule, included), excluded, assume_unique=True), end)


def _first_blocks(slots: Slots) -> Slots:
    """The slots that lie in the first DIRECTORY_BLOCKS blocks."""
    _, first = np.unique(slots // BLOCK_SLOTS, return_index=True)
    return slots[: int(first[DIRECTORY_BLOCKS])] if first.size > DIRECTORY_BLOCKS else slots


def _users_at(connection: sa.Connection, slots: Slots) -> list[int]:
    """The users at these slots, in their order; a slot without a user is left out."""
    if not slots.size:
        return []
    blocks = np.unique(slots // BLOCK_SLOTS)
    directory = select_directory(connection, blocks)
    empty_block = np.zeros(BLOCK_SLOTS, dtype=np.int64)
    table = np.stack([directory.get(int(block), empty_block) for block in blocks])
    found = table[np.searchsorted(blocks, slots // BLOCK_SLOTS), slots % BLOCK_SLOTS]
    users: list[int] = found[found != 0].tolist()
    return users
