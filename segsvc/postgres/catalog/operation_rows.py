"""Rows of ``operations``, ``votes`` and ``progress`` as values, for many operations at once."""

from __future__ import annotations

from collections.abc import Sequence
from typing import Any, Final
from uuid import UUID

import sqlalchemy as sa
from sqlalchemy.dialects.postgresql import ARRAY

from segsvc.domain.operation import (
    Failure,
    Operation,
    OperationPlan,
    OperationState,
    ShardCounts,
    ShardProgress,
    ShardState,
)
from segsvc.domain.segment import Segment
from segsvc.postgres import tables
from segsvc.postgres.segment_rows import segment_from_json

_operations = tables.operations.c
_votes = tables.votes.c
_progress = tables.progress.c

IN_TIME: Final = _operations.deadline > sa.func.clock_timestamp()
"""The deadline of an operation that is PREPARING has not passed: compared in the statement that decides something."""

# Statements that every operation needs are built once: building one takes as long as running it.
_SELECT: Final = sa.select(
    _operations.id,
    _operations.seq,
    _operations.plan,
    _operations.state,
    _operations.create_time,
    _operations.start_time,
    _operations.deadline,
    _operations.commit_time,
    _operations.end_time,
    _operations.failure,
    _operations.commit_seq,
    sa.and_(_operations.state == OperationState.PREPARING.name, sa.not_(IN_TIME)).label("late"),
)
_SELECT_ONE: Final = _SELECT.where(_operations.id == sa.bindparam("operation_id"))
_SELECT_ONE_LOCKED: Final = _SELECT_ONE.with_for_update()
_SELECT_VOTES: Final = (
    sa.select(
        _votes.operation_id,
        _votes.shard,
        _votes.matched,
        _votes.added,
        _votes.removed,
        _votes.members,
        _votes.absent_attributes,
    )
    .where(_votes.operation_id == sa.any_(sa.bindparam("operation_ids", type_=ARRAY(sa.Uuid))))
    .order_by(_votes.operation_id, _votes.shard)
)


def select_operation(connection: sa.Connection, operation_id: UUID, *, lock: bool = False) -> Operation | None:
    """One operation, its votes included.

    Args:
        lock: lock its row for a change. Until the decision, no vote can come in addition to those read now.
    """
    row = connection.execute(_SELECT_ONE_LOCKED if lock else _SELECT_ONE, {"operation_id": operation_id}).one_or_none()
    return _with_votes(connection, [row])[0] if row else None


def select_operations(
    connection: sa.Connection,
    *conditions: sa.ColumnElement[bool],
    order: sa.ColumnElement[Any] | None = None,
    limit: int | None = None,
) -> list[Operation]:
    """Operations that fulfil all conditions, votes included."""
    return _with_votes(connection, connection.execute(_SELECT.where(*conditions).order_by(order).limit(limit)).all())


def _with_votes(connection: sa.Connection, rows: Sequence[sa.Row[Any]]) -> list[Operation]:
    votes = select_votes(connection, [row.id for row in rows])

    return [
        Operation(
            id=row.id,
            seq=row.seq,
            plan=OperationPlan.from_json(row.plan),
            state=OperationState[row.state],
            create_time=row.create_time,
            start_time=row.start_time,
            deadline=row.deadline,
            commit_time=row.commit_time,
            end_time=row.end_time,
            failure=Failure.from_json(row.failure) if row.failure else None,
            votes=votes.get(row.id, []),
            commit_seq=row.commit_seq,
            late=bool(row.late),
        )
        for row in rows
    ]


def select_votes(connection: sa.Connection, operation_ids: Sequence[UUID]) -> dict[UUID, list[ShardCounts]]:
    """The votes for these operations, by shard; operations without a vote are left out."""
    votes: dict[UUID, list[ShardCounts]] = {}
    if not operation_ids:
        return votes

    for row in connection.execute(_SELECT_VOTES, {"operation_ids": operation_ids}):
        votes.setdefault(row.operation_id, []).append(
            ShardCounts(row.shard, row.matched, row.added, row.removed, row.members, tuple(row.absent_attributes))
        )
    return votes


def select_progress(connection: sa.Connection, operation_ids: Sequence[UUID]) -> dict[UUID, list[ShardProgress]]:
    """The last progress that shards reported for these operations; operations without a report are left out."""
    rows = connection.execute(
        sa.select(
            _progress.operation_id,
            _progress.shard,
            _progress.state,
            _progress.blocks_done,
            _progress.blocks_total,
            _progress.added,
            _progress.removed,
        )
        .where(_progress.operation_id.in_(operation_ids))
        .order_by(_progress.operation_id, _progress.shard)
    ).all()

    found: dict[UUID, list[ShardProgress]] = {}
    for row in rows:
        found.setdefault(row.operation_id, []).append(
            ShardProgress(row.shard, ShardState(row.state), row.blocks_done, row.blocks_total, row.added, row.removed)
        )
    return found


def select_outcomes(connection: sa.Connection, operation_ids: Sequence[UUID]) -> dict[UUID, Segment | None]:
    """For each of these operations that is committed: the segment as it was at the commit; None: it was deleted."""
    rows = connection.execute(
        sa.select(_operations.id, _operations.result).where(
            _operations.id.in_(operation_ids), _operations.result.is_not(None)
        )
    ).all()
    return {row.id: segment_from_json(row.result["segment"]) if row.result["segment"] else None for row in rows}
