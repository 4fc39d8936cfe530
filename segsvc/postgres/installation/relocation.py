"""One command at a time moves a shard or doubles their number."""

from __future__ import annotations

from collections.abc import Iterator
from contextlib import contextmanager
from datetime import datetime

import sqlalchemy as sa

from segsvc.config import Settings
from segsvc.postgres import tables
from segsvc.postgres.engine import Pool, make_engine, translated
from segsvc.postgres.installation.closing import MoveRefused
from segsvc.postgres.locks import MOVE_LOCK


@contextmanager
def relocating(settings: Settings) -> Iterator[sa.Connection]:
    """A session of the catalog that holds the lock of commands which move shards or double their number.

    Raises:
        MoveRefused: another such command runs.
    """
    engine = make_engine(settings.catalog_dsn, settings, "setup", Pool(1))
    try:
        with translated("catalog"), engine.connect() as session:
            session.execution_options(isolation_level="AUTOCOMMIT")
            if not session.execute(sa.select(sa.func.pg_try_advisory_lock(MOVE_LOCK))).scalar_one():
                problem = "another command moves a shard or doubles their number"
                raise MoveRefused("the catalog", problem, "wait for its end")
            yield session
    finally:
        engine.dispose()


def layout_state(catalog: sa.Connection) -> tuple[int, datetime | None]:
    """The number of shards in force, and since when they are switched."""
    row = catalog.execute(sa.select(tables.installation.c.shard_count, tables.installation.c.switch_time)).one()
    return row.shard_count, row.switch_time


def refuse_while_switched(catalog: sa.Connection) -> None:
    """Raises MoveRefused while shards are doubled: a shard that is opened then would take writes that get lost."""
    _, since = layout_state(catalog)
    if since is not None:
        problem = f"the shards are being doubled since {since.isoformat(timespec='seconds')}"
        raise MoveRefused("the catalog", problem, "end that with `segsvc shards double`, or with its option --undo")
