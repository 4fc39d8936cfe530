"""Upkeep of the catalog. Implements ``services.maintenance.MaintainedCatalog``."""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from datetime import datetime
from typing import Final

import sqlalchemy as sa

from segsvc.domain.condition_cost import ConditionCost
from segsvc.domain.segment import SegmentState
from segsvc.postgres import tables
from segsvc.postgres.copying import bigint_array
from segsvc.postgres.engine import Databases
from segsvc.postgres.forgetting import forget, older_than

_segments = tables.segments.c
_UNMEASURED: Final = sa.and_(
    _segments.rule_condition != "", _segments.rule_cost.is_(None), _segments.state == SegmentState.ACTIVE
)


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
        """Note that recovery has run over everything. Written every 5 s at most, because recovery runs more often."""
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
        before the operation's end may be the count before it, or a mixture of both. The etag does not change, because
        callers do not edit the count.
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
        """Conditions of ACTIVE segments' rules that have no measured cost, each once."""
        with self._databases.catalog_tx() as connection:
            return (
                connection.execute(sa.select(_segments.rule_condition).where(_UNMEASURED).distinct().limit(limit))
                .scalars()
                .all()
            )

    def put_cost(self, condition: str, cost: ConditionCost) -> None:
        """Store what a condition costs. No etag changes: callers neither read nor edit the cost.

        A segment that an operation is about to change is left out: the operation locks the row when it starts and when
        it is decided, and then writes the cost that it was accepted with.
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
        """Delete old answers to requests. Operations are the history, so they stay."""
        forget(self._databases.catalog_tx, tables.requests, older_than(tables.requests.c.create_time, request_ttl_s))
