"""Conditions over attributes that were extracted from the object first: many conditions over the same users.

Looking an attribute up in a JSONB object costs more than comparing it, and every condition would look it up again. So
the attributes of a batch become columns, the type of each value is checked once, and the conditions are compiled over
these columns. They mean the same: it is the same compiler, which finds attributes in another place.
"""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from typing import Any

import sqlalchemy as sa
from sqlalchemy.dialects.postgresql import JSONB

from segsvc.conditions import Condition, tree
from segsvc.conditions.tree import Scalar, attributes_of
from segsvc.postgres.conditions.literals import ORDER, decimal
from segsvc.postgres.conditions.sql import Compiler
from segsvc.postgres.conditions.values import FENCE, Sql, number_or_null, whole


@dataclass(frozen=True, slots=True)
class Extracted:
    """An attribute as columns.

    Attributes:
        json: its value; NULL: absent.
        number: its value as numeric; NULL: absent, or of another type.
        text: its value as text, whatever its type; NULL: absent.
    """

    json: Sql
    number: Sql
    text: Sql


def clauses_over_columns(
    conditions: Sequence[Condition], users: sa.FromClause, keys: list[sa.ColumnElement[Any]], where: Sql
) -> tuple[sa.Subquery, list[sa.ColumnElement[bool]]]:
    """A subquery of the users' keys and attributes, and over it each condition: true where it holds, never NULL.

    Args:
        users: with a column ``attributes``.
        keys: columns of ``users`` that the subquery shall have.
        where: which of the users.
    """
    names = sorted(frozenset().union(*(attributes_of(condition.root) for condition in conditions)))
    found, attributes = in_columns(names, users, keys, where)
    compiler = Compiler(attributes)
    return found, [compiler.clause(condition) for condition in conditions]


def in_columns(
    names: Sequence[str], users: sa.FromClause, keys: list[sa.ColumnElement[Any]], where: Sql
) -> tuple[sa.Subquery, InColumns]:
    """A subquery of the users' keys and of the attributes with these names, and where the compiler finds them in it."""
    in_memory = (
        sa.select(*keys, whole(users.c.attributes).label("attributes")).where(where).offset(FENCE).subquery("in_memory")
    )
    attributes = in_memory.c.attributes

    looked_up = (
        sa.select(
            *(column for column in in_memory.c if column is not attributes),
            *(
                attributes.op("->", return_type=JSONB())(sa.literal(name, sa.Text)).label(f"j{n}")
                for n, name in enumerate(names)
            ),
            # Not from the value above: making a value and reading it again costs as much as looking it up.
            *(
                attributes.op("->>", return_type=sa.Text())(sa.literal(name, sa.Text)).label(f"t{n}")
                for n, name in enumerate(names)
            ),
        )
        .offset(FENCE)
        .subquery("looked_up")
    )

    typed = (
        sa.select(
            *looked_up.c,
            *(number_or_null(looked_up.c[f"j{n}"]).label(f"n{n}") for n in range(len(names))),
        )
        .offset(FENCE)
        .subquery("x")
    )

    columns = {name: Extracted(typed.c[f"j{n}"], typed.c[f"n{n}"], typed.c[f"t{n}"]) for n, name in enumerate(names)}
    return typed, InColumns(columns)


class InColumns:
    """``Attributes`` that were extracted.

    Attributes:
        used: the columns that the compiler asked for; the server does not compute the rest.
    """

    def __init__(self, extracted: Mapping[str, Extracted]) -> None:
        self._extracted = extracted
        self.used: dict[str, Sql] = {}

    def has(self, name: str) -> Sql:
        return self.json(name).is_not(None)

    def json(self, name: str) -> Sql:
        return self._use(f"json {name}", self._extracted[name].json)

    def text(self, name: str) -> Sql:
        return self._use(f"text {name}", self._extracted[name].text)

    def ordered(self, op: tree.Comparison, name: str, number: Scalar) -> Sql:
        # NULL, which is an error, for a value that is not a number.
        column = self._use(f"number {name}", self._extracted[name].number)
        ordered: Sql = ORDER[op](column, sa.literal(decimal(number), sa.Numeric))
        return ordered

    def _use(self, what: str, column: Sql) -> Sql:
        self.used[what] = column
        return column
