"""Statements of ``segsvc.services.maintenance``.

Nobody waits for upkeep, so it waits for nobody: a row that somebody has locked is left to the next round. So it can
have no part in a deadlock either.
"""

from __future__ import annotations

from collections.abc import Callable, Mapping, Sequence
from contextlib import AbstractContextManager
from datetime import datetime
from functools import partial
from typing import Final

import sqlalchemy as sa

from segsvc.domain.condition_cost import ConditionCost
from segsvc.domain.segment import SegmentState
from segsvc.postgres import tables
from segsvc.postgres.copying import bigint_array
from segsvc.postgres.engine import Databases

ROWS_AT_ONCE: Final = 10_000
"""Rows that one transaction forgets: however many there are, each is short, and locks few."""

_OVERRIDES_KEPT_S: Final = 3600
"""Expired overrides have no effect already, for reads compare the time themselves: they go when nobody is near."""


_segments = tables.segments.c
_UNMEASURED: Final = sa.and_(
    _segments.rule_condition != "", _segments.rule_cost.is_(None), _segments.state == SegmentState.ACTIVE
)


def _older_than(column: sa.ColumnElement[datetime], ttl_s: int) -> sa.ColumnElement[bool]:
    return column < sa.func.now() - sa.func.make_interval(0, 0, 0, 0, 0, 0, ttl_s)


def _forget(
    begin: Callable[[], AbstractContextManager[sa.Connection]], table: sa.Table, old: sa.ColumnElement[bool]
) -> None:
    """Delete the rows of a table that are old and that nobody has locked, some in each transaction."""
    key = list(table.primary_key.columns)
    some = sa.select(*key).where(old).limit(ROWS_AT_ONCE).with_for_update(skip_locked=True).cte("some")
    statement = sa.delete(table).where(*(column == some.c[column.name] for column in key))
    forgotten = ROWS_AT_ONCE
    while forgotten == ROWS_AT_ONCE:
        with begin() as connection:
            forgotten = connection.execute(statement).rowcount


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
        fences = tables.applied_operations
        applied = fences.c.apply_time
        # The newest fence stays, however old: its operation may not have ended, which can take as long as a cache or
        # another shard is away. Any earlier one has, or the next would not have been applied.
        newest = sa.select(sa.func.max(fences.alias("fences").c.apply_time)).scalar_subquery()
        for table, old in (
            (tables.deleted_users, _older_than(tables.deleted_users.c.delete_time, tombstone_ttl_s)),
            (tables.user_requests, _older_than(tables.user_requests.c.create_time, request_ttl_s)),
            (fences, sa.and_(_older_than(applied, fence_ttl_s), applied < newest)),
            (tables.overrides, _older_than(tables.overrides.c.expire_time, _OVERRIDES_KEPT_S)),
        ):
            _forget(partial(self._databases.shard_tx, shard), table, old)


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
        """Store counts of live segments, but not over an operation's own.

        An operation stores its count when it is decided, and its shards change after that. So a count that was made
        before its end may be one of before, or half of each. Changes no etag: the count is no part of what a caller
        edits.
        """
        if not counts:
            return
        with self._databases.catalog_tx() as connection:
            connection.execute(
                sa.text(
                    "WITH counted AS ("
                    "  SELECT * FROM unnest(CAST(:ids AS bigint[]), CAST(:members AS bigint[])) AS c(id, members)"
                    "), free AS ("
                    "  SELECT s.id FROM segments s JOIN counted USING (id)"
                    "  LEFT JOIN operations last ON last.id = s.last_operation"
                    "  WHERE s.state = :active AND (last.id IS NULL OR last.end_time < :counted_after)"
                    "  AND (s.member_count_time IS NULL OR s.member_count_time < :counted_after)"
                    "  FOR UPDATE OF s SKIP LOCKED"
                    ") UPDATE segments SET member_count = counted.members, member_count_time = :counted_after "
                    "FROM free JOIN counted USING (id) WHERE segments.id = free.id"
                ),
                {
                    "ids": bigint_array(counts),
                    "members": bigint_array(counts.values()),
                    "counted_after": counted_after,
                    "active": int(SegmentState.ACTIVE),
                },
            )

    def unmeasured_conditions(self, limit: int) -> Sequence[str]:
        """Conditions of live rules without a cost, each once."""
        with self._databases.catalog_tx() as connection:
            return (
                connection.execute(sa.select(_segments.rule_condition).where(_UNMEASURED).distinct().limit(limit))
                .scalars()
                .all()
            )

    def put_cost(self, condition: str, cost: ConditionCost) -> None:
        """Store what a condition costs. No etag changes: it is nothing that a caller reads or edits.

        A segment that an operation is about to change is left out: it locks the row when it starts and when it is
        decided, and then writes the cost that it was accepted with.
        """
        with self._databases.catalog_tx() as connection:
            free = (
                sa.select(_segments.id)
                .where(_UNMEASURED, _segments.rule_condition == condition)
                .with_for_update(skip_locked=True)
            )
            connection.execute(
                sa.update(tables.segments).where(_segments.id.in_(free)).values(rule_cost=cost.to_json())
            )

    def forget(self, *, request_ttl_s: int) -> None:
        """Drop old answers; operations themselves are the history and stay."""
        _forget(self._databases.catalog_tx, tables.requests, _older_than(tables.requests.c.create_time, request_ttl_s))
