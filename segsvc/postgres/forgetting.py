"""Deletes rows that nobody needs any more.

Nobody waits for upkeep, so it waits for nobody: a row that somebody has locked is left to the next round. So it can
have no part in a deadlock either.
"""

from __future__ import annotations

from collections.abc import Callable
from contextlib import AbstractContextManager
from datetime import datetime
from typing import Final

import sqlalchemy as sa

ROWS_AT_ONCE: Final = 10_000
"""Rows that one transaction forgets: however many there are, each is short, and locks few."""


def older_than(column: sa.ColumnElement[datetime], ttl_s: int) -> sa.ColumnElement[bool]:
    """Rows whose time is longer ago than ``ttl_s`` seconds."""
    return column < sa.func.now() - sa.func.make_interval(0, 0, 0, 0, 0, 0, ttl_s)


def forget(
    begin: Callable[[], AbstractContextManager[sa.Connection]], table: sa.Table, old: sa.ColumnElement[bool]
) -> None:
    """Delete the rows of a table that are old and that nobody has locked, some in each transaction."""
    key = list(table.primary_key.columns)
    some = sa.select(*key).where(old).limit(ROWS_AT_ONCE).with_for_update(skip_locked=True).cte("some")
    statement = sa.delete(table).where(*(column == some.c[column.name] for column in key))
    forgotten = ROWS_AT_ONCE
    while forgotten == ROWS_AT_ONCE:
        with begin() as connection:
            forgotten = connection.execute(statement).rowcount
