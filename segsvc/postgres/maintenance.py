"""Statements of ``services.maintenance``."""

from __future__ import annotations

from collections.abc import Mapping
from datetime import datetime

import sqlalchemy as sa

from segsvc.domain.segment import SegmentState
from segsvc.postgres import tables
from segsvc.postgres.engine import Databases


def _older_than(column: sa.ColumnElement[datetime], ttl_s: int) -> sa.ColumnElement[bool]:
    return column < sa.func.now() - sa.func.make_interval(0, 0, 0, 0, 0, 0, ttl_s)


class PostgresMaintainedShards:
    """Implements ``services.maintenance.MaintainedShards``."""

    def __init__(self, databases: Databases) -> None:
        self._databases = databases

    def member_counts(self, shard: int) -> Mapping[int, int]:
        """Members of each segment of a shard: the rule's bits, corrected by the overrides that hold now."""
        with self._databases.shard_tx(shard) as connection:
            rows = connection.execute(
                sa.text(
                    "SELECT s.id, s.rule_count + coalesce(sum(CASE "
                    "  WHEN o.effect = 1 AND NOT rule.member THEN 1 "
                    "  WHEN o.effect = 2 AND rule.member THEN -1 END), 0) AS members "
                    "FROM segments s "
                    "LEFT JOIN (overrides o JOIN users u ON u.id = o.user_id) "
                    "  ON o.segment_id = s.id AND (o.expire_time IS NULL OR o.expire_time > now()) "
                    "LEFT JOIN LATERAL (SELECT coalesce((SELECT get_bit(m.bits, u.slot % 1024) = 1 FROM memberships m "
                    "  WHERE m.block = u.slot / 1024 AND m.segment_id = s.id), false) AS member) rule ON true "
                    "GROUP BY s.id"
                )
            ).all()
        return {row.id: int(row.members) for row in rows}

    def forget(self, shard: int, *, request_ttl_s: int, tombstone_ttl_s: int, fence_ttl_s: int) -> None:
        """Drop what no message or reader can ask for any more."""
        with self._databases.shard_tx(shard) as connection:
            for table, age in (
                (tables.deleted_users, _older_than(tables.deleted_users.c.delete_time, tombstone_ttl_s)),
                (tables.user_requests, _older_than(tables.user_requests.c.create_time, request_ttl_s)),
                (tables.applied_operations, _older_than(tables.applied_operations.c.apply_time, fence_ttl_s)),
                # Expired overrides have no effect already: reads compare the time themselves.
                (tables.overrides, _older_than(tables.overrides.c.expire_time, 3600)),
            ):
                connection.execute(sa.delete(table).where(age))


class PostgresMaintainedCatalog:
    """Implements ``services.maintenance.MaintainedCatalog``."""

    def __init__(self, databases: Databases) -> None:
        self._databases = databases

    def now(self) -> datetime:
        """The catalog's clock."""
        with self._databases.catalog_tx() as connection:
            now: datetime = connection.execute(sa.select(sa.func.clock_timestamp())).scalar_one()
        return now

    def note_recovery(self) -> None:
        """Recovery has looked at everything. Written every 5 s at most: looks are more frequent than is worth a row."""
        recovered = tables.installation.c.recovery_time
        recent = recovered > sa.func.now() - sa.func.make_interval(0, 0, 0, 0, 0, 0, 5)
        with self._databases.catalog_tx() as connection:
            connection.execute(
                sa.update(tables.installation)
                .where(sa.not_(sa.func.coalesce(recent, sa.false())))
                .values(recovery_time=sa.func.now())
            )

    def put_member_counts(self, counts: Mapping[int, int], counted_after: datetime) -> None:
        """Store counts of live segments unless an operation has stored a newer one. Changes no etag: the count is
        no part of what a caller edits."""
        if not counts:
            return
        with self._databases.catalog_tx() as connection:
            connection.execute(
                sa.text(
                    "UPDATE segments SET member_count = counted.members, member_count_time = :counted_after "
                    "FROM unnest(CAST(:ids AS bigint[]), CAST(:members AS bigint[])) AS counted(id, members) "
                    "WHERE segments.id = counted.id AND segments.state = :active "
                    "AND (member_count_time IS NULL OR member_count_time < :counted_after)"
                ),
                {
                    "ids": list(counts),
                    "members": list(counts.values()),
                    "counted_after": counted_after,
                    "active": int(SegmentState.ACTIVE),
                },
            )

    def forget(self, *, request_ttl_s: int) -> None:
        """Drop old answers; operations themselves are the history and stay."""
        with self._databases.catalog_tx() as connection:
            connection.execute(
                sa.delete(tables.requests).where(_older_than(tables.requests.c.create_time, request_ttl_s))
            )
