"""What is shown of operations beside their rows, for many of them at once."""

from __future__ import annotations

from collections.abc import Sequence
from uuid import UUID

import sqlalchemy as sa

from segsvc.domain.operation import ShardProgress, ShardState
from segsvc.domain.segment import Segment
from segsvc.postgres import tables
from segsvc.postgres.segment_rows import segment_from_json

_operations = tables.operations.c
_progress = tables.progress.c


def select_progress(connection: sa.Connection, operation_ids: Sequence[UUID]) -> dict[UUID, list[ShardProgress]]:
    """What the shards last said of these operations; those that said nothing are left out."""
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
    """Of those that are committed: the segment as it was then; None: it was deleted."""
    rows = connection.execute(
        sa.select(_operations.id, _operations.result).where(
            _operations.id.in_(operation_ids), _operations.result.is_not(None)
        )
    ).all()
    return {row.id: segment_from_json(row.result["segment"]) if row.result["segment"] else None for row in rows}
