"""Versions in SQL: the keys of ``segsvc.conditions.versions``, as arrays of text; NULL is CEL's error."""

from __future__ import annotations

import sqlalchemy as sa
from sqlalchemy.dialects.postgresql import ARRAY, aggregate_order_by, array

from segsvc.conditions import versions
from segsvc.postgres.conditions.values import FENCE, Sql

_TEXTS = ARRAY(sa.Text)


def key_of_literal(value: str) -> Sql:
    key = versions.key_of(value)
    return sa.cast(sa.literal(None if key is None else list(key), _TEXTS), _TEXTS)


def key_of_text(value: Sql) -> Sql:
    """The key of a version in an attribute."""
    found = sa.select(_match(value).label("m")).correlate_except().offset(FENCE).subquery()
    m = found.c.m

    identifiers = (
        sa.func.unnest(sa.func.string_to_array(m[4], ".")).table_valued("i", with_ordinality="n").render_derived()
    )
    identifier = identifiers.c.i
    coded = sa.case(
        (identifier.op("~")(versions.NUMBER), _text(versions.OF_NUMBER).concat(_number(identifier))),
        else_=_text(versions.OF_TEXT).concat(identifier),
    )
    of_pre_release = (
        sa.select(sa.func.array_agg(aggregate_order_by(coded, identifiers.c.n), type_=_TEXTS))
        .correlate(found)
        .scalar_subquery()
    )

    numbers = [_number(m[group]) for group in (1, 2, 3)]
    key = sa.case(
        (m[4].is_(None), array([*numbers, _text(versions.RELEASE)])),
        else_=sa.func.array_cat(array([*numbers, _text(versions.PRE_RELEASE)]), of_pre_release, type_=_TEXTS),
    )
    return sa.select(key).where(m.is_not(None)).scalar_subquery()


def is_version(value: Sql) -> Sql:
    return value.op("~", return_type=sa.Boolean())(sa.literal(versions.PATTERN, sa.Text))


def order_of(left: Sql, right: Sql) -> Sql:
    """-1, 0 or 1; NULL if either is NULL. Code points decide, not the database's language."""
    return sa.func.btarraycmp(left.collate("C"), right, type_=sa.Integer)


def _match(value: Sql) -> Sql:
    return sa.func.regexp_match(value, sa.literal(versions.PATTERN, sa.Text), type_=_TEXTS)


def _number(digits: Sql) -> Sql:
    length = sa.func.lpad(sa.func.length(digits).cast(sa.Text), versions.LENGTH_DIGITS, "0", type_=sa.Text)
    return length.concat(digits)


def _text(value: str) -> Sql:
    return sa.literal_column(f"'{value}'", sa.Text)
