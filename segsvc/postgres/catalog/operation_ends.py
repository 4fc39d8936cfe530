"""How operations end: the statement that aborts one, the count of those that ended, and the notification of each end.

A process that waits for ends listens for these notifications instead of polling the ledger all the time.
"""

from __future__ import annotations

import select
from collections.abc import Sequence
from typing import Any, Final
from uuid import UUID

import sqlalchemy as sa

from segsvc.domain.operation import Failure, Operation, OperationKind, OperationState
from segsvc.domain.segment import SegmentState
from segsvc.metrics import operations_finished
from segsvc.postgres import tables
from segsvc.postgres.catalog.operation_rows import IN_TIME, select_operations

_operations = tables.operations.c
_requests = tables.requests.c
_segments = tables.segments.c

_CHANNEL: Final = "segsvc_operation_ended"
_SELECT_ENDED: Final = "SELECT id FROM operations WHERE id = ANY(%s::uuid[]) AND state IN ('DONE', 'ABORTED')"

NOTIFY_END: Final = sa.func.pg_notify(_CHANNEL, "")
"""Part of each statement that makes an operation final. PostgreSQL sends the notification when the transaction commits,
and only then."""


def abort(
    connection: sa.Connection,
    operation_id: UUID,
    failure: Failure,
    from_states: Sequence[OperationState],
    *,
    if_late: bool = False,
) -> OperationKind | None:
    """Abort an operation and free what it had reserved. Returns its kind.

    None: the operation is in none of ``from_states``; or, with ``if_late``, its deadline has not passed.
    """
    row = connection.execute(
        sa.update(tables.operations)
        .where(
            _operations.id == operation_id,
            _operations.state.in_([state.name for state in from_states]),
            sa.not_(IN_TIME) if if_late else sa.true(),
        )
        .values(state=OperationState.ABORTED.name, failure=failure.to_json(), end_time=sa.func.clock_timestamp())
        .returning(_operations.kind, _operations.segment_id, NOTIFY_END)
    ).one_or_none()
    if row is None:
        return None

    if row.kind == OperationKind.CREATE:
        connection.execute(
            sa.delete(tables.segments).where(_segments.id == row.segment_id, _segments.state == SegmentState.RESERVED)
        )
        # The answer of a creation that failed is not kept: the same request may be made again.
        connection.execute(sa.delete(tables.requests).where(_requests.operation_id == operation_id))
    return OperationKind(row.kind)


def count_ended(kind: OperationKind, state: OperationState) -> None:
    """Count an operation that ended. The process that won the compare-and-set calls this after its transaction, so each
    operation is counted at most once."""
    operations_finished.labels(kind.name, state.name).inc()


class PostgresEndListener:
    """Finds which of some operations have ended, on a connection on which every statement is its own transaction.

    A notification is a hint to read the ledger. It may be lost (a pooler in between, a connection that broke), and it
    does not name an operation. The rows of the operations say which ones have ended.
    """

    def __init__(self, connection: sa.Connection) -> None:
        self._connection = connection
        driver: Any = connection.connection.dbapi_connection
        self._driver = driver
        self._incoming = select.poll()
        self._incoming.register(driver.fileno(), select.POLLIN)
        # Before the first read: PostgreSQL notifies of every end after that read.
        connection.exec_driver_sql(f"LISTEN {_CHANNEL}")

    def final_among(self, operation_ids: Sequence[UUID]) -> Sequence[Operation]:
        """The operations among these that are DONE or ABORTED. One short statement while there are none."""
        rows = self._connection.exec_driver_sql(_SELECT_ENDED, ([str(each) for each in operation_ids],)).all()
        found = [row.id for row in rows]
        return select_operations(self._connection, tables.operations.c.id.in_(found)) if found else []

    def await_end(self, seconds: float) -> None:
        """Wait until an operation may have ended since the last read, at most this many seconds."""
        # If a notification arrived while a statement ran, the driver has read it together with the result.
        if not self._driver.notifies and self._incoming.poll(seconds * 1000):
            self._driver.poll()
        self._driver.notifies.clear()

    def close(self) -> None:
        """Stop listening: no process reads the notifications of a connection that waits in its pool."""
        if self._connection.invalidated:
            return
        try:
            self._connection.exec_driver_sql("UNLISTEN *")
        except sa.exc.SQLAlchemyError:
            self._connection.invalidate()
