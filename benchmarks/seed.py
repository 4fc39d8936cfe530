"""Installations with many users and rules in force, written directly into the tables.

The memberships are the same as after rollouts: ``segsvc check`` finds no difference. Events would take minutes; this
takes seconds, because the server makes the users with their attributes and numpy makes the bits. The service's own code
evaluates the rules of one shard.
"""

from __future__ import annotations

import hashlib
import uuid
from collections.abc import Iterator
from concurrent.futures import ThreadPoolExecutor
from dataclasses import dataclass
from typing import Any, Final

import numpy as np
import numpy.typing as npt
import sqlalchemy as sa

from segsvc.config import Settings
from segsvc.domain import bits
from segsvc.domain.bucketing import buckets
from segsvc.domain.segment import Rule, SegmentState, ShardSegment
from segsvc.domain.sharding import BLOCK_SLOTS
from segsvc.postgres import tables
from segsvc.postgres.shard.operation_transaction import PostgresShardTransaction

FORMAT: Final = 1
"""Increase this when the written data changes: installations from earlier runs are then replaced."""
BLOCKS_AT_ONCE: Final = 1000

CONDITION: Final = 'user.country == "RU" && user.platform in ["ios", "android"] && user.age >= 18'
"""True for 12.4 % of the users that this module makes."""

_INSERT_USERS: Final = """
    INSERT INTO users (id, slot, version, attributes)
    SELECT (n + 1) * :shards + :shard, n, 0, jsonb_build_object(
        'country', (ARRAY['RU', 'US', 'DE', 'BR', 'IN'])[1 + n % 5],
        'platform', (ARRAY['ios', 'android', 'web'])[1 + n / 5 % 3],
        'age', 14 + n / 15 % 60)
    FROM generate_series(0, :users - 1) AS n
"""


@dataclass(frozen=True, slots=True)
class Shape:
    """The content of an installation.

    Attributes:
        users: number of users on each shard; ``user_id`` gives their ids.
        percent: percentage of every segment's rule.
        conditions: CEL texts, used in turn for the rule of every fourth segment; empty: no rule has a condition.
        rows: also load the reference, one row per membership, into the schema ``peer`` of each shard (``rows``).
    """

    users: int
    segments: int
    percent: float = 35.0
    shards: int = 1
    conditions: tuple[str, ...] = ()
    rows: bool = False

    @property
    def digest(self) -> str:
        """Identifies the content, so that a stored installation can be found again."""
        return hashlib.sha256(f"{FORMAT} {self!r}".encode()).hexdigest()[:12]

    @property
    def rules(self) -> list[tuple[ShardSegment, Rule]]:
        """All segments with their rules, ids from 1."""
        found = []
        for number in range(1, self.segments + 1):
            salt = int.from_bytes(hashlib.sha256(f"salt {number}".encode()).digest()[:8], "little")
            condition = ""
            if self.conditions and number % 4 == 0:
                condition = self.conditions[number // 4 % len(self.conditions)]
            rule = Rule(round(self.percent * 1000), condition)
            found.append((ShardSegment(number, f"segment-{number:04d}", salt, rule, 0), rule))
        return found

    def user_id(self, shard: int, slot: int) -> int:
        return (slot + 1) * self.shards + shard

    def user_ids(self, shard: int) -> npt.NDArray[np.int64]:
        """Ids of all users of a shard, in the order of their slots."""
        return (np.arange(1, self.users + 1, dtype=np.int64)) * self.shards + shard

    def __str__(self) -> str:
        with_rows = ", also one row per membership" if self.rows else ""
        return f"{self.shards} × {self.users:,} users, {self.segments} segments at {self.percent:g} %{with_rows}"


def fill(settings: Settings, shape: Shape) -> None:
    """Fill an empty installation after its migrations. ``rows`` are not loaded here."""
    if settings.shard_count != shape.shards:
        raise ValueError(f"an installation of {settings.shard_count} shards cannot hold {shape}")
    with ThreadPoolExecutor(2) as threads:
        fills = [threads.submit(_fill_shard, dsn, shape, shard) for shard, dsn in enumerate(settings.shard_dsns)]
        counts = [fill.result() for fill in fills]
    _fill_catalog(settings.catalog_dsn, shape, np.array(counts, dtype=np.int64).reshape(shape.shards, -1).sum(axis=0))


def _fill_shard(dsn: str, shape: Shape, shard: int) -> list[int]:
    """Returns the number of members of each segment, in the order of ``Shape.rules``."""
    engine = sa.create_engine(dsn)
    try:
        with engine.begin() as connection:
            _insert_users(connection, shape, shard)
            tx = PostgresShardTransaction(connection, shard)
            return [_insert_segment(tx, shape, segment, rule) for segment, rule in shape.rules]
    finally:
        engine.dispose()


def _insert_users(connection: sa.Connection, shape: Shape, shard: int) -> None:
    connection.execute(sa.text(_INSERT_USERS), {"shards": shape.shards, "shard": shard, "users": shape.users})
    user_ids = np.zeros(-(-shape.users // BLOCK_SLOTS) * BLOCK_SLOTS, dtype="<i8")
    user_ids[: shape.users] = shape.user_ids(shard)
    by_block = user_ids.reshape(-1, BLOCK_SLOTS)

    for first in range(0, len(by_block), BLOCKS_AT_ONCE):
        chunk = by_block[first : first + BLOCKS_AT_ONCE]
        connection.execute(
            sa.text(
                "INSERT INTO directory (block, user_ids) "
                "SELECT :first + n, substring(:ids FROM (n * :width + 1)::int FOR :width) "
                "FROM generate_series(0, :blocks - 1) AS n"
            ),
            {"first": first, "ids": chunk.tobytes(), "width": BLOCK_SLOTS * 8, "blocks": len(chunk)},
        )

    connection.execute(sa.update(tables.shard_state).values(next_slot=shape.users, user_count=shape.users))


def _insert_segment(tx: PostgresShardTransaction, shape: Shape, segment: ShardSegment, rule: Rule) -> int:
    """Insert a segment with its rule and bits. Returns the number of its members on this shard."""
    tx.insert_segment(segment)

    count = 0
    for first, blocks in _ranges(shape):
        user_ids = tx.directory(first, blocks)
        packed = bits.pack((user_ids > 0) & (buckets(user_ids, segment.salt) < rule.threshold))
        if rule.condition:
            packed &= bits.at_slots(tx.condition_slots(rule.condition, first, blocks), first, blocks)
        tx.write_segment_bits(segment.id, first, bits.empty(blocks), packed)
        count += bits.popcount(packed)

    tx.put_rule(segment.id, rule, count, None)
    return count


def _ranges(shape: Shape) -> Iterator[tuple[int, int]]:
    """Yields (first block, number of blocks) of one chunk after another."""
    blocks = -(-shape.users // BLOCK_SLOTS)
    for first in range(0, blocks, BLOCKS_AT_ONCE):
        yield first, min(BLOCKS_AT_ONCE, blocks - first)


def _fill_catalog(dsn: str, shape: Shape, counts: npt.NDArray[np.int64]) -> None:
    now = sa.func.now()
    engine = sa.create_engine(dsn)
    with engine.begin() as connection:
        for (segment, rule), count in zip(shape.rules, counts.tolist(), strict=True):
            values: dict[str, Any] = {
                "id": segment.id,
                "slug": segment.slug,
                "uid": uuid.uuid4(),
                "salt": tables.salt_to_db(segment.salt),
                "display_name": segment.slug,
                "description": "",
                "labels": {},
                "rule_threshold": rule.threshold,
                "rule_condition": rule.condition,
                "rule_policy": rule.policy,
                "state": SegmentState.ACTIVE,
                "etag": f"{segment.id:016x}",
                "create_time": now,
                "update_time": now,
                "member_count": count,
                "member_count_time": now,
            }
            connection.execute(sa.insert(tables.segments).values(values))

        connection.execute(sa.select(sa.func.setval("segment_id_seq", max(1, shape.segments))))
    engine.dispose()
