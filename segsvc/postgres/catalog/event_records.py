"""What the catalog stores about Kafka's topics, because Kafka itself forgets: see ``domain.event_records``."""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from typing import Final
from uuid import UUID

import sqlalchemy as sa
from sqlalchemy.dialects.postgresql import INT8MULTIRANGE, insert

from segsvc.domain.event_records import EventLoss, EventPosition, FoundLoss, Ranges, Wait
from segsvc.postgres import tables
from segsvc.postgres.engine import Databases

WAITS_TTL_S: Final = 30.0
"""The waits of a bridge that has not reported for this long are not shown."""


class PostgresEventRecords:
    """Every method is one short transaction. Raises ServiceError: CATALOG_UNAVAILABLE, OVERLOADED."""

    def __init__(self, databases: Databases) -> None:
        self._databases = databases

    # -- positions and losses -----------------------------------------------------------------------------------------

    def positions(self, topics: Sequence[str]) -> dict[tuple[str, int], EventPosition]:
        """How far the partitions of these topics were read, by topic and partition."""
        table = tables.event_partitions.c
        with self._databases.catalog_tx() as connection:
            rows = connection.execute(
                sa.select(table.topic, table.partition, table.topic_id, table.next_offset).where(
                    table.topic.in_(topics)
                )
            ).all()
        return {(row.topic, row.partition): EventPosition(*row) for row in rows}

    def note(self, positions: Sequence[EventPosition], losses: Sequence[EventLoss] = ()) -> None:
        """Store how far partitions were read and, in the same transaction, what was lost before that."""
        with self._databases.catalog_tx() as connection:
            for loss in losses:
                connection.execute(
                    insert(tables.event_losses)
                    .values(
                        topic=loss.topic,
                        partition=loss.partition,
                        first_offset=loss.first_offset,
                        end_offset=loss.end_offset,
                        reason=loss.reason,
                    )
                    .on_conflict_do_nothing()
                )

            if positions:
                statement = insert(tables.event_partitions).values(
                    [
                        {
                            "topic": each.topic,
                            "partition": each.partition,
                            "topic_id": each.topic_id,
                            "next_offset": each.next_offset,
                        }
                        for each in sorted(positions, key=lambda each: (each.topic, each.partition))
                    ]
                )
                connection.execute(
                    statement.on_conflict_do_update(
                        index_elements=["topic", "partition"],
                        set_={
                            "topic_id": statement.excluded.topic_id,
                            "next_offset": statement.excluded.next_offset,
                            "update_time": sa.func.clock_timestamp(),
                        },
                    )
                )

    def losses(self, *, acknowledged: bool = False) -> list[FoundLoss]:
        """Losses, oldest first. Acknowledged losses are included only if asked for."""
        table = tables.event_losses.c
        statement = sa.select(
            table.id,
            table.topic,
            table.partition,
            table.first_offset,
            table.end_offset,
            table.reason,
            table.find_time,
            table.acknowledge_time,
        ).order_by(table.id)
        if not acknowledged:
            statement = statement.where(table.acknowledge_time.is_(None))

        with self._databases.catalog_tx() as connection:
            rows = connection.execute(statement).all()
        return [
            FoundLoss(
                row.id,
                EventLoss(row.topic, row.partition, row.first_offset, row.end_offset, row.reason),
                row.find_time,
                row.acknowledge_time,
            )
            for row in rows
        ]

    def acknowledge(self, ids: Sequence[int]) -> int:
        """Acknowledge losses. Returns how many of them were not acknowledged before."""
        table = tables.event_losses
        with self._databases.catalog_tx() as connection:
            return connection.execute(
                sa.update(table)
                .where(table.c.id.in_(ids), table.c.acknowledge_time.is_(None))
                .values(acknowledge_time=sa.func.clock_timestamp())
            ).rowcount

    # -- what the bridges wait for ------------------------------------------------------------------------------------

    def note_waits(self, bridge: UUID, waits: Mapping[Wait, str]) -> None:
        """Replace the waits of a bridge: what it waits for now, and why. Deletes those of bridges that are gone."""
        table = tables.bridge_waits
        stale = table.c.update_time < sa.func.clock_timestamp() - sa.text("interval '1 day'")
        with self._databases.catalog_tx() as connection:
            connection.execute(sa.delete(table).where((table.c.bridge == bridge) | stale))
            if waits:
                connection.execute(
                    sa.insert(table),
                    [{"bridge": bridge, "what": what.code, "reason": reason} for what, reason in sorted(waits.items())],
                )

    def waits(self) -> dict[Wait, str]:
        """What bridges have lately reported to wait for, and why."""
        table = tables.bridge_waits.c
        lately = sa.func.clock_timestamp() - sa.func.make_interval(0, 0, 0, 0, 0, 0, WAITS_TTL_S)
        with self._databases.catalog_tx() as connection:
            rows = connection.execute(
                sa.select(table.what, table.reason).where(table.update_time > lately).order_by(table.what)
            ).all()
        return {Wait.from_code(row.what): row.reason for row in rows}

    # -- dead letters -------------------------------------------------------------------------------------------------

    def letters_done(self, topic: str, topic_id: str) -> dict[int, Ranges]:
        """By partition, the offsets of letters that were sent again or dismissed."""
        table = tables.dead_letters_done.c
        # The bounds are selected separately, because psycopg2 does not know multiranges.
        one = sa.func.unnest(table.offsets).table_valued("one", joins_implicitly=True).render_derived().c.one
        bounds = (sa.func.lower(one).label("first"), sa.func.upper(one).label("behind"))
        statement = (
            sa.select(table.partition, *bounds)
            .where(table.topic == topic, table.topic_id == topic_id)
            .order_by(table.partition, sa.literal_column("first"))
        )

        found: dict[int, Ranges] = {}
        with self._databases.catalog_tx() as connection:
            for row in connection.execute(statement):
                found[row.partition] = (*found.get(row.partition, ()), (row.first, row.behind))
        return found

    def note_letters_done(self, topic: str, topic_id: str, partition: int, first: int, end: int) -> None:
        """Note that the letters from ``first`` up to, not including, ``end`` are done."""
        table = tables.dead_letters_done
        one = sa.func.int8multirange(sa.func.int8range(first, end), type_=INT8MULTIRANGE())
        statement = insert(table).values(topic=topic, topic_id=topic_id, partition=partition, offsets=one)
        with self._databases.catalog_tx() as connection:
            connection.execute(
                statement.on_conflict_do_update(
                    index_elements=["topic", "topic_id", "partition"],
                    set_={"offsets": table.c.offsets.op("+")(statement.excluded.offsets)},
                )
            )
