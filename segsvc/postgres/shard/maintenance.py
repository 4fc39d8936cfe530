"""Upkeep of the shards. Implements ``services.maintenance.MaintainedShards``."""

from __future__ import annotations

from collections.abc import Mapping
from functools import partial
from typing import Final

import sqlalchemy as sa

from segsvc.postgres import tables
from segsvc.postgres.engine import Databases
from segsvc.postgres.forgetting import forget, older_than
from segsvc.postgres.shard.epochs import current_epoch

_OVERRIDES_KEPT_S: Final = 3600
"""How long expired overrides are kept. They have no effect any more, because reads compare the time themselves; the
delay keeps their deletion away from their last readers."""


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

    def forget(
        self, shard: int, *, request_ttl_s: int, tombstone_ttl_s: int, fence_ttl_s: int, note_ttl_s: int
    ) -> None:
        """Delete rows that no message and no reader can ask for any more."""
        fences = tables.applied_operations
        applied = fences.c.apply_time
        # The newest fence stays, however old it is: its operation may not have ended, which can take as long as the
        # cache or another shard is out of reach. Every earlier operation has ended, or the next would not have been
        # applied.
        newest = sa.select(sa.func.max(fences.alias("fences").c.apply_time)).scalar_subquery()
        # The patch of the operation that began the present epoch needs who changed in this epoch and the one before it;
        # the next operation's needs no older ones either. Every earlier operation has ended, so its patch is published.
        notes = tables.changed_slots
        unneeded = sa.or_(
            notes.c.epoch < current_epoch() - 1,
            # No entry is left that was read before these changes.
            older_than(notes.c.note_time, note_ttl_s),
        )

        for table, old in (
            (tables.deleted_users, older_than(tables.deleted_users.c.delete_time, tombstone_ttl_s)),
            (tables.user_requests, older_than(tables.user_requests.c.create_time, request_ttl_s)),
            (fences, sa.and_(older_than(applied, fence_ttl_s), applied < newest)),
            (tables.overrides, older_than(tables.overrides.c.expire_time, _OVERRIDES_KEPT_S)),
            (notes, unneeded),
        ):
            forget(partial(self._databases.shard_tx, shard), table, old)
