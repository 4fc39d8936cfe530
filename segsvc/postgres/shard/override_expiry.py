"""Whether an override still holds: the condition that every statement about overrides shares."""

from __future__ import annotations

import sqlalchemy as sa

from segsvc.postgres import tables


def holds_now() -> sa.ColumnElement[bool]:
    """Whether an override has not expired when the statement begins, by the shard's clock.

    Not when its transaction began (``now()``): that may have waited for a lock since.
    """
    expire_time = tables.overrides.c.expire_time
    return sa.or_(expire_time.is_(None), expire_time > sa.func.statement_timestamp())
