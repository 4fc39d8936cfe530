"""The reference of ingestion: a plain consumer that writes a row for each membership.

    python -m benchmarks.peers.row_consumer TOPIC NUMBER OF READY

It takes the partitions of TOPIC whose number has remainder NUMBER modulo OF, from their present ends on, and creates
the file READY when it has them. It computes memberships as the service does (numpy for the percentages, one statement
for all conditions), so the comparison is about how memberships are written: here into ``peer.memberships`` of each
shard, many rows per statement (psycopg2's ``execute_values``). It commits the shards, then its offsets.
"""

from __future__ import annotations

import json
import sys
from collections import defaultdict
from collections.abc import Sequence
from pathlib import Path
from typing import Any

import numpy as np
import numpy.typing as npt
import psycopg2.extras
import sqlalchemy as sa
from kafka import KafkaConsumer, TopicPartition
from sqlalchemy.dialects.postgresql import ARRAY, JSONB, array

from segsvc.conditions import parse_condition
from segsvc.config import load_settings
from segsvc.domain.bucketing import UserHashes
from segsvc.domain.segment import ShardSegment
from segsvc.postgres.conditions.columns import clauses_over_columns
from segsvc.postgres.shard.user_bits import PostgresShardBits

RECORDS_MAX = 2000
ROWS_A_STATEMENT = 1000

_users = sa.table("users", sa.column("id", sa.BigInteger), sa.column("attributes", JSONB), schema="peer")


class RowShard:
    """One shard and its rules, which do not change during the benchmark."""

    def __init__(self, dsn: str) -> None:
        self._engine = sa.create_engine(dsn)
        with self._engine.connect() as connection:
            self._rules: Sequence[ShardSegment] = PostgresShardBits(connection).rules()
        self._conditions = sorted({s.rule.condition for s in self._rules if s.rule and s.rule.condition})

    def create(self, users: dict[int, Any]) -> None:
        """Write users with their memberships, in one transaction."""
        ids = np.array(list(users), dtype=np.int64)
        with self._engine.begin() as connection:
            cursor: Any = connection.connection.cursor()
            psycopg2.extras.execute_values(
                cursor,
                "INSERT INTO peer.users (id, attributes) VALUES %s ON CONFLICT DO NOTHING",
                [(user_id, json.dumps(attributes)) for user_id, attributes in users.items()],
                page_size=ROWS_A_STATEMENT,
            )
            psycopg2.extras.execute_values(
                cursor,
                "INSERT INTO peer.memberships (user_id, segment_id) VALUES %s ON CONFLICT DO NOTHING",
                self._memberships(connection, ids),
                page_size=ROWS_A_STATEMENT,
            )

    def _memberships(self, connection: sa.Connection, ids: npt.NDArray[np.int64]) -> list[tuple[int, int]]:
        holds = self._holding(connection, ids)
        hashes = UserHashes(ids)

        found = []
        for segment in self._rules:
            assert segment.rule is not None
            members = hashes.below(segment.salt, segment.rule.threshold)
            if segment.rule.condition:
                members &= holds[segment.rule.condition]
            found += [(user_id, segment.id) for user_id in ids[members].tolist()]

        # In the order of the primary key.
        return sorted(found)

    def _holding(self, connection: sa.Connection, ids: npt.NDArray[np.int64]) -> dict[str, npt.NDArray[np.bool_]]:
        if not self._conditions:
            return {}

        where = _users.c.id == sa.any_(sa.literal(ids.tolist(), ARRAY(sa.BigInteger)))
        conditions = list(map(parse_condition, self._conditions))
        found, clauses = clauses_over_columns(conditions, _users, [_users.c.id], where)
        answers = dict(connection.execute(sa.select(found.c.id, array(clauses))).tuples().all())
        table = np.array([answers[user_id] for user_id in ids.tolist()], dtype=np.bool_)
        return dict(zip(self._conditions, table.T, strict=True))


def main(topic: str, number: int, of: int, ready: Path) -> None:
    """Consume until killed."""
    settings = load_settings()
    shards = [RowShard(dsn) for dsn in settings.shard_dsns]
    consumer = KafkaConsumer(
        bootstrap_servers=settings.kafka_bootstrap_servers.split(","),
        group_id="benchmark-rows",
        enable_auto_commit=False,
        max_poll_records=RECORDS_MAX,
    )

    partitions = sorted(consumer.partitions_for_topic(topic) or ())
    mine = [TopicPartition(topic, partition) for partition in partitions if partition % of == number]
    consumer.assign(mine)
    consumer.seek_to_end(*mine)
    for where in mine:
        consumer.position(where)
    ready.touch()

    while True:
        by_shard: defaultdict[int, dict[int, Any]] = defaultdict(dict)
        for records in consumer.poll(timeout_ms=200).values():
            for record in records:
                event = json.loads(record.value)
                by_shard[event["user_id"] % len(shards)][event["user_id"]] = event["attributes"]

        for shard, users in by_shard.items():
            shards[shard].create(users)
        if by_shard:
            consumer.commit()


if __name__ == "__main__":
    main(sys.argv[1], int(sys.argv[2]), int(sys.argv[3]), Path(sys.argv[4]))
