"""Statements that ask for which users conditions hold: one condition over a range of slots, or many over a batch."""

from __future__ import annotations

from collections.abc import Iterator, Sequence
from functools import lru_cache, reduce
from typing import Any, Final

import numpy as np
import numpy.typing as npt
import sqlalchemy as sa
from psycopg2 import sql
from sqlalchemy.dialects.postgresql import ARRAY, JSONB, psycopg2

from segsvc.conditions import parse_condition
from segsvc.conditions.tree import attributes_of
from segsvc.domain.segment import SEGMENTS_MAX
from segsvc.domain.sharding import BLOCK_SLOTS
from segsvc.domain.stored import Int64s
from segsvc.postgres import tables
from segsvc.postgres.conditions.columns import clauses_over_columns
from segsvc.postgres.conditions.sql import condition_clause
from segsvc.postgres.conditions.values import whole
from segsvc.postgres.copying import copy_rows

_DIALECT: Final = psycopg2.dialect(paramstyle="format")  # type: ignore[no-untyped-call]
_ATTRIBUTES: Final = sa.literal_column("u.attributes", JSONB)
_WHOLE: Final = str(whole(sa.literal_column("attributes", JSONB)).compile(dialect=_DIALECT))

STATEMENT_CONDITIONS_MAX: Final = 250
STATEMENT_CHARACTERS_MAX: Final = 256 << 10
"""How much one statement asks at once: hundreds of usual conditions, or a few of the longest ones. This bounds its
memory and the time to plan it."""
STATEMENT_ATTRIBUTES_MAX: Final = 500
"""Each attribute becomes three columns of a subquery, and PostgreSQL allows 1664 columns. (A single condition has room
for 520 attributes.)"""


WORD_CONDITIONS: Final = 63
"""Bits of a bigint without its sign."""


# Needed a few times in a row, for parts of one shard. A clause can take half a MB, so no more are kept.
@lru_cache(maxsize=16)
def _clause(condition: str) -> tuple[str, tuple[Any, ...]]:
    """A condition as SQL over ``u.attributes`` with ``%s`` for its parameters, and the parameters."""
    compiled = condition_clause(parse_condition(condition), _ATTRIBUTES).compile(dialect=_DIALECT)
    values = compiled.construct_params(escape_names=False)
    return str(compiled), tuple(values[name] for name in compiled.positiontup or ())


def slots_where(connection: sa.Connection, condition: str, first_block: int, blocks: int | None) -> Int64s:
    """Slots of the users of a range of blocks (None: of all from the first on) for whom a condition holds.

    They come in any order.
    """
    first = first_block * BLOCK_SLOTS
    end = None if blocks is None else first + blocks * BLOCK_SLOTS
    text, parameters = _clause(condition)

    bounds: list[tuple[str, int]] = []
    if first:
        bounds.append(("slot >= %s", first))
    if end is not None:
        bounds.append(("slot < %s", end))
    where = f"WHERE {' AND '.join(bound for bound, _ in bounds)} " if bounds else ""

    # One value with four bytes a slot: reading one row a slot would take the driver as long as some conditions take the
    # server.
    packed = connection.exec_driver_sql(
        "SELECT string_agg(int4send((u.slot - %s)::int4), ''::bytea) FROM ("  # noqa: S608  # no value is in it
        f"SELECT slot, {_WHOLE} AS attributes FROM users {where}OFFSET 0) u WHERE {text}",
        (first, *(value for _, value in bounds), *parameters),
    ).scalar_one()
    return np.frombuffer(packed or b"", dtype=">i4").astype(np.int64) + first


def matching(
    connection: sa.Connection, conditions: Sequence[str], slots: Int64s
) -> Iterator[tuple[str, npt.NDArray[np.bool_]]]:
    """For each condition in turn, for which of the users in these slots it holds, by their present attributes."""
    order = np.argsort(slots)
    ascending = slots[order]
    # The slots of new users are consecutive: a range is found faster than the same number of single slots.
    is_range = slots.size > 0 and ascending[-1] - ascending[0] == slots.size - 1
    where = {"first": int(ascending[0]), "last": int(ascending[-1])} if is_range else {"slots": slots.tolist()}

    driver: Any = connection.connection.driver_connection
    for part in _parts(tuple(conditions)):
        text, names, values = _users_statement(part, is_range)
        values = values | where
        with driver.cursor() as cursor:
            query = cursor.mogrify(text, [values[name] for name in names])

        words = [f"holds{number}" for number in range(-(-len(part) // WORD_CONDITIONS))]
        rows = copy_rows(connection, sql.SQL(query.decode()), slot=">i8", **dict.fromkeys(words, ">i8"))

        places = order[np.searchsorted(ascending, rows["slot"].astype(np.int64))]
        for number, word in enumerate(words):
            # Eight bytes a user, lowest byte first, and in each byte the lowest bit first.
            in_order = np.zeros(slots.size, dtype="<i8")
            in_order[places] = rows[word]
            holds = np.unpackbits(in_order.view(np.uint8).reshape(-1, 8), axis=1, bitorder="little").view(np.bool_)
            conditions_of_word = part[number * WORD_CONDITIONS : (number + 1) * WORD_CONDITIONS]
            yield from zip(conditions_of_word, holds.T, strict=False)  # the last bits belong to no condition


@lru_cache(maxsize=64)  # as many as 4096 conditions need, for ranges and for lists of slots
def _users_statement(conditions: tuple[str, ...], is_range: bool) -> tuple[str, tuple[str, ...], dict[str, Any]]:
    """The statement that returns users with one bit for each condition: its text, the names of its parameters in order,
    and the values of all parameters except those that select the users.

    Bits of a bigint, because sending a boolean array costs a call and an allocation for each item.
    """
    users = tables.users
    where = (
        users.c.slot.between(sa.bindparam("first", type_=sa.BigInteger), sa.bindparam("last", type_=sa.BigInteger))
        if is_range
        else users.c.slot == sa.any_(sa.bindparam("slots", type_=ARRAY(sa.BigInteger)))
    )

    found, clauses = clauses_over_columns(list(map(parse_condition, conditions)), users, [users.c.slot], where)
    words = [_word(clauses[first : first + WORD_CONDITIONS]) for first in range(0, len(clauses), WORD_CONDITIONS)]
    compiled = sa.select(found.c.slot, *words).compile(dialect=_DIALECT)
    # The compiled statement itself is not kept, because it holds everything that it was built from: fifteen times as
    # much.
    of_users = dict.fromkeys(("first", "last") if is_range else ("slots",))
    values = dict(compiled.construct_params(of_users, escape_names=False))
    return str(compiled), tuple(compiled.positiontup or ()), values


def _word(clauses: Sequence[sa.ColumnElement[bool]]) -> sa.ColumnElement[int]:
    zero: sa.ColumnElement[int] = sa.literal_column("0::bigint", sa.BigInteger)
    bits: Iterator[sa.ColumnElement[int]] = (
        sa.case((clause, sa.literal_column(f"{1 << bit}::bigint", sa.BigInteger)), else_=zero)
        for bit, clause in enumerate(clauses)
    )
    return reduce(lambda word, bit: word.bitwise_or(bit), bits)


@lru_cache(maxsize=2 * SEGMENTS_MAX)
def _needs(condition: str) -> tuple[int, frozenset[str]]:
    """What a condition needs in a statement: its number of characters, and the attributes that it reads."""
    return len(_clause(condition)[0]), attributes_of(parse_condition(condition).root)


@lru_cache(maxsize=32)
def _parts(conditions: tuple[str, ...]) -> tuple[tuple[str, ...], ...]:
    """Conditions in groups that one statement asks together. Cached, because parsing a condition takes longer than
    asking it."""
    parts: list[tuple[str, ...]] = []
    part: list[str] = []
    size = 0
    names: frozenset[str] = frozenset()

    for condition in conditions:
        length, read = _needs(condition)
        if part and (
            len(part) == STATEMENT_CONDITIONS_MAX
            or size + length > STATEMENT_CHARACTERS_MAX
            or len(names | read) > STATEMENT_ATTRIBUTES_MAX
        ):
            parts.append(tuple(part))
            part, size, names = [], 0, frozenset()

        part.append(condition)
        size += length
        names |= read

    return (*parts, tuple(part)) if part else ()
