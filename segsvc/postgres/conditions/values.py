"""Values of attributes in SQL: jsonb that may be of any type, whose type is checked before it is compared.

A CASE checks the type around each expression that relies on it, so that no user's attributes can make a statement fail.
NULL is CEL's error. Numbers are ints if their scale is 0, and doubles if it is not (``domain.events`` writes them so).
"""

from __future__ import annotations

from typing import Any, Final

import sqlalchemy as sa
from sqlalchemy.dialects.postgresql import JSONB

from segsvc.conditions.tree import Comparison, Constant, Scalar
from segsvc.postgres.conditions.literals import ORDER, decimal, is_large_number

Sql = sa.ColumnElement[Any]

FENCE: Final[sa.ColumnElement[int]] = sa.literal_column("0", sa.Integer)
"""OFFSET 0: it keeps the planner from inlining a subquery's expressions into each place where a column is used."""


def when(check: Sql, value: Sql) -> Sql:
    """The value where the check is true, NULL elsewhere; the value is evaluated only where the check is true."""
    return sa.case((check, value))


def whole(attributes: Sql) -> Sql:
    """The same attributes in one piece in memory, for a column of a fenced subquery.

    Beyond 2 KB a row's attributes are compressed and stored in another table, and every operator would fetch and unpack
    them again. A concatenation with an empty object does this once, and its result is in memory.
    """
    return concatenated(attributes, sa.literal_column("'{}'::jsonb", JSONB))


def concatenated(one: Sql, other: Sql) -> Sql:
    return one.op("||", return_type=JSONB())(other)


def number_or_null(value: Sql) -> Sql:
    """A jsonb number as numeric; NULL: it is not a number."""
    return when(is_type(value, "number"), numeric(value))


def is_type(value: Sql, kind: str) -> Sql:
    return sa.func.jsonb_typeof(value) == kind


def text(value: Sql) -> Sql:
    """A jsonb string's text; its order is that of code points."""
    return value.op("#>>", return_type=sa.Text())(sa.text("'{}'")).collate("C")


def numeric(value: Sql) -> Sql:
    return value.cast(sa.Numeric)


def double(value: Sql) -> Sql:
    return numeric(value).cast(sa.Double)


def is_double(value: Sql) -> Sql:
    return sa.func.scale(numeric(value)) > 0


def numbers_equal(one: Sql, other: Sql) -> Sql:
    return sa.case(
        (is_double(one) == is_double(other), numeric(one) == numeric(other)),
        else_=double(one) == double(other),
    )


def equal_to_large(value: Sql, number: Scalar) -> Sql:
    """Equality with a literal number whose size is 2**53 or more. NULL only if the value is NULL."""
    as_double = double(value) == sa.literal(float(number), sa.Double)
    exactly = numeric(value) == sa.literal(decimal(number), sa.Numeric)
    equal = as_double if isinstance(number, float) else sa.case((is_double(value), as_double), else_=exactly)
    return sa.case((is_type(value, "number"), equal), (value.is_not(None), sa.false()))


def ordered_to_literal(op: Comparison, value: Sql, scalar: Scalar) -> Sql:
    compare = ORDER[op]
    if isinstance(scalar, bool):
        return when(is_type(value, "boolean"), compare(value.cast(sa.Boolean), sa.literal(scalar)))
    if isinstance(scalar, str):
        before, zero, _ = scalar.partition("\0")
        if zero:
            # No attribute has a U+0000, so none lies between the text before it and the whole text.
            compare = ORDER["<=" if op in ("<", "<=") else ">"]
        return when(is_type(value, "string"), compare(text(value), sa.literal(before, sa.Text)))

    if not is_large_number(Constant(scalar)):
        return when(is_type(value, "number"), compare(numeric(value), sa.literal(decimal(scalar), sa.Numeric)))
    as_double = compare(double(value), sa.literal(float(scalar), sa.Double))
    if isinstance(scalar, float):
        return when(is_type(value, "number"), as_double)
    exactly = compare(numeric(value), sa.literal(decimal(scalar), sa.Numeric))
    return when(is_type(value, "number"), sa.case((is_double(value), as_double), else_=exactly))
