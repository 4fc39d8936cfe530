"""Connections to the catalog and the shards: bounds on every session, and driver errors turned into the service's.

Each process builds its own ``Databases`` after the last fork. Transactions are READ COMMITTED.
"""

from __future__ import annotations

import select
from collections.abc import Iterator
from contextlib import contextmanager, suppress
from dataclasses import dataclass
from typing import Any, Final, Literal

import psycopg2
import sqlalchemy as sa
from psycopg2.extensions import TRANSACTION_STATUS_IDLE, TRANSACTION_STATUS_INTRANS
from sqlalchemy import event, exc
from sqlalchemy.pool import PoolResetState

from segsvc.config import Settings
from segsvc.domain.errors import LockTimeout, Reason, ServiceError, catalog_unavailable, shard_unavailable
from segsvc.log import get_logger

log = get_logger(__name__)

LOCK_NOT_AVAILABLE = "55P03"
QUERY_CANCELED = "57014"

_CONNECTION_LOST_CLASSES = ("08", "57P", "53", "58")
"""SQLSTATE classes: connection exception, operator intervention, insufficient resources, system error."""
_CONNECTION_LOST = ("25006", "25P03", "25P04")
"""Single SQLSTATEs: read-only, and the server's bounds of a transaction that is idle or lasts too long."""


def sqlstate(error: exc.DBAPIError | psycopg2.Error) -> str:
    """The SQLSTATE; '' when the failure came from the client's side (a broken connection)."""
    return getattr(error.orig if isinstance(error, exc.DBAPIError) else error, "pgcode", None) or ""


def is_lost(error: exc.DBAPIError | psycopg2.Error) -> bool:
    """Whether the server is out of reach, rather than the statement at fault.

    The read-only state of a server that was demoted (25006) counts: a write can succeed only elsewhere. So does the end
    of a session that was idle inside a transaction: the server has closed the connection and rolled the transaction
    back.
    """
    state = sqlstate(error)
    if state in (QUERY_CANCELED, LOCK_NOT_AVAILABLE):
        return False
    if state:
        return state.startswith(_CONNECTION_LOST_CLASSES) or state in _CONNECTION_LOST
    cause = error.orig if isinstance(error, exc.DBAPIError) else error
    return isinstance(cause, psycopg2.OperationalError | psycopg2.InterfaceError)


SESSION_SETTINGS: Final = {
    "default_transaction_isolation": r"read\ committed",
    "timezone": "UTC",
    "client_encoding": "UTF8",
    "standard_conforming_strings": "on",
    "transform_null_equals": "off",
    "extra_float_digits": "1",
}
"""What our SQL relies on, whatever the database, its role or its server is set to (``installation.demands``)."""


@dataclass(frozen=True, slots=True)
class Pool:
    """How a process uses its connections: one for each thread that may hold one at a time."""

    size: int = 2
    statement_timeout_s: float | None = None
    """None: the setting for operations."""
    catalog_idle_s: float | None = 5.0
    """How long a transaction on the catalog may be idle between two statements. A process that is frozen while it votes
    or decides holds the lock of the operation's row, and every decision waits for that. None: as long as on a shard,
    where the work is done between the statements."""
    each_alone: bool = False
    """Each statement is its own transaction, unless a caller asks for something else. A statement with its bound is
    then one exchange instead of five."""
    by_key: bool = False
    """Sessions that only read rows by their keys, many times a second, and whose user tries again when a connection
    turns out to be lost. Each statement is its own transaction here, too. Prepared statements are planned once, and
    never with a scan of a table that happened to be small at that moment."""


def make_engine(dsn: str, settings: Settings, role: str, pool: Pool, *, idle_s: float | None = None) -> sa.Engine:
    """An engine with bounds on every session, so that no half-open client can hold a lock for hours.

    Args:
        idle_s: how long a transaction may be idle between two statements; None: longer than any work takes.
    """
    statement_timeout_s = pool.statement_timeout_s or settings.statement_timeout_s

    # No JIT: statements here are short, and an estimate that is too high would compile each one first, for 0.1 s and
    # more. The isolation level is set here once: set on the driver, it would cost an exchange whenever autocommit ends.
    # Times come in UTC, whatever the server's time zone is: in a zone ahead of UTC, the last hours of 9999 lie in a
    # year that Python does not know.
    options = ["-c jit=off", *(f"-c {name}={value}" for name, value in SESSION_SETTINGS.items())]
    if pool.by_key:
        options += ["-c enable_seqscan=off", "-c plan_cache_mode=force_generic_plan"]

    bounds_ms = {
        "statement_timeout": int(statement_timeout_s * 1000),
        "lock_timeout": int(settings.lock_timeout_s * 1000),
        # Longer than any statement: this ends a session whose client is alive but stuck between two statements.
        "idle_in_transaction_session_timeout": int(
            (idle_s or max(statement_timeout_s, settings.operation_deadline_s)) * 1000
        ),
        # Ends a backend that waits for a lock although its client is gone (PostgreSQL's default is never).
        "client_connection_check_interval": 1000,
    }

    isolation: dict[str, Any] = {"isolation_level": "AUTOCOMMIT"} if pool.by_key or pool.each_alone else {}
    engine = sa.create_engine(
        dsn,
        **isolation,
        pool_size=pool.size,
        max_overflow=0,
        # Longer than it takes to find out that a server hangs: a caller who waits for a connection to it then gets that
        # error, and not the one that too many requests wait.
        pool_timeout=settings.read_timeout_s + settings.connect_timeout_s,
        # A restart of the server is noticed before a transaction starts, not in the middle of the first one.
        pool_pre_ping=True,
        # See _end_transaction.
        pool_reset_on_return=None,
        # The text of an error goes into the log, and parameters may be users' attributes.
        hide_parameters=True,
        connect_args={
            "connect_timeout": settings.connect_timeout_s,
            "keepalives": 1,
            "keepalives_idle": 5,
            "keepalives_interval": 2,
            "keepalives_count": 3,
            "tcp_user_timeout": 15_000,
            "application_name": f"segsvc-{role}",
            "options": " ".join(options + [f"-c {name}={value}" for name, value in bounds_ms.items()]),
        },
    )

    engine.dialect.do_ping = _still_open  # type: ignore[method-assign]  # a hook of dialects
    event.listen(engine, "reset", _end_transaction)
    event.listen(engine, "checkin", _keep_if_idle)
    event.listen(engine, "before_cursor_execute", _with_bound, retval=True)
    return engine


def _end_transaction(dbapi_connection: Any, record: Any, state: PoolResetState) -> None:
    """Roll back what a user of the connection left open; SQLAlchemy's own way, but for a connection that is lost.

    SQLAlchemy logs a failed rollback as an error with its traceback. Here it is expected: the watch for hanging servers
    may cut a connection off before the pool has it back. PostgreSQL rolls back what a lost client had begun.
    """
    if state.transaction_was_reset:
        return

    try:
        dbapi_connection.rollback()
    except psycopg2.Error:
        # Closed, so that the next step throws it away, whatever the driver takes its state for.
        dbapi_connection.close()


def _keep_if_idle(dbapi_connection: Any, record: Any) -> None:
    """Close a connection that comes back to its pool inside a transaction, by the status that the server last sent.

    The driver's own view is not enough. When a COMMIT fails, for example because a timeout cancelled it, the driver
    takes the transaction for ended and sends no ROLLBACK; but the server may not have ended it. Each later user of the
    connection would then get an error because of a transaction that failed before. The check costs no exchange.

    Args:
        dbapi_connection: the driver's; None: the pool has closed it already.
    """
    if dbapi_connection is None:
        return

    status = dbapi_connection.info.transaction_status
    if status == TRANSACTION_STATUS_IDLE:
        return
    if not dbapi_connection.closed:
        # Imported here, because commands that connect before they start a worker must not load the metrics yet: the
        # library determines when it is loaded whether several processes share them.
        from segsvc.metrics import connections_thrown_away  # noqa: PLC0415

        connections_thrown_away.inc()
        log.warning("connection_thrown_away", transaction_status=status)
    record.invalidate()


def _still_open(dbapi_connection: Any) -> bool:
    """Whether an idle connection is still open on the server's side: SQLAlchemy's ping, without its one or two round
    trips.

    Whatever ends a connection sends a message about it, even the kernel that cleans up after a server that was killed;
    and a server sends nothing else to an idle client that would be missed. A server that disappears without a message
    would not answer a statement either: keepalives find that out.
    """
    if dbapi_connection.closed:
        return False
    waiting = select.poll()
    waiting.register(dbapi_connection.fileno(), select.POLLIN)
    return not waiting.poll(0)


class Databases:
    """The catalog and the shards, as one process reaches them.

    Args:
        role: shown by PostgreSQL as ``application_name`` (``segsvc-<role>``).
        pool: connections to each database.
    """

    def __init__(self, settings: Settings, role: str, pool: Pool | None = None) -> None:
        pool = pool or Pool()
        self.lock_timeout_s = settings.lock_timeout_s
        self.catalog = make_engine(settings.catalog_dsn, settings, role, pool, idle_s=pool.catalog_idle_s)
        self.shards = tuple(make_engine(dsn, settings, role, pool) for dsn in settings.shard_dsns)

    @property
    def shard_count(self) -> int:
        return len(self.shards)

    def close(self) -> None:
        for engine in (self.catalog, *self.shards):
            engine.dispose()

    @contextmanager
    def catalog_tx(self, *, timeout_s: float | None = None) -> Iterator[sa.Connection]:
        """One transaction on the catalog, committed at the end of the block.

        Args:
            timeout_s: bound of each statement in it, except its end; None: the session's.

        Raises:
            ServiceError: CATALOG_UNAVAILABLE, DEADLINE_EXCEEDED (with both it is unknown whether a commit took effect),
                OVERLOADED (a lock was not acquired in time: this transaction did nothing).
            sqlalchemy.exc.DBAPIError: anything else, such as an integrity error.
        """
        try:
            with (
                translated("catalog"),
                self.catalog.begin() as connection,
                _bounded(connection, timeout_s),
            ):
                yield connection
        except LockTimeout as error:
            # Another process holds the lock of a row of the ledger. Callers that decide something try again, as after
            # any transient error. (On a shard the same error makes the work wait for its turn.) It says nothing else
            # about the call: an operation that an earlier transaction accepted goes on.
            message = "another change holds up this one; try again"
            raise ServiceError(Reason.OVERLOADED, message, retry_after_s=0.5) from error

    @contextmanager
    def shard_tx(self, shard: int, *, timeout_s: float | None = None) -> Iterator[sa.Connection]:
        """One transaction on a shard, committed at the end of the block.

        Args:
            timeout_s: bound of each statement in it, except its end; None: the session's.

        Raises:
            ServiceError: SHARD_UNAVAILABLE, DEADLINE_EXCEEDED (with both it is unknown whether a commit took effect).
            LockTimeout: a lock was not acquired in time.
            sqlalchemy.exc.DBAPIError: anything else.
        """
        with translated(shard), self.shards[shard].begin() as connection, _bounded(connection, timeout_s):
            yield connection

    @contextmanager
    def shard_snapshot(self, shard: int, *, timeout_s: float | None = None) -> Iterator[sa.Connection]:
        """A read-only transaction whose statements all see the shard at one moment. Raises as ``shard_tx``."""
        with (
            translated(shard),
            self.shards[shard].connect() as pooled,
            pooled.execution_options(isolation_level="REPEATABLE READ", postgresql_readonly=True) as connection,
            _bounded(connection, timeout_s),
        ):
            yield connection

    @contextmanager
    def shard_autocommit(self, shard: int, *, timeout_s: float | None = None) -> Iterator[sa.Connection]:
        """A connection on which every statement is its own transaction (COMMIT PREPARED needs that).

        Args:
            timeout_s: bound of each statement; None: the session's.

        Raises:
            ServiceError: SHARD_UNAVAILABLE, DEADLINE_EXCEEDED.
            LockTimeout: a lock was not acquired in time.
        """
        with translated(shard), self.shards[shard].connect() as connection:
            yield connection.execution_options(**_each_alone(timeout_s))

    @contextmanager
    def catalog_autocommit(self, *, timeout_s: float | None = None) -> Iterator[sa.Connection]:
        """A connection to the catalog on which every statement is its own transaction; as ``shard_autocommit``, with
        CATALOG_UNAVAILABLE."""
        with translated("catalog"), self.catalog.connect() as connection:
            yield connection.execution_options(**_each_alone(timeout_s))

    @contextmanager
    def shard_connection(self, shard: int) -> Iterator[sa.Connection]:
        """A connection whose transaction the caller ends; it is rolled back if it is left open."""
        with translated(shard), self.shards[shard].connect() as connection:
            yield connection


@contextmanager
def _bounded(connection: sa.Connection, timeout_s: float | None) -> Iterator[None]:
    """Bound each statement of the block, in a transaction that goes on after it; None: the session's bound holds.

    The bound is lifted before the transaction ends, however it ends. Otherwise it would also bound COMMIT and ROLLBACK,
    and if one of these is cancelled, the server stays inside the transaction.
    """
    if timeout_s is None:
        yield
        return

    connection.execute(sa.select(sa.func.set_config("statement_timeout", bound_ms(timeout_s), True)))
    try:
        yield
    except BaseException:
        _lift_before_rollback(connection)
        raise
    # The bound may cancel this statement itself. Then nothing is committed, and the caller is told so.
    connection.exec_driver_sql(_LIFT)


_LIFT = "SET LOCAL statement_timeout TO DEFAULT"
"""The bound with which the session was opened holds again."""


def _lift_before_rollback(connection: sa.Connection) -> None:
    """Lift the bound in a transaction that has not failed; a failed one has lost it with its other local settings."""
    if connection.closed or connection.invalidated:
        return
    driver: Any = connection.connection.driver_connection
    if driver.info.transaction_status != TRANSACTION_STATUS_INTRANS:
        return
    # If this fails, then because of the bound (which is then gone with the transaction), or because the connection is
    # lost. The error of the block says more.
    with suppress(exc.DBAPIError):
        connection.exec_driver_sql(_LIFT)


_BOUND_OPTION = "segsvc_bound_ms"


def _each_alone(timeout_s: float | None) -> dict[str, Any]:
    """Options of a connection on which each statement is its own transaction, with its bound."""
    bound = {} if timeout_s is None else {_BOUND_OPTION: bound_ms(timeout_s)}
    return {"isolation_level": "AUTOCOMMIT", **bound}


def _with_bound(
    connection: sa.Connection, _cursor: object, statement: str, parameters: Any, _context: object, _many: bool
) -> tuple[str, Any]:
    """The statement together with its connection's bound, in one message. So the two are one transaction, which the
    server ends by itself after the statement, and the bound ends with it."""
    bound = connection.get_execution_options().get(_BOUND_OPTION)
    if bound is None:
        return statement, parameters
    return f"SELECT set_config('statement_timeout', '{bound}', true); {statement}", parameters


def bound_ms(timeout_s: float) -> str:
    """A statement's bound as PostgreSQL takes it: at least 1 ms, because 0 would mean "no bound"."""
    return str(max(1, int(timeout_s * 1000)))


@contextmanager
def translated(where: Literal["catalog"] | int) -> Iterator[None]:
    """Turn an outage, a timeout or a lock timeout into the service's own errors; let any other error pass."""
    try:
        yield
    except exc.TimeoutError as error:  # the pool's: every connection is in use
        message = f"too many requests wait for {_name(where)}"
        raise ServiceError(Reason.OVERLOADED, message, _metadata(where), retry_after_s=0.5) from error
    except (exc.DBAPIError, psycopg2.Error) as error:  # psycopg2.Error comes from COPY, which bypasses SQLAlchemy
        state = sqlstate(error)
        if state == LOCK_NOT_AVAILABLE:
            raise LockTimeout from error
        if state == QUERY_CANCELED:
            message = f"{_name(where)} did not answer in time"
            raise ServiceError(Reason.DEADLINE_EXCEEDED, message, _metadata(where)) from error
        if is_lost(error):
            raise (catalog_unavailable() if where == "catalog" else shard_unavailable(where)) from error
        raise


def _name(where: Literal["catalog"] | int) -> str:
    return "the catalog" if where == "catalog" else f"shard {where}"


def _metadata(where: Literal["catalog"] | int) -> dict[str, str]:
    return {} if where == "catalog" else {"shard": str(where)}
