"""Deletes rows that are no longer needed.

No caller waits for upkeep, so upkeep waits for no lock: a row that another transaction has locked is left to the next
round. So upkeep cannot take part in a deadlock either.
"""

from __future__ import annotations

from collections.abc import Callable
from contextlib import AbstractContextManager
from datetime import datetime
from typing import Final

import sqlalchemy as sa

ROWS_AT_ONCE: Final = 10_000
"""Rows that one transaction deletes. So each transaction is short and locks few rows, however many there are to
delete."""


def older_than(column: sa.ColumnElement[datetime], ttl_s: int) -> sa.ColumnElement[bool]:
    """Whether a row's time is more than ``ttl_s`` seconds ago."""
    return column < sa.func.now() - sa.func.make_interval(0, 0, 0, 0, 0, 0, ttl_s)


def forget(
    begin: Callable[[], AbstractContextManager[sa.Connection]], table: sa.Table, old: sa.ColumnElement[bool]
) -> None:
    """Delete the rows of a table that are old and not locked, at most ROWS_AT_ONCE in each transaction."""
    key = list(table.primary_key.columns)
    some = sa.select(*key).where(old).limit(ROWS_AT_ONCE).with_for_update(skip_locked=True).cte("some")
    statement = sa.delete(table).where(*(column == some.c[column.name] for column in key))
    forgotten = ROWS_AT_ONCE
    while forgotten == ROWS_AT_ONCE:
        with begin() as connection:
            forgotten = connection.execute(statement).rowcount
