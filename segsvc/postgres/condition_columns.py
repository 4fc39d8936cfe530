"""Conditions over attributes that were taken out of the object before: many conditions, the same users.

To look an attribute up in a JSONB object costs more than to compare it, and every condition looks again. So the batch's
attributes become columns, each value with its type looked at once, and the conditions are compiled over these. They
mean the same: it is the same compiler, reaching for attributes elsewhere.
"""

from __future__ import annotations

from collections.abc import Callable, Mapping, Sequence
from dataclasses import dataclass
from decimal import Decimal
from typing import Any

import sqlalchemy as sa
from sqlalchemy.dialects.postgresql import ARRAY, JSONB

from segsvc.conditions import Condition, tree
from segsvc.conditions.tree import Constant, Node, Scalar, attributes_of
from segsvc.postgres.condition_sql import Compiler, Sql, is_large_number, number_or_null, text_or_null

COLUMNS_EACH = 3
"""Columns of the subquery for each attribute; PostgreSQL allows 1664 in all."""


@dataclass(frozen=True, slots=True)
class Extracted:
    """An attribute as columns.

    Attributes:
        json: its value; NULL: absent.
        number, text: its value as numeric and as text (collation "C"); NULL: absent, or of another type.
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
        keys: columns of ``users`` to have in the subquery.
        where: which of the users.
    """
    names = sorted(frozenset().union(*(attributes_of(condition.root) for condition in conditions)))
    attributes = users.c.attributes
    # OFFSET 0 keeps the planner from putting the expressions back into each place where a column is used.
    fence: sa.ColumnElement[int] = sa.literal_column("0", sa.Integer)
    looked_up = (
        sa.select(
            *keys,
            *(
                attributes.op("->", return_type=JSONB())(sa.literal(name, sa.Text)).label(f"j{n}")
                for n, name in enumerate(names)
            ),
        )
        .where(where)
        .offset(fence)
        .subquery("looked_up")
    )
    typed = (
        sa.select(
            *looked_up.c,
            *(number_or_null(looked_up.c[f"j{n}"]).label(f"n{n}") for n in range(len(names))),
            *(text_or_null(looked_up.c[f"j{n}"]).label(f"t{n}") for n in range(len(names))),
        )
        .offset(fence)
        .subquery("x")
    )
    columns = {
        name: Extracted(typed.c[f"j{n}"], typed.c[f"n{n}"], typed.c[f"t{n}"].collate("C"))
        for n, name in enumerate(names)
    }
    compiler = _OverColumns(columns)
    return typed, [compiler.clause(condition) for condition in conditions]


class _OverColumns(Compiler):
    def __init__(self, extracted: Mapping[str, Extracted]) -> None:
        self._extracted = extracted

    def _has(self, name: str) -> Sql:
        return self._extracted[name].json.is_not(None)

    def _attribute(self, name: str) -> Sql:
        return self._extracted[name].json

    def _equal(self, left: Node, right: Node) -> Sql:
        if isinstance(left, Constant):
            left, right = right, left
        if isinstance(left, tree.Attribute) and _is_text(right):
            return self._one_of(left, [right])
        return super()._equal(left, right)

    def _one_of(self, item: Node, constants: list[Node]) -> Sql:
        values = [each.value for each in constants if isinstance(each, Constant) and isinstance(each.value, str)]
        if not isinstance(item, tree.Attribute) or len(values) != len(constants):
            return super()._one_of(item, constants)
        attribute = self._extracted[item.name]
        wanted = sa.literal(values[0], sa.Text) if len(values) == 1 else sa.any_(sa.literal(values, ARRAY(sa.Text)))
        # What is there and no string equals none of them; what is absent is an error.
        return sa.case(
            (attribute.text.is_not(None), attribute.text == wanted), (attribute.json.is_not(None), sa.false())
        )

    def _string(self, node: Node) -> Sql:
        return self._extracted[node.name].text if isinstance(node, tree.Attribute) else super()._string(node)

    def _ordered_to_literal(self, compare: Callable[[Any, Any], Any], node: Node, literal: Scalar) -> Sql:
        if isinstance(node, tree.Attribute) and not isinstance(literal, bool):
            attribute = self._extracted[node.name]
            # NULL, an error, for what is of another type.
            if isinstance(literal, str):
                return _compared(compare, attribute.text, sa.literal(literal, sa.Text))
            if not is_large_number(Constant(literal)):
                return _compared(compare, attribute.number, sa.literal(Decimal(repr(literal)), sa.Numeric))
        return super()._ordered_to_literal(compare, node, literal)


def _compared(compare: Callable[[Any, Any], Any], one: Sql, other: Sql) -> Sql:
    compared: Sql = compare(one, other)
    return compared


def _is_text(node: Node) -> bool:
    return isinstance(node, Constant) and isinstance(node.value, str)
