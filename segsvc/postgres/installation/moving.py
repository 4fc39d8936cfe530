"""Moves a shard to another database while reads go on: the shard is copied, then one copy is fenced and the other
opened.

While both exist, PostgreSQL refuses writes to both (``default_transaction_read_only`` of the database, for every
session). So both give the same answers, and readers may use either. ``copy`` makes the second database; ``fence`` takes
one of the two out of use for ever; ``reopen`` allows writes to the remaining one. In that order no reader can see old
data: see docs/operations.md, "Moving a shard to another server", and ADR 0016.
"""

from __future__ import annotations

import time
from collections.abc import Callable, Iterator
from contextlib import ExitStack, contextmanager
from dataclasses import dataclass
from datetime import datetime
from typing import Any, Final

import sqlalchemy as sa
from alembic import command
from sqlalchemy import exc

from segsvc.config import Settings
from segsvc.postgres import tables
from segsvc.postgres.copying import copy_table
from segsvc.postgres.engine import LOCK_NOT_AVAILABLE, Pool, make_engine, sqlstate, translated
from segsvc.postgres.installation import identity
from segsvc.postgres.installation.identity import Database, Finding, FindingsError, Identity, Seen
from segsvc.postgres.installation.migrate import alembic_config, head
from segsvc.postgres.locks import SHARD_LOCK
from segsvc.postgres.shard.participant import select_prepared

_READERS: Final = "segsvc-reads"
"""``application_name`` of sessions that never write: they are not ended, so that reads go on without a break."""
_MAINTENANCE: Final = "postgres"
"""Database from which another database of its server is shut: a session cannot shut its own database."""
_QUIET_S: Final = 0.5
"""A database has no sessions left when none was seen for this long: a session that is being opened becomes visible
late."""
_LEAVE_S: Final = 20.0
"""How long sessions may take to end."""
_SETTLE_WAIT_S: Final = 5.0
_SETTLE_FIRST: Final = "end that one with `segsvc shards settle`"


class MoveRefused(FindingsError):
    """The move cannot be made or cannot go on. The findings say why; unless they say otherwise, nothing changed."""

    def __init__(self, where: str, problem: str, remedy: str) -> None:
        super().__init__([Finding(where, problem, remedy)])


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
        stack.callback(source.engine.dispose)
        stack.callback(target.engine.dispose)
        _refuse_unless_movable(settings, shard, source, target, target_dsn)
        guard = stack.enter_context(_locked(source, shard, wait_s=settings.operation_deadline_s + 30))
        if _seen(source).closed:
            raise MoveRefused(source.name, "it is closed to writes: a move was begun", _SETTLE_FIRST)

        began = time.monotonic()
        try:
            closed_at = _close(guard)
            target_session = stack.enter_context(target.engine.connect())
            users = _copy_tables(source, target_session, shard, progress)
        except BaseException:
            _open(guard)  # the target is empty: its transaction is not committed, and never will be
            raise

        # From here on both may exist. If the answer is lost, the shard stays closed, and `settle` determines which
        # database is kept.
        with translated(shard):
            target_session.commit()
        # Once more: a session that was being opened when the shard was closed may have been missed.
        _end_sessions(guard, before=closed_at, spare_readers=True)
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


@contextmanager
def _locked(source: Database, shard: int, *, wait_s: float) -> Iterator[sa.Connection]:
    """A session that holds the shard's lock, so that nothing writes to the shard and nothing is prepared there.

    A prepared transaction holds the lock, so if this session has acquired it, none of ours is prepared.
    """
    with translated(shard), source.engine.connect() as guard:
        guard.execution_options(isolation_level="AUTOCOMMIT")
        _unbounded(guard)
        guard.execute(sa.select(sa.func.set_config("lock_timeout", f"{wait_s:.0f}s", False)))
        try:
            guard.execute(sa.select(sa.func.pg_advisory_lock(SHARD_LOCK)))
        except exc.DBAPIError as error:
            if sqlstate(error) != LOCK_NOT_AVAILABLE:
                raise
            problem = "an operation or another move holds it, and does not end"
            raise MoveRefused(source.name, problem, "see `segsvc doctor`, and run it again") from error

        try:
            if prepared := select_prepared(guard):
                raise MoveRefused(
                    source.name, f"{prepared[0].gid!r} is prepared there", "end it first; see `segsvc doctor`"
                )
            yield guard
        finally:
            if not guard.invalidated:
                guard.execute(sa.select(sa.func.pg_advisory_unlock(SHARD_LOCK)))


def _unbounded(connection: sa.Connection) -> None:
    """Lift the bounds of this session: the time of a copy depends on the size of the shard."""
    for name in ("statement_timeout", "idle_in_transaction_session_timeout"):
        connection.execute(sa.select(sa.func.set_config(name, "0", False)))


def _copy_tables(source: Database, target: sa.Connection, shard: int, progress: Callable[[int, int], None]) -> int:
    """Make the schema and copy every table, all in one snapshot. Does not commit. Returns the number of users."""
    with translated(shard), source.engine.connect() as reading:
        reading.execution_options(isolation_level="REPEATABLE READ")
        _unbounded(reading)
        _unbounded(target)

        command.upgrade(alembic_config("shard", target), "head")
        all_tables = tables.shard.sorted_tables
        for number, table in enumerate(all_tables, 1):
            copy_table(reading, target, table)
            progress(number, len(all_tables))

        target.exec_driver_sql("ANALYZE")
        _set_read_only(target, "SET default_transaction_read_only = on")
        users: int = target.execute(sa.select(sa.func.count()).select_from(tables.users)).scalar_one()
        return users


# -- closed and open ------------------------------------------------------------------------------------------------


def _close(connection: sa.Connection) -> datetime:
    """Refuse all writes to this database from now on. A session keeps the setting with which it was opened, so sessions
    that may write are ended. Returns the time, by the server's clock, from which every new session has the setting."""
    _set_read_only(connection, "SET default_transaction_read_only = on")
    return _end_older_sessions(connection)


def _open(connection: sa.Connection) -> None:
    """Allow writes again. Sessions that were opened meanwhile are ended, because they would keep refusing writes."""
    connection.exec_driver_sql("SET default_transaction_read_only = off")  # this one's own
    _set_read_only(connection, "RESET default_transaction_read_only")
    _end_older_sessions(connection)


def _end_older_sessions(connection: sa.Connection) -> datetime:
    now: datetime = connection.execute(sa.select(sa.func.clock_timestamp())).scalar_one()
    _end_sessions(connection, before=now, spare_readers=True)
    return now


def _set_read_only(connection: sa.Connection, setting: str) -> None:
    name = connection.execute(sa.select(sa.func.current_database())).scalar_one()
    connection.exec_driver_sql(f"ALTER DATABASE {_quoted(connection, name)} {setting}")


def _quoted(connection: sa.Connection, name: str) -> str:
    return connection.dialect.identifier_preparer.quote_identifier(name)


def _end_sessions(
    connection: sa.Connection,
    *,
    before: datetime | None = None,
    spare_readers: bool = False,
    database: str | None = None,
) -> None:
    """End the sessions of clients in a database (None: this one). Returns when they are gone.

    Args:
        before: only those that began before it.
        spare_readers: do not end sessions that never write.

    Raises:
        MoveRefused: some sessions do not end.
    """
    statement = sa.text(
        "SELECT pid, pg_terminate_backend(pid) FROM pg_stat_activity "
        "WHERE datname = COALESCE(CAST(:database AS text), current_database()) AND pid <> pg_backend_pid() "
        "AND backend_type = 'client backend' AND application_name <> :spared "
        "AND backend_start < COALESCE(CAST(:before AS timestamptz), 'infinity')"
    )
    parameters = {"database": database, "before": before, "spared": _READERS if spare_readers else ""}

    deadline = time.monotonic() + _LEAVE_S
    quiet_since = time.monotonic()
    while time.monotonic() < quiet_since + _QUIET_S:
        if connection.execute(statement, parameters).all():
            quiet_since = time.monotonic()
        if time.monotonic() > deadline:
            raise MoveRefused("the database", "sessions in it do not end", "end them, and run it again")
        time.sleep(0.05)


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
        url.set(database=_MAINTENANCE).render_as_string(hide_password=False), settings, "setup", Pool(1)
    )
    try:
        # The lock: no copy is being made at this moment.
        with _locked(keeping, shard, wait_s=_SETTLE_WAIT_S), translated(shard), lobby.connect() as connection:
            connection.execution_options(isolation_level="AUTOCOMMIT")
            if _is_open(connection, str(url.database), kept.identity):
                if _is_empty(other):
                    return False
                _refuse_unless_copies(kept, keeping, other)
                _mark_left(other, shard)
                _shut(connection, str(url.database), kept.identity)
            _end_sessions(connection, database=str(url.database))
            return True
    finally:
        for engine in (keeping.engine, other.engine, lobby):
            engine.dispose()


def _is_open(connection: sa.Connection, name: str, identity_: Identity) -> bool:
    """Whether a database accepts connections.

    Raises:
        MoveRefused: there is none of that name, or something else than a move has shut it.
    """
    row = connection.execute(
        sa.text(
            "SELECT datallowconn AS open, shobj_description(oid, 'pg_database') AS note "
            "FROM pg_database WHERE datname = :name"
        ),
        {"name": name},
    ).one_or_none()

    if row is None:
        raise MoveRefused("the other database", f"there is no {name!r} on that server", "correct its DSN")
    if not row.open and row.note != _note(identity_):
        raise MoveRefused("the other database", f"{name!r} is shut, but not by a move", "correct its DSN")
    return bool(row.open)


def _note(identity_: Identity) -> str:
    return f"segsvc: shard {identity_.shard} of installation {identity_.installation} has left this database"


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


def _mark_left(database: Database, shard: int) -> None:
    """Mark the data as left, too: if a person opens this database by hand, no process may start on it."""
    with translated(shard), database.engine.begin() as connection:
        connection.execute(sa.text("SET TRANSACTION READ WRITE"))
        state = tables.shard_state
        connection.execute(sa.update(state).where(state.c.retired_time.is_(None)).values(retired_time=sa.func.now()))
    database.engine.dispose()


def _shut(connection: sa.Connection, name: str, identity_: Identity) -> None:
    quoted = _quoted(connection, name)
    connection.exec_driver_sql(f"COMMENT ON DATABASE {quoted} IS '{_note(identity_)}'")
    connection.exec_driver_sql(f"ALTER DATABASE {quoted} ALLOW_CONNECTIONS false")


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
            _open(connection)
    finally:
        engine.dispose()
