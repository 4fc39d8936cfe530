"""Closes a database to writes, opens it again, and shuts it for ever: what moving and doubling shards have in common.

*Closed*: PostgreSQL refuses writes (``default_transaction_read_only`` of the database, for every session); reads go
on. *Shut*: its server refuses all connections, and its data are marked as left.
"""

from __future__ import annotations

import time
from collections.abc import Iterator
from contextlib import contextmanager
from datetime import datetime
from typing import Final

import sqlalchemy as sa
from sqlalchemy import exc

from segsvc.postgres import tables
from segsvc.postgres.engine import LOCK_NOT_AVAILABLE, sqlstate, translated
from segsvc.postgres.installation.identity import Database, Finding, FindingsError, Identity
from segsvc.postgres.locks import SHARD_LOCK
from segsvc.postgres.shard.participant import select_prepared

_READERS: Final = "segsvc-reads"
"""``application_name`` of sessions that never write: they are not ended, so that reads go on without a break."""
MAINTENANCE: Final = "postgres"
"""Database from which another database of its server is shut: a session cannot shut its own database."""
_QUIET_S: Final = 0.5
"""A database has no sessions left when none was seen for this long: a session that is being opened becomes visible
late."""
_LEAVE_S: Final = 20.0
"""How long sessions may take to end."""


class MoveRefused(FindingsError):
    """The move cannot be made or cannot go on. The findings say why; unless they say otherwise, nothing changed."""

    def __init__(self, where: str, problem: str, remedy: str) -> None:
        super().__init__([Finding(where, problem, remedy)])


@contextmanager
def locked(source: Database, shard: int, *, wait_s: float) -> Iterator[sa.Connection]:
    """A session that holds the shard's lock, so that nothing writes to the shard and nothing is prepared there.

    A prepared transaction holds the lock, so if this session has acquired it, none of ours is prepared.
    """
    with translated(shard), source.engine.connect() as guard:
        guard.execution_options(isolation_level="AUTOCOMMIT")
        unbounded(guard)
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


def unbounded(connection: sa.Connection) -> None:
    """Lift the bounds of this session: the time of a copy depends on the size of the shard."""
    for name in ("statement_timeout", "idle_in_transaction_session_timeout"):
        connection.execute(sa.select(sa.func.set_config(name, "0", False)))


def close(connection: sa.Connection) -> datetime:
    """Refuse all writes to this database from now on. A session keeps the setting with which it was opened, so sessions
    that may write are ended. Returns the time, by the server's clock, from which every new session has the setting."""
    set_read_only(connection, "SET default_transaction_read_only = on")
    return end_older_sessions(connection)


def open_again(connection: sa.Connection) -> None:
    """Allow writes again. Sessions that were opened meanwhile are ended, because they would keep refusing writes."""
    connection.exec_driver_sql("SET default_transaction_read_only = off")  # this one's own
    set_read_only(connection, "RESET default_transaction_read_only")
    end_older_sessions(connection)


def end_older_sessions(connection: sa.Connection) -> datetime:
    now: datetime = connection.execute(sa.select(sa.func.clock_timestamp())).scalar_one()
    end_sessions(connection, before=now, spare_readers=True)
    return now


def set_read_only(connection: sa.Connection, setting: str) -> None:
    name = connection.execute(sa.select(sa.func.current_database())).scalar_one()
    connection.exec_driver_sql(f"ALTER DATABASE {_quoted(connection, name)} {setting}")


def _quoted(connection: sa.Connection, name: str) -> str:
    return connection.dialect.identifier_preparer.quote_identifier(name)


def end_sessions(
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


def accepts_connections(connection: sa.Connection, name: str, identity_: Identity) -> bool:
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


def mark_left(database: Database, shard: int) -> None:
    """Mark the data as left, too: if a person opens this database by hand, no process may start on it."""
    with translated(shard), database.engine.begin() as connection:
        connection.execute(sa.text("SET TRANSACTION READ WRITE"))
        state = tables.shard_state
        connection.execute(sa.update(state).where(state.c.retired_time.is_(None)).values(retired_time=sa.func.now()))
    database.engine.dispose()


def shut(connection: sa.Connection, name: str, identity_: Identity) -> None:
    quoted = _quoted(connection, name)
    connection.exec_driver_sql(f"COMMENT ON DATABASE {quoted} IS '{_note(identity_)}'")
    connection.exec_driver_sql(f"ALTER DATABASE {quoted} ALLOW_CONNECTIONS false")
