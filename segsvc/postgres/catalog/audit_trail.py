"""The audit trail of segments, which is also the outbox of ``segment-events``."""

from __future__ import annotations

from typing import Any
from uuid import UUID

import sqlalchemy as sa

from segsvc.postgres import tables
from segsvc.postgres.locks import COMMIT_ORDER_LOCK


def record(
    connection: sa.Connection,
    *,
    action: str,
    segment_id: int,
    slug: str,
    operation_id: UUID | None,
    actor: str,
    details: dict[str, Any],
) -> int:
    """Write what a transaction did to a segment, and who asked for it; returns its commit sequence number.

    The lock is held until the transaction ends. So numbers become visible in their order, and the outbox never skips a
    number that commits late.
    """
    connection.execute(sa.select(sa.func.pg_advisory_xact_lock(COMMIT_ORDER_LOCK)))
    seq = int(connection.execute(sa.select(tables.commit_seq.next_value())).scalar_one())
    connection.execute(
        sa.insert(tables.audit).values(
            seq=seq,
            action=action,
            segment_id=segment_id,
            slug=slug,
            operation_id=operation_id,
            actor=actor,
            details=details,
        )
    )
    return seq
