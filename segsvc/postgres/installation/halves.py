"""Makes a database equal to one half of a shard: the users with ``user_id mod 2N`` = its number, and all they have.

``bring_up`` compares and writes what differs. So it copies everything the first time, only what has changed each time
after that, and goes on after an interruption without knowing of it. Slots are packed again, in their old order: a user
keeps the slot of its first copy, and later users get higher ones. Since the order is the old one, the highest slot of a
FROZEN rule has exactly one counterpart.
"""

from __future__ import annotations

from collections.abc import Iterator, Sequence
from dataclasses import dataclass
from typing import Any, Final

import numpy as np
import numpy.typing as npt
import sqlalchemy as sa
from psycopg2 import sql

from segsvc.domain import bits
from segsvc.domain.sharding import BLOCK_BYTES, BLOCK_SLOTS
from segsvc.domain.stored import Int64s
from segsvc.postgres import tables
from segsvc.postgres.copying import append_rows, bigint_array, copy_query, copy_rows

_OWNER: Final = {
    "overrides": "user_id",
    "user_requests": "user_id",
    "deleted_users": "id",
    # Of the whole shard: both halves have passed through the same operations.
    "applied_operations": None,
    "shard_epoch": None,
}
"""Tables whose rows are copied as they are: the column with the user that a row belongs to, None: to all."""
_REBUILT: Final = frozenset({"shard_state", "users", "directory", "memberships", "segments"})
"""Tables whose rows hold slots, or what is counted of them."""
_LEFT_OUT: Final = frozenset({"changed_slots"})
"""Tables that are empty in a half: they say which entries of the cache to renew, and the cache forgets all entries."""

_ROWS_AT_ONCE: Final = 50_000
_BIT_ROWS_AT_ONCE: Final = 1 << 17


class HalfWrong(Exception):
    """A half is not what the shard says it must be; the text says where they differ."""


@dataclass(frozen=True, slots=True)
class Half:
    """One half of a shard.

    Attributes:
        number: of the shard that it becomes, 0 … ``count`` - 1.
        count: number of shards after the doubling.
    """

    number: int
    count: int

    def of(self, column: str) -> sql.Composable:
        """The condition that a row belongs to this half."""
        return sql.SQL("{} % {} = {}").format(sql.Identifier(column), sql.Literal(self.count), sql.Literal(self.number))


@dataclass(frozen=True, slots=True)
class _Slots:
    """The users of a half, in the order of their slots.

    Attributes:
        ids: of the users.
        old: their slots in the shard, ascending.
        new: their slots in the half, ascending.
    """

    ids: Int64s
    old: Int64s
    new: Int64s

    @property
    def next(self) -> int:
        """The half's next free slot."""
        return int(self.new[-1]) + 1 if self.new.size else 0

    @property
    def blocks(self) -> int:
        return -(-self.next // BLOCK_SLOTS)


@dataclass(frozen=True, slots=True)
class BroughtUp:
    """Attributes:
    users: of the half.
    changes: rows that differed, bits and counters apart.
    rule_counts: set bits by segment.
    """

    users: int
    changes: int
    rule_counts: dict[int, int]


def bring_up(source: sa.Connection, target: sa.Connection, half: Half) -> BroughtUp:
    """Make the target equal to its half of the source. Commits nothing.

    Args:
        source: a transaction on the shard whose statements all see the same moment.
        target: a transaction on the half's database, which has the shard's schema.
    """
    unknown = tables.shard.tables.keys() - _OWNER.keys() - _REBUILT - _LEFT_OUT
    if unknown:
        raise RuntimeError(f"no rule says how to halve the tables {sorted(unknown)}")

    slots, changes = _bring_up_users(source, target, half)
    _bring_up_directory(target, slots)
    rule_counts = _bring_up_bits(source, target, slots)
    _copy_segments(source, target, slots, rule_counts)
    for name, owner in _OWNER.items():
        if name in tables.shard.tables:
            changes += _bring_up_rows(source, target, tables.shard.tables[name], owner, half)
    _fill_state(source, target, half, slots)
    for name in _LEFT_OUT & tables.shard.tables.keys():
        # Also what the target's own triggers have written just now.
        target.execute(sa.delete(tables.shard.tables[name]))
    return BroughtUp(slots.ids.size, changes, rule_counts)


# -- users ------------------------------------------------------------------------------------------------------------


def _select_users(where: sql.Composable) -> sql.Composable:
    # row_version is raised by every change. The creation time distinguishes a user who was deleted, forgotten and
    # created again.
    return sql.SQL("SELECT id, slot, row_version, create_time FROM users WHERE {} ORDER BY slot").format(where)


def _users(connection: sa.Connection, where: sql.Composable) -> npt.NDArray[Any]:
    return copy_rows(connection, _select_users(where), id=">i8", slot=">i8", row_version=">i8", create_time=">i8")


def _bring_up_users(source: sa.Connection, target: sa.Connection, half: Half) -> tuple[_Slots, int]:
    theirs = _users(source, half.of("id"))
    ours = _users(target, sql.SQL("true"))
    ids, old = theirs["id"].astype(np.int64), theirs["slot"].astype(np.int64)

    if not ours.size:
        _copy_all_users(source, target, half)
        return _Slots(ids, old, np.arange(ids.size, dtype=np.int64)), ids.size

    # For each user of the shard: its place among ours, or one that does not match.
    order = np.argsort(ours["id"].astype(np.int64))
    at: Int64s = order[np.minimum(np.searchsorted(ours["id"].astype(np.int64)[order], ids), ours.size - 1)]
    known = (ours["id"][at] == ids) & (ours["create_time"][at] == theirs["create_time"])
    same = known & (ours["row_version"][at] == theirs["row_version"])

    new = np.full(ids.size, -1, dtype=np.int64)
    new[known] = ours["slot"].astype(np.int64)[at[known]]
    first_free = int(new.max(initial=-1)) + 1
    # Slots are given by arrival and never again: a user who is new here came after all that are not.
    new[~known] = np.arange(first_free, first_free + np.count_nonzero(~known))
    if np.any(np.diff(new) <= 0):
        raise HalfWrong("its users are not in the order of the shard's slots")

    kept = np.zeros(ours.size, dtype=np.bool_)
    kept[at[same]] = True
    stale = ours["id"][~kept].astype(np.int64)
    for first in range(0, stale.size, _ROWS_AT_ONCE):
        part = bigint_array(stale[first : first + _ROWS_AT_ONCE].tolist())
        target.execute(sa.text("DELETE FROM users WHERE id = ANY(CAST(:ids AS bigint[]))"), {"ids": part})

    missing = np.flatnonzero(~same)
    for first in range(0, missing.size, _ROWS_AT_ONCE):
        chosen = missing[first : first + _ROWS_AT_ONCE]
        _copy_users(source, target, ids[chosen], new[chosen])
    return _Slots(ids, old, new), stale.size + missing.size


_USER_COLUMNS: Final = [column.name for column in tables.users.columns]


def _user_columns(slot: sql.Composable) -> sql.Composable:
    return sql.SQL(", ").join(
        slot if name == "slot" else sql.SQL("u.{}").format(sql.Identifier(name)) for name in _USER_COLUMNS
    )


def _copy_all_users(source: sa.Connection, target: sa.Connection, half: Half) -> None:
    slot = sql.SQL("row_number() OVER (ORDER BY u.slot) - 1")
    query = sql.SQL("SELECT {} FROM users u WHERE {}").format(_user_columns(slot), half.of("id"))
    copy_query(source, query, target, tables.users)


def _copy_users(source: sa.Connection, target: sa.Connection, ids: Int64s, slots: Int64s) -> None:
    query = sql.SQL(
        "SELECT {} FROM users u JOIN unnest({}::bigint[], {}::bigint[]) AS n(id, slot) ON n.id = u.id"
    ).format(
        _user_columns(sql.SQL("n.slot")),
        sql.Literal(bigint_array(ids.tolist())),
        sql.Literal(bigint_array(slots.tolist())),
    )
    copy_query(source, query, target, tables.users)


# -- what lies by slots -----------------------------------------------------------------------------------------------


def _bring_up_directory(target: sa.Connection, slots: _Slots) -> None:
    by_slot = np.zeros(slots.blocks * BLOCK_SLOTS, dtype="<i8")
    by_slot[slots.new] = slots.ids
    wanted = by_slot.reshape(slots.blocks, BLOCK_SLOTS)

    rows = copy_rows(
        target, sql.SQL("SELECT block, user_ids FROM directory"), block=">i8", user_ids=("<i8", BLOCK_SLOTS)
    )
    right = np.zeros(slots.blocks, dtype=np.bool_)
    inside = rows["block"] < slots.blocks
    right[rows["block"][inside]] = np.all(rows["user_ids"][inside] == wanted[rows["block"][inside]], axis=1)

    wrong = [int(block) for block in rows["block"] if block >= slots.blocks or not right[block]]
    target.execute(
        sa.text("DELETE FROM directory WHERE block = ANY(CAST(:blocks AS bigint[]))"), {"blocks": bigint_array(wrong)}
    )
    missing = np.flatnonzero(~right)
    if missing.size:
        append_rows(
            target, tables.directory, block=missing, user_ids=wanted[missing].view(np.uint8).reshape(missing.size, -1)
        )


_SEGMENTS: Final = tables.shard_segments.c


def _bring_up_bits(source: sa.Connection, target: sa.Connection, slots: _Slots) -> dict[int, int]:
    """Returns the number of set bits by segment."""
    segment_ids = list(source.execute(sa.select(_SEGMENTS.id).order_by(_SEGMENTS.id)).scalars())
    target.execute(
        sa.text("DELETE FROM memberships WHERE segment_id <> ALL(CAST(:ids AS bigint[]))"),
        {"ids": bigint_array(segment_ids)},
    )

    old_blocks = int(slots.old[-1]) // BLOCK_SLOTS + 1 if slots.old.size else 0
    at_once = max(1, _BIT_ROWS_AT_ONCE // max(1, old_blocks))
    counts: dict[int, int] = {}
    for first in range(0, len(segment_ids), at_once):
        part = segment_ids[first : first + at_once]
        theirs, ours = _bit_rows(source, part), _bit_rows(target, part)
        for segment_id in part:
            old = _dense(theirs, segment_id, old_blocks)
            flags = np.zeros(slots.blocks * BLOCK_SLOTS, dtype=np.bool_)
            flags[slots.new] = bits.unpack(old).reshape(-1)[slots.old]
            wanted = bits.pack(flags.reshape(slots.blocks, BLOCK_SLOTS))
            counts[segment_id] = bits.popcount(wanted)
            _write_bits(target, segment_id, wanted, ours)
    return counts


def _bit_rows(connection: sa.Connection, segment_ids: Sequence[int]) -> bits.BitRows:
    query = sql.SQL(
        "SELECT segment_id, block, bits FROM memberships WHERE segment_id = ANY({}::bigint[]) "
        "ORDER BY segment_id, block"
    ).format(sql.Literal(bigint_array(segment_ids)))
    rows = copy_rows(connection, query, segment_ids=">i8", blocks=">i8", packed=("u1", BLOCK_BYTES))
    return bits.BitRows(
        segment_ids=rows["segment_ids"].astype(np.int64),
        blocks=rows["blocks"].astype(np.int64),
        packed=rows["packed"],
    )


def _of_segment(rows: bits.BitRows, segment_id: int) -> tuple[Int64s, bits.Packed]:
    start, end = np.searchsorted(rows.segment_ids, [segment_id, segment_id + 1])
    return rows.blocks[start:end], rows.packed[start:end]


def _dense(rows: bits.BitRows, segment_id: int, blocks: int) -> bits.Packed:
    """The bits of a segment in the first blocks. Rows behind them belong to users of the other half."""
    packed = bits.empty(blocks)
    numbers, stored = _of_segment(rows, segment_id)
    inside = numbers < blocks
    packed[numbers[inside]] = stored[inside]
    return packed


def _write_bits(target: sa.Connection, segment_id: int, wanted: bits.Packed, ours: bits.BitRows) -> None:
    numbers, stored = _of_segment(ours, segment_id)
    blocks = max(len(wanted), int(numbers.max(initial=-1)) + 1)
    now, then = bits.empty(blocks), bits.empty(blocks)
    now[numbers] = stored
    then[: len(wanted)] = wanted
    different = np.any(now != then, axis=1)
    if not different.any():
        return

    stale = numbers[different[numbers]]
    if stale.size:
        target.execute(
            sa.text("DELETE FROM memberships WHERE segment_id = :id AND block = ANY(CAST(:blocks AS bigint[]))"),
            {"id": segment_id, "blocks": bigint_array(stale.tolist())},
        )
    # A row of zeros is not kept.
    fresh = np.flatnonzero(different & then.any(axis=1))
    if fresh.size:
        append_rows(target, tables.memberships, block=fresh, segment_id=segment_id, bits=then[fresh])


# -- small tables -----------------------------------------------------------------------------------------------------


def _copy_segments(source: sa.Connection, target: sa.Connection, slots: _Slots, counts: dict[int, int]) -> None:
    target.execute(sa.delete(tables.shard_segments))
    rows = [dict(row) for row in source.execute(sa.select(tables.shard_segments)).mappings()]
    for row in rows:
        row["rule_count"] = counts[row["id"]]
        if row["frozen_slot"] is not None:
            before = int(np.searchsorted(slots.old, row["frozen_slot"], side="right"))
            row["frozen_slot"] = int(slots.new[before - 1]) if before else -1
    if rows:
        target.execute(sa.insert(tables.shard_segments), rows)


def _fill_state(source: sa.Connection, target: sa.Connection, half: Half, slots: _Slots) -> None:
    """Write the half's row about itself, marked as not in use: see ``doubling``."""
    row = dict(source.execute(sa.select(tables.shard_state)).mappings().one())
    row |= {
        "shard": half.number,
        "shard_count": half.count,
        "next_slot": slots.next,
        "user_count": slots.ids.size,
        "retired_time": sa.func.now(),
    }
    target.execute(sa.delete(tables.shard_state))
    target.execute(sa.insert(tables.shard_state).values(**row))


def _bring_up_rows(source: sa.Connection, target: sa.Connection, table: sa.Table, owner: str | None, half: Half) -> int:
    """Copy rows as they are. Returns how many differed."""
    mine = half.of(owner) if owner else sql.SQL("true")
    theirs, ours = _hashes(source, table, mine), _hashes(target, table, sql.SQL("true"))
    stale, missing = np.setdiff1d(ours, theirs), np.setdiff1d(theirs, ours)

    for part in _parts(stale):
        query = sql.SQL("DELETE FROM {} AS t WHERE {} = ANY({}::bigint[])").format(
            sql.Identifier(table.name), _HASH, sql.Literal(part)
        )
        _run(target, query)

    columns = sql.SQL(", ").join(sql.Identifier(column.name) for column in table.columns)
    select = sql.SQL("SELECT {} FROM {} AS t WHERE {}").format(columns, sql.Identifier(table.name), mine)
    if missing.size and missing.size == theirs.size:
        copy_query(source, select, target, table)
    else:
        for part in _parts(missing):
            chosen = sql.SQL("{} AND {} = ANY({}::bigint[])").format(select, _HASH, sql.Literal(part))
            copy_query(source, chosen, target, table)
    return int(stale.size + missing.size)


_HASH: Final = sql.SQL("hashtextextended(t::text, 0)")
"""Of a whole row: 64 bits, so that two rows of a table practically never have the same."""


def _hashes(connection: sa.Connection, table: sa.Table, where: sql.Composable) -> Int64s:
    query = sql.SQL("SELECT {} FROM {} AS t WHERE {}").format(_HASH, sql.Identifier(table.name), where)
    hashes: Int64s = copy_rows(connection, query, hash=">i8")["hash"].astype(np.int64)
    return hashes


def _parts(hashes: Int64s) -> Iterator[str]:
    for first in range(0, hashes.size, _ROWS_AT_ONCE):
        yield bigint_array(hashes[first : first + _ROWS_AT_ONCE].tolist())


def _run(connection: sa.Connection, query: sql.Composable) -> None:
    driver: Any = connection.connection.driver_connection
    with driver.cursor() as cursor:
        cursor.execute(query)
