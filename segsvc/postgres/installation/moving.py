"""Moves a shard to another database while reads go on: the shard is copied, then one copy is fenced and the other
opened.

While both exist, PostgreSQL refuses writes to both (``default_transaction_read_only`` of the database, for every
session). So both give the same answers, and readers may use either. ``copy`` makes the second database; ``fence`` takes
one of the two out of use for ever; ``reopen`` allows writes to the remaining one. In that order no reader can see old
data: see docs/operations.md, "Moving a shard to another server", and ADR 0016.
"""

from __future__ import annotations

import time
from collections.abc import Callable
from contextlib import ExitStack
from dataclasses import dataclass
from typing import Any, Final

import sqlalchemy as sa
from alembic import command

from segsvc.config import Settings
from segsvc.postgres import tables
from segsvc.postgres.copying import copy_table
from segsvc.postgres.engine import Pool, make_engine, translated
from segsvc.postgres.installation import closing, identity
from segsvc.postgres.installation.closing import MoveRefused
from segsvc.postgres.installation.identity import Database, Finding, Seen
from segsvc.postgres.installation.migrate import alembic_config, head
from segsvc.postgres.installation.relocation import refuse_while_switched, relocating
from segsvc.postgres.installation.roles import grant_if_they_exist, roles_of
from segsvc.postgres.shard.participant import select_prepared

_SETTLE_WAIT_S: Final = 5.0
_SETTLE_FIRST: Final = "end that one with `segsvc shards settle`"


@dataclass(frozen=True, slots=True)
class Copied:
    """Attributes:
    users: rows of the table ``users``.
    copy_s: how long the copy took; writes to the shard have waited since its start.
    """

    users: int
    copy_s: float


# -- the copy -------------------------------------------------------------------------------------------------------


def copy(
    settings: Settings, shard: int, target_dsn: str, progress: Callable[[int, int], None] = lambda done, total: None
) -> Copied:
    """Close the shard to writes and copy it into an empty database, which is closed as well.

    Waits for operations and batches that work on the shard; nothing can be prepared there afterwards.

    Args:
        progress: called after each table with how many tables are copied, and how many there are.

    Raises:
        MoveRefused: a database is not what it must be, or the shard stays in doubt. The shard is unchanged.
        ServiceError: UNAVAILABLE, a database went away. If this happened at the very end, both may exist and be closed.
    """
    source, target = _databases(settings, shard, target_dsn)
    with ExitStack() as stack:
        refuse_while_switched(stack.enter_context(relocating(settings)))
        stack.callback(source.engine.dispose)
        stack.callback(target.engine.dispose)
        _refuse_unless_movable(settings, shard, source, target, target_dsn)
        guard = stack.enter_context(closing.locked(source, shard, wait_s=settings.operation_deadline_s + 30))
        if _seen(source).closed:
            raise MoveRefused(source.name, "it is closed to writes: a move was begun", _SETTLE_FIRST)

        began = time.monotonic()
        try:
            closed_at = closing.close(guard)
            target_session = stack.enter_context(target.engine.connect())
            users = _copy_tables(source, target_session, shard, progress)
            if refused := grant_if_they_exist(target_session, "the new database", roles_of(settings)):
                raise MoveRefused(refused.where, refused.problem, refused.remedy)
        except BaseException:
            closing.open_again(guard)  # the target is empty: its transaction is not committed, and never will be
            raise

        # From here on both may exist. If the answer is lost, the shard stays closed, and `settle` determines which
        # database is kept.
        with translated(shard):
            target_session.commit()
        # Once more: a session that was being opened when the shard was closed may have been missed.
        closing.end_sessions(guard, before=closed_at, spare_readers=True)
        return Copied(users, time.monotonic() - began)


def _databases(settings: Settings, shard: int, other_dsn: str) -> tuple[Database, Database]:
    """The shard as the settings name it, and the other database of the move."""
    pool = Pool(size=2)
    return (
        Database(make_engine(settings.shard_dsns[shard], settings, "setup", pool), shard),
        Database(make_engine(other_dsn, settings, "setup", pool), shard),
    )


def _seen(database: Database, name: str = "") -> Seen:
    what = identity.look(database)
    if isinstance(what, Finding):
        raise MoveRefused(name or what.where, what.problem, what.remedy)
    return what


def _refuse_unless_ours(settings: Settings, shard: int) -> Seen:
    """The shard that the settings name. Raises MoveRefused if it is not the right one of this installation."""
    with identity.open_databases(settings) as databases:
        seen = {database: _seen(database) for database in databases if database.shard in (None, shard)}
        found = identity.wrong_databases(settings, seen)
        if found:
            raise MoveRefused(found[0].where, found[0].problem, found[0].remedy)
        return next(what for database, what in seen.items() if database.shard == shard)


def _refuse_unless_movable(settings: Settings, shard: int, source: Database, target: Database, target_dsn: str) -> None:
    what = _refuse_unless_ours(settings, shard)
    if what.revision != head("shard"):
        raise MoveRefused(source.name, f"its schema is at {what.revision}", "run `segsvc migrate` first")
    if what.closed:
        raise MoveRefused(source.name, "it is closed to writes: a move was begun", _SETTLE_FIRST)
    if not _is_empty(target):
        raise MoveRefused("the new database", "it is not empty", "give an empty one")
    for finding in identity.unfit({target: _seen(target, "the new database")}):
        raise MoveRefused("the new database", finding.problem, finding.remedy)

    dsns = [*settings.shard_dsns]
    dsns[shard] = target_dsn
    with identity.open_databases(settings.model_copy(update={"shard_dsns": tuple(dsns)})) as databases:
        for finding in identity.scarce_prepared_transactions({database: _seen(database) for database in databases}):
            raise MoveRefused(finding.where, finding.problem, finding.remedy)


def _copy_tables(source: Database, target: sa.Connection, shard: int, progress: Callable[[int, int], None]) -> int:
    """Make the schema and copy every table, all in one snapshot. Does not commit. Returns the number of users."""
    with translated(shard), source.engine.connect() as reading:
        reading.execution_options(isolation_level="REPEATABLE READ")
        closing.unbounded(reading)
        closing.unbounded(target)

        command.upgrade(alembic_config("shard", target), "head")
        all_tables = tables.shard.sorted_tables
        for number, table in enumerate(all_tables, 1):
            copy_table(reading, target, table)
            progress(number, len(all_tables))

        target.exec_driver_sql("ANALYZE")
        closing.set_read_only(target, "SET default_transaction_read_only = on")
        users: int = target.execute(sa.select(sa.func.count()).select_from(tables.users)).scalar_one()
        return users


# -- the end of a move ----------------------------------------------------------------------------------------------


def fence(settings: Settings, shard: int, other_dsn: str) -> bool:
    """Take the other database of a move out of use for ever: mark it as left, and make its server refuse all
    connections.

    Idempotent. The shard that the settings name stays closed to writes. An empty database, which an interrupted copy
    has left, needs no fence.

    Returns:
        whether the other database is shut; False: it is empty, and open as before.

    Raises:
        MoveRefused: these two are not the databases of one move, or they differ. Nothing changed.
        ServiceError: UNAVAILABLE; run it again.
    """
    kept = _refuse_unless_ours(settings, shard)
    assert kept.identity is not None  # it is ours

    keeping, other = _databases(settings, shard, other_dsn)
    url = other.engine.url
    lobby = make_engine(
        url.set(database=closing.MAINTENANCE).render_as_string(hide_password=False), settings, "setup", Pool(1)
    )
    try:
        # The lock: no copy is being made at this moment.
        with closing.locked(keeping, shard, wait_s=_SETTLE_WAIT_S), translated(shard), lobby.connect() as connection:
            connection.execution_options(isolation_level="AUTOCOMMIT")
            if closing.accepts_connections(connection, str(url.database), kept.identity):
                if _is_empty(other):
                    return False
                _refuse_unless_copies(kept, keeping, other)
                closing.mark_left(other, shard)
                closing.shut(connection, str(url.database), kept.identity)
            closing.end_sessions(connection, database=str(url.database))
            return True
    finally:
        for engine in (keeping.engine, other.engine, lobby):
            engine.dispose()


def _is_empty(database: Database) -> bool:
    what = _seen(database, "the other database")
    return what.revision is None and not what.foreign_tables


def _refuse_unless_copies(kept: Seen, keeping: Database, other: Database) -> None:
    left = _seen(other, "the other database")
    if left.identity != kept.identity:
        problem = f"it is {left.identity or 'not set up'}, not {kept.identity}"
        raise MoveRefused("the other database", problem, "correct its DSN")
    if (left.server, left.database) == (kept.server, kept.database):
        problem = "it is the one that SEGSVC_SHARD_DSNS names"
        raise MoveRefused("the other database", problem, "change that setting first, or give the other one's DSN")
    if left.retired is not None:
        return  # by an earlier run, which made these checks
    for where, what in ((keeping.name, kept), ("the other database", left)):
        if not what.closed:
            problem = "it is open to writes, so the two are not the databases of one move"
            raise MoveRefused(where, problem, "begin with `segsvc shards copy`")

    with keeping.engine.connect() as ours, other.engine.connect() as theirs:
        if prepared := select_prepared(theirs):
            raise MoveRefused("the other database", f"{prepared[0].gid!r} is prepared there", "see `segsvc doctor`")
        if _summary(ours) != _summary(theirs):
            problem = "it does not hold the same data as the one that SEGSVC_SHARD_DSNS names"
            raise MoveRefused("the other database", problem, "drop the older one, and begin with `segsvc shards copy`")


def _summary(connection: sa.Connection) -> list[Any]:
    """Values in which two copies differ if one of them has changed since the copy: every change of data changes one of
    these values."""
    state, fences, users = tables.shard_state.c, tables.applied_operations.c, tables.users.c
    return [
        connection.execute(sa.select(state.next_slot, state.user_count)).one(),
        connection.execute(sa.select(sa.func.count(), sa.func.max(fences.apply_time))).one(),
        connection.execute(
            sa.select(sa.func.sum(users.row_version), sa.func.max(users.update_time), sa.func.count())
        ).one(),
    ]


def reopen(settings: Settings, shard: int) -> None:
    """Allow writes to the shard that the settings name. To be called when the other database of the move is fenced.

    Idempotent.

    Raises:
        MoveRefused: it is not the right database, or sessions in it do not end; run it again.
        ServiceError: UNAVAILABLE; run it again.
    """
    _refuse_unless_ours(settings, shard)
    engine = make_engine(settings.shard_dsns[shard], settings, "setup", Pool(1))
    try:
        with translated(shard), engine.connect() as connection:
            connection.execution_options(isolation_level="AUTOCOMMIT")
            closing.open_again(connection)
    finally:
        engine.dispose()
