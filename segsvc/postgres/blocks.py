"""A shard inside an operation's transaction: directory and bits in bulk, by binary COPY outwards.

Implements ``services.shard_work.ShardTransaction``. The format of binary COPY is PostgreSQL's ("COPY", section
"Binary Format"): a 19-byte header, then per row a field count (int16) and per field a length (int32) and the bytes,
all big-endian, and a trailer of two bytes. Rows of one width are read as one numpy array.
"""

from __future__ import annotations

import io
from collections.abc import Iterator
from contextlib import contextmanager
from typing import Any, cast

import numpy as np
import numpy.typing as npt
import sqlalchemy as sa
from psycopg2 import sql

from segsvc.domain import bits
from segsvc.domain.segment import Policy, Rule, ShardSegment
from segsvc.domain.sharding import BLOCK_BYTES, BLOCK_SLOTS
from segsvc.domain.stored import Int64s
from segsvc.postgres import tables
from segsvc.postgres.condition_statements import slots_where
from segsvc.postgres.engine import Databases
from segsvc.postgres.locks import SHARD_LOCK

_HEADER_BYTES = 19
_TRAILER_BYTES = 2
INCLUDE, EXCLUDE = 1, 2


def lock_exclusive(connection: sa.Connection) -> None:
    """Wait for every user change of the shard to end, and keep new ones out until this transaction ends.

    A statement of its own, and the first of its transaction: at READ COMMITTED the next statement's snapshot is then
    younger than the lock. In one statement with a read, the read could still see an older rule.
    """
    connection.execute(sa.select(sa.func.pg_advisory_xact_lock(SHARD_LOCK)))


class PostgresShardTransaction:
    """One open transaction of a shard; whoever opened it holds the lock and ends it."""

    def __init__(self, connection: sa.Connection, shard: int) -> None:
        self._connection = connection
        self.shard = shard

    def next_slot(self) -> int:
        """Slots given out so far; the next user gets this one."""
        return int(self._connection.execute(sa.select(tables.shard_state.c.next_slot)).scalar_one())

    def user_count(self) -> int:
        """Users that exist."""
        return int(self._connection.execute(sa.select(tables.shard_state.c.user_count)).scalar_one())

    def segment(self, segment_id: int) -> ShardSegment | None:
        """The shard's copy of a segment; None: the shard does not know it."""
        table = tables.shard_segments.c
        row = self._connection.execute(
            sa.select(
                table.id,
                table.slug,
                table.salt,
                table.rule_threshold,
                table.rule_condition,
                table.rule_policy,
                table.rule_count,
                table.frozen_slot,
            ).where(table.id == segment_id)
        ).one_or_none()
        if row is None:
            return None
        rule = None
        if row.rule_threshold is not None:
            rule = Rule(row.rule_threshold, row.rule_condition, Policy(row.rule_policy))
        return ShardSegment(row.id, row.slug, tables.salt_from_db(row.salt), rule, row.rule_count, row.frozen_slot)

    def overridden(self, segment_id: int) -> bits.OverriddenSlots:
        """Slots with an override of this segment that holds now, by the shard's clock."""
        table = tables.overrides.c
        rows = self._connection.execute(
            sa.select(tables.users.c.slot, table.effect)
            .join_from(tables.overrides, tables.users, tables.users.c.id == table.user_id)
            .where(
                table.segment_id == segment_id,
                sa.or_(table.expire_time.is_(None), table.expire_time > sa.func.now()),
            )
        ).all()

        def slots(effect: int) -> npt.NDArray[np.int64]:
            return np.array([row.slot for row in rows if row.effect == effect], dtype=np.int64)

        return bits.OverriddenSlots(slots(INCLUDE), slots(EXCLUDE))

    def directory(self, first_block: int, blocks: int) -> bits.UserIds:
        """User ids of a range of blocks; 0 where a slot has no user."""
        payload = BLOCK_SLOTS * 8
        rows = self._copy_rows(
            sql.SQL("SELECT block, user_ids FROM directory WHERE block >= {} AND block < {}").format(
                sql.Literal(first_block), sql.Literal(first_block + blocks)
            ),
            payload,
        )
        user_ids = np.zeros((blocks, BLOCK_SLOTS), dtype="<i8")
        user_ids[_block_numbers(rows) - first_block] = rows[:, -payload:].copy().view("<i8")
        return cast(bits.UserIds, user_ids)

    def condition_slots(self, condition: str, first_block: int, blocks: int) -> Int64s:
        """Slots of the users of a range of blocks for whom a condition holds."""
        return slots_where(self._connection, condition, first_block, blocks)

    def segment_bits(self, segment_id: int, first_block: int, blocks: int) -> bits.Packed:
        """Bits of one segment in a range of blocks."""
        rows = self._copy_rows(
            sql.SQL("SELECT block, bits FROM memberships WHERE segment_id = {} AND block >= {} AND block < {}").format(
                sql.Literal(segment_id), sql.Literal(first_block), sql.Literal(first_block + blocks)
            ),
            BLOCK_BYTES,
        )
        packed = bits.empty(blocks)
        packed[_block_numbers(rows) - first_block] = rows[:, -BLOCK_BYTES:]
        return packed

    def write_segment_bits(self, segment_id: int, first_block: int, old: bits.Packed, new: bits.Packed) -> None:
        """Store the blocks that differ from ``old``; one without a bit set loses its row."""
        differs = (old != new).any(axis=1)
        has_bits = new.any(axis=1)
        changed = np.flatnonzero(differs & has_bits)
        if changed.size:
            # One bytea for all blocks, cut by the server: an array of bytea would be quoted twice.
            self._connection.execute(
                sa.text(
                    "INSERT INTO memberships (block, segment_id, bits) "
                    "SELECT b.block, :segment_id, substring(:bits FROM ((b.n - 1) * :width + 1)::int FOR :width) "
                    "FROM unnest(CAST(:blocks AS bigint[])) WITH ORDINALITY AS b(block, n) "
                    "ON CONFLICT (block, segment_id) DO UPDATE SET bits = excluded.bits"
                ),
                {
                    "segment_id": segment_id,
                    "bits": new[changed].tobytes(),
                    "width": BLOCK_BYTES,
                    "blocks": (changed + first_block).tolist(),
                },
            )
        emptied = np.flatnonzero(differs & ~has_bits)
        if emptied.size:
            self._connection.execute(
                sa.text(
                    "DELETE FROM memberships WHERE segment_id = :segment_id AND block = ANY(CAST(:blocks AS bigint[]))"
                ),
                {"segment_id": segment_id, "blocks": (emptied + first_block).tolist()},
            )

    def put_rule(self, segment_id: int, rule: Rule, rule_count: int, frozen_slot: int | None) -> None:
        """Put a rule in force on this shard, with the count of the bits it set."""
        self._connection.execute(
            sa.update(tables.shard_segments)
            .where(tables.shard_segments.c.id == segment_id)
            .values(
                rule_threshold=rule.threshold,
                rule_condition=rule.condition,
                rule_policy=rule.policy,
                rule_count=rule_count,
                frozen_slot=frozen_slot,
            )
        )

    def insert_segment(self, segment: ShardSegment) -> None:
        """Make a segment known to the shard; it has no rule yet."""
        self._connection.execute(
            sa.insert(tables.shard_segments).values(
                id=segment.id, slug=segment.slug, salt=tables.salt_to_db(segment.salt)
            )
        )

    def delete_segment(self, segment_id: int) -> None:
        """Remove a segment's bits, its overrides and itself from the shard."""
        for table, column in (
            (tables.memberships, tables.memberships.c.segment_id),
            (tables.overrides, tables.overrides.c.segment_id),
            (tables.shard_segments, tables.shard_segments.c.id),
        ):
            self._connection.execute(sa.delete(table).where(column == segment_id))

    def _copy_rows(self, query: sql.Composed, payload: int) -> npt.NDArray[np.uint8]:
        """Rows ``(block bigint, bytea of a fixed size)`` of a query, one row of bytes each."""
        buffer = io.BytesIO()
        driver: Any = self._connection.connection.driver_connection
        with driver.cursor() as cursor:
            cursor.copy_expert(sql.SQL("COPY ({}) TO STDOUT (FORMAT binary)").format(query), buffer)
        rows = np.frombuffer(buffer.getbuffer(), dtype=np.uint8)[_HEADER_BYTES:-_TRAILER_BYTES]
        return rows.reshape(-1, 2 + 4 + 8 + 4 + payload)


def _block_numbers(rows: npt.NDArray[np.uint8]) -> npt.NDArray[np.int64]:
    return rows[:, 6:14].copy().view(">i8").ravel().astype(np.int64)


class PostgresShardSnapshots:
    """Shards as they are at one moment, for counting. Implements ``services.preview.ShardSnapshots``."""

    def __init__(self, databases: Databases) -> None:
        self._databases = databases

    @property
    def shard_count(self) -> int:
        return self._databases.shard_count

    @contextmanager
    def snapshot(self, shard: int, *, timeout_s: float | None) -> Iterator[PostgresShardTransaction]:
        """A read-only transaction of one snapshot. Raises ServiceError SHARD_UNAVAILABLE, DEADLINE_EXCEEDED."""
        with self._databases.shard_snapshot(shard, timeout_s=timeout_s) as connection:
            yield PostgresShardTransaction(connection, shard)
