"""Statements that ask which users conditions hold for: a range of slots for one, a batch of users for many."""

from __future__ import annotations

from collections.abc import Iterator, Sequence
from functools import lru_cache
from typing import Any, Final

import numpy as np
import sqlalchemy as sa
from sqlalchemy.dialects.postgresql import JSONB, psycopg2

from segsvc.conditions import parse_condition
from segsvc.domain.sharding import BLOCK_SLOTS
from segsvc.domain.stored import Int64s
from segsvc.postgres.condition_sql import condition_clause

_DIALECT: Final = psycopg2.dialect(paramstyle="format")  # type: ignore[no-untyped-call]
_ATTRIBUTES: Final = sa.literal_column("u.attributes", JSONB)

STATEMENT_CONDITIONS_MAX: Final = 250
STATEMENT_CHARACTERS_MAX: Final = 256 << 10
"""What one statement asks at once: hundreds of usual conditions, few of the longest; bounds its memory and planning."""


@lru_cache(maxsize=8192)
def _clause(condition: str) -> tuple[str, tuple[Any, ...]]:
    """A condition as SQL over ``u.attributes`` with ``%s`` for its parameters, and these."""
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
        bounds.append(("u.slot >= %s AND ", first))
    if end is not None:
        bounds.append(("u.slot < %s AND ", end))
    # One value with four bytes a slot: a row each would take the driver as long as some conditions take the server.
    packed = connection.exec_driver_sql(
        "SELECT string_agg(int4send((u.slot - %s)::int4), ''::bytea) FROM users u "  # noqa: S608  # no value is in it
        f"WHERE {''.join(bound for bound, _ in bounds)}{text}",
        (first, *(value for _, value in bounds), *parameters),
    ).scalar_one()
    return np.frombuffer(packed or b"", dtype=">i4").astype(np.int64) + first


def matching(connection: sa.Connection, conditions: Sequence[str], user_ids: Sequence[int]) -> list[Int64s]:
    """For each condition the positions in ``user_ids`` of those for whom it holds, with the attributes of now."""
    found: list[Int64s] = []
    for part in _parts(conditions):
        clauses = [_clause(condition) for condition in part]
        columns = ", ".join(f"array_agg(k.n) FILTER (WHERE {text})" for text, _ in clauses)
        row = connection.exec_driver_sql(
            f"SELECT {columns} FROM unnest(%s::bigint[]) "  # noqa: S608  # no value is in the text
            "WITH ORDINALITY AS k(id, n) JOIN users u ON u.id = k.id",
            (*(value for _, parameters in clauses for value in parameters), list(user_ids)),
        ).one()
        found += [np.array(positions or (), dtype=np.int64) - 1 for positions in row]
    return found


def _parts(conditions: Sequence[str]) -> Iterator[list[str]]:
    part: list[str] = []
    size = 0
    for condition in conditions:
        length = len(_clause(condition)[0])
        if part and (len(part) == STATEMENT_CONDITIONS_MAX or size + length > STATEMENT_CHARACTERS_MAX):
            yield part
            part, size = [], 0
        part.append(condition)
        size += length
    if part:
        yield part
