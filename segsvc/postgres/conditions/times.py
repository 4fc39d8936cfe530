"""Times in SQL: ``segsvc.conditions.times`` for attributes. A time is a numeric of ticks since 1970; NULL: CEL's error.

As jsonb, where a time is an item of a list or beside a value of another type, it is an object with the member "time":
no attribute is an object.
"""

from __future__ import annotations

import sqlalchemy as sa
from sqlalchemy.dialects.postgresql import ARRAY, JSONB

from segsvc.conditions import times
from segsvc.postgres.conditions.values import FENCE, Sql, is_double, is_type, numeric, text, when

_TICKS = sa.literal_column(str(times.TICKS), sa.Numeric)


def time_of_literal(value: str) -> Sql:
    return sa.cast(sa.literal(times.ticks_of(value), sa.Numeric), sa.Numeric)


def time_of(value: Sql) -> Sql:
    """The time in a jsonb value: a string of RFC 3339, or an int of seconds."""
    seconds = numeric(value)
    in_range = seconds.between(sa.literal_column(str(times.FIRST_S)), sa.literal_column(str(times.LAST_S)))
    return sa.case(
        (is_type(value, "string"), time_of_text(text(value))),
        (is_type(value, "number"), when(sa.and_(sa.not_(is_double(value)), in_range), seconds * _TICKS)),
    )


def as_json(time: Sql) -> Sql:
    """NULL stays NULL, which jsonb_build_object would turn into an object."""
    start, end = sa.literal_column("'{\"time\": '", sa.Text), sa.literal_column("'}'", sa.Text)
    return start.concat(time.cast(sa.Text)).concat(end).cast(JSONB)


def time_of_text(value: Sql) -> Sql:
    """The time that a text says. Each step is a subquery, because it uses each result of the step before it often."""
    found = (
        sa.select(sa.func.regexp_match(value, sa.literal(times.PATTERN, sa.Text), type_=ARRAY(sa.Text)).label("m"))
        .correlate_except()
        .offset(FENCE)
        .subquery()
    )

    def part(group: int) -> Sql:
        return sa.func.coalesce(found.c.m[group].cast(sa.BigInteger), 0)

    fraction = sa.func.rpad(sa.func.left(found.c.m[7], times.FRACTION_DIGITS), times.FRACTION_DIGITS, "0")
    parts = (
        sa.select(
            *(part(number).label(name) for number, name in enumerate(("y", "mo", "d", "h", "mi", "s"), 1)),
            sa.func.coalesce(fraction.cast(sa.Numeric), 0).label("fraction"),
            sa.case((found.c.m[8] == "-", 1), else_=-1).label("sign"),
            *(part(number).label(name) for number, name in ((9, "oh"), (10, "om"), (11, "os"))),
        )
        .where(found.c.m.is_not(None))
        .offset(FENCE)
        .subquery()
    )

    p = parts.c
    leap = sa.and_(p.y % 4 == 0, sa.or_(p.y % 100 != 0, p.y % 400 == 0))
    last_day = sa.case(
        (p.mo == 2, sa.case((leap, 29), else_=28)),
        (p.mo.in_([sa.literal_column(n) for n in "469"] + [sa.literal_column("11")]), 30),
        else_=31,
    )
    valid = sa.and_(
        p.mo.between(1, 12),
        p.d.between(1, last_day),
        p.h <= 23,
        p.mi <= 59,
        p.s <= 60,
        p.oh <= 23,
        p.om <= 59,
        p.os <= 59,
    )

    seconds = ((_days(p) * 24 + p.h) * 60 + p.mi) * 60 + p.s + p.sign * ((p.oh * 60 + p.om) * 60 + p.os)
    # As in Python: the fraction in ticks, rounded down; none in a leap second.
    below = sa.case(
        (p.s == 60, 0), else_=sa.func.div(p.fraction * _TICKS, sa.literal_column(str(10**times.FRACTION_DIGITS)))
    )
    ticks = sa.select((seconds.cast(sa.Numeric) * _TICKS + below).label("t")).where(valid).offset(FENCE).subquery()
    bounds: tuple[Sql, Sql] = (sa.literal_column(str(times.FIRST)), sa.literal_column(str(times.LAST)))
    return sa.select(ticks.c.t).where(ticks.c.t.between(*bounds)).scalar_subquery()


def _days(p: sa.ColumnCollection[str, sa.ColumnElement[int]]) -> Sql:
    """``times.days_since_1970``. The operator // of SQLAlchemy divides integers as PostgreSQL does."""
    years = p.y + 400 - sa.case((p.mo <= 2, 1), else_=0)
    day_of_year = (153 * ((p.mo + 9) % 12) + 2) // 5 + p.d - 1
    days: Sql = years * 365 + years // 4 - years // 100 + years // 400 + day_of_year
    return days - (146_097 + times.DAYS_BEFORE_1970)
