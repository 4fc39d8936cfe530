"""Reading operations, each method in a transaction of its own. Times are the catalog's clock."""

from __future__ import annotations

from collections.abc import Iterable, Iterator, Mapping, Sequence
from contextlib import contextmanager
from uuid import UUID

import sqlalchemy as sa

from segsvc.domain.operation import Operation, OperationDetails, OperationFilter, OperationResult, OperationState
from segsvc.postgres import tables
from segsvc.postgres.catalog.operation_ends import PostgresEndListener
from segsvc.postgres.catalog.operation_rows import (
    select_operation,
    select_operations,
    select_outcomes,
    select_progress,
    select_votes,
)
from segsvc.postgres.engine import Databases

_operations = tables.operations.c


class PostgresOperationReads:
    """The operations of one catalog, read."""

    def __init__(self, databases: Databases) -> None:
        self._databases = databases

    def get(self, operation_id: UUID) -> Operation | None:
        """The operation as it is now, its votes included; None: there is none of this id."""
        with self._databases.catalog_tx() as connection:
            return select_operation(connection, operation_id)

    def get_many(self, operation_ids: Sequence[UUID]) -> Sequence[Operation]:
        """The operations among these that exist, their votes included."""
        if not operation_ids:
            return []
        with self._databases.catalog_tx() as connection:
            return select_operations(connection, _operations.id.in_(operation_ids))

    def states(self, operation_ids: Iterable[UUID]) -> Mapping[UUID, OperationState]:
        """States of the operations among these that exist."""
        ids = list(operation_ids)
        if not ids:
            return {}
        with self._databases.catalog_tx() as connection:
            rows = connection.execute(sa.select(_operations.id, _operations.state).where(_operations.id.in_(ids))).all()
        return {row.id: OperationState[row.state] for row in rows}

    @contextmanager
    def listening(self) -> Iterator[PostgresEndListener]:
        """Listen for ends of operations, on one connection held for the block. See ``PostgresEndListener``."""
        with self._databases.catalog_autocommit() as connection:
            listener = PostgresEndListener(connection)
            try:
                yield listener
            finally:
                listener.close()

    def list(self, wanted: OperationFilter, *, page_size: int, before_seq: int | None) -> Sequence[Operation]:
        """Operations that match, newest first; ``before_seq``: only operations older than this one."""
        conditions: list[sa.ColumnElement[bool]] = []
        if wanted.slug is not None:
            conditions.append(_operations.slug == wanted.slug)
        if wanted.kind is not None:
            conditions.append(_operations.kind == wanted.kind)
        if wanted.state is not None:
            conditions.append(_operations.state == wanted.state.name)
        if before_seq is not None:
            conditions.append(_operations.seq < before_seq)

        with self._databases.catalog_tx() as connection:
            return select_operations(connection, *conditions, order=_operations.seq.desc(), limit=page_size)

    def result(self, operation_id: UUID) -> OperationResult | None:
        """The result of a committed operation; None: it is not committed."""
        with self._databases.catalog_tx() as connection:
            outcomes = select_outcomes(connection, [operation_id])
            if operation_id not in outcomes:
                return None
            counts = select_votes(connection, [operation_id]).get(operation_id, [])
        return OperationResult(outcomes[operation_id], counts)

    def details(self, operation_ids: Sequence[UUID]) -> Mapping[UUID, OperationDetails]:
        """For each of these operations, what is shown beside its row."""
        with self._databases.catalog_tx() as connection:
            progress = select_progress(connection, operation_ids)
            outcomes = select_outcomes(connection, operation_ids)
        return {
            operation_id: OperationDetails(progress.get(operation_id, []), outcomes.get(operation_id))
            for operation_id in operation_ids
        }
