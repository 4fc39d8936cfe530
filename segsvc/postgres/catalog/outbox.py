"""The audit trail as the outbox of ``segment-events``. Implements ``services.outbox.OutboxStore``."""

from __future__ import annotations

from collections.abc import Iterator, Sequence
from contextlib import contextmanager

import sqlalchemy as sa

from segsvc.domain.audit import AuditEntry
from segsvc.postgres import tables
from segsvc.postgres.engine import Databases
from segsvc.postgres.locks import OUTBOX_LOCK


class PostgresOutboxStore:
    """The outbox in the catalog."""

    def __init__(self, databases: Databases) -> None:
        self._databases = databases

    @contextmanager
    def claim(self, entries_max: int) -> Iterator[PostgresOutboxClaim]:
        """See ``services.outbox.OutboxStore.claim``."""
        with self._databases.catalog_tx() as connection:
            # The lock is a statement of its own, so the next one's snapshot sees the marks of the previous holder.
            acquired = connection.execute(sa.select(sa.func.pg_try_advisory_xact_lock(OUTBOX_LOCK))).scalar_one()
            yield PostgresOutboxClaim(connection, _oldest(connection, entries_max) if acquired else ())


class PostgresOutboxClaim:
    """Within one transaction. Implements ``services.outbox.OutboxClaim``."""

    def __init__(self, connection: sa.Connection, entries: Sequence[AuditEntry]) -> None:
        self._connection = connection
        self.entries = entries

    def mark_published(self, up_to_seq: int) -> None:
        """Mark the claimed entries up to this one."""
        audit = tables.audit
        seqs = [entry.seq for entry in self.entries if entry.seq <= up_to_seq]
        self._connection.execute(sa.update(audit).where(audit.c.seq.in_(seqs)).values(published=True))


def _oldest(connection: sa.Connection, entries_max: int) -> Sequence[AuditEntry]:
    """The oldest entries that are not published."""
    audit = tables.audit.c
    rows = connection.execute(
        sa.select(audit.seq, audit.time, audit.action, audit.slug, audit.operation_id, audit.actor, audit.details)
        .where(sa.not_(audit.published))
        .order_by(audit.seq)
        .limit(entries_max)
    )
    return [
        AuditEntry(row.seq, row.time, row.action, row.slug, row.operation_id, row.actor, row.details) for row in rows
    ]
