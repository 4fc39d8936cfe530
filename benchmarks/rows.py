"""How the reference stores memberships: one row for each, as a service without blocks of bits does.

The tables are in the schema ``peer`` of the shard's own database, so they use the same server and settings::

    peer.users        id (primary key), attributes
    peer.memberships  (user_id, segment_id) as primary key, an index on (segment_id)

The primary key serves the list of a user; the index serves the deletion and the count of a segment. Such services have
these two; a foreign key or a time column would only make them slower.
"""

from __future__ import annotations

import io
from collections.abc import Iterator
from typing import Any

import numpy as np
import numpy.typing as npt
import sqlalchemy as sa

from benchmarks.seed import Shape
from segsvc.domain import bits
from segsvc.domain.sharding import BLOCK_SLOTS
from segsvc.postgres.shard.operation_transaction import PostgresShardTransaction

SCHEMA = """
    CREATE SCHEMA peer;
    CREATE TABLE peer.users (id bigint NOT NULL, attributes jsonb NOT NULL);
    CREATE TABLE peer.segments (id bigint PRIMARY KEY, slug text NOT NULL);
    CREATE TABLE peer.memberships (user_id bigint NOT NULL, segment_id bigint NOT NULL);
"""
INDEXES = """
    ALTER TABLE peer.users ADD PRIMARY KEY (id);
    ALTER TABLE peer.memberships ADD PRIMARY KEY (user_id, segment_id);
    CREATE INDEX memberships_segment_id ON peer.memberships (segment_id);
"""

USER_SEGMENTS = """
    SELECT s.slug FROM peer.memberships m JOIN peer.segments s ON s.id = m.segment_id
    WHERE m.user_id = %s ORDER BY s.slug
"""
"""The list of one user, by the primary key."""

_ROW = np.dtype(
    [("fields", ">i2"), ("user_bytes", ">i4"), ("user_id", ">i8"), ("segment_bytes", ">i4"), ("segment_id", ">i8")]
)
_HEADER = b"PGCOPY\n\xff\r\n\0" + bytes(8)
_TRAILER = b"\xff\xff"


def load(engine: sa.Engine, shape: Shape) -> None:
    """Create the schema and load the memberships of the shard's bits. Indexes come last, as usual for a bulk load."""
    with engine.begin() as connection:
        connection.exec_driver_sql(SCHEMA)
        connection.exec_driver_sql("INSERT INTO peer.users SELECT id, attributes FROM users ORDER BY slot")
        connection.exec_driver_sql("INSERT INTO peer.segments SELECT id, slug FROM segments ORDER BY id")
        for segment_id, user_ids in members_by_bits(connection, shape):
            _copy_in(connection, segment_id, user_ids)
        connection.exec_driver_sql("SET LOCAL maintenance_work_mem = '512MB'")
        connection.exec_driver_sql(INDEXES)


def prove_same(engine: sa.Engine, shape: Shape) -> int:
    """Compare every segment's members in bits and in rows, user by user. Returns the number of memberships.

    Raises:
        AssertionError: they differ; the message names the segment.
    """
    total = 0
    with engine.connect() as connection:
        for segment_id, by_bits in members_by_bits(connection, shape):
            by_rows = members_by_rows(connection, segment_id)
            if not np.array_equal(np.sort(by_bits), by_rows):
                raise AssertionError(f"segment {segment_id} has {by_bits.size} members by bits, {by_rows.size} by rows")
            total += by_rows.size

        stored = int(connection.exec_driver_sql("SELECT count(*) FROM peer.memberships").scalar_one())
    assert stored == total, f"{stored} rows, of which {total} belong to a segment"
    return total


def members_by_bits(connection: sa.Connection, shape: Shape) -> Iterator[tuple[int, npt.NDArray[np.int64]]]:
    """Yields (segment id, user ids of its members) from the bits."""
    tx = PostgresShardTransaction(connection, 0)
    blocks = -(-shape.users // BLOCK_SLOTS)
    user_ids = tx.directory(0, blocks)
    for (segment_id,) in connection.exec_driver_sql("SELECT id FROM segments ORDER BY id").all():
        yield segment_id, user_ids[bits.unpack(tx.segment_bits(segment_id, 0, blocks))]


def members_by_rows(connection: sa.Connection, segment_id: int) -> npt.NDArray[np.int64]:
    """User ids of the segment's members from the rows, sorted."""
    rows = connection.execute(
        sa.text("SELECT string_agg(int8send(user_id), ''::bytea) FROM peer.memberships WHERE segment_id = :id"),
        {"id": segment_id},
    ).scalar_one()
    return np.sort(np.frombuffer(rows or b"", dtype=">i8").astype(np.int64))


def _copy_in(connection: sa.Connection, segment_id: int, user_ids: npt.NDArray[np.int64]) -> None:
    rows = np.empty(user_ids.size, dtype=_ROW)
    rows["fields"], rows["user_bytes"], rows["segment_bytes"] = 2, 8, 8
    rows["user_id"], rows["segment_id"] = user_ids, segment_id
    driver: Any = connection.connection.driver_connection
    with driver.cursor() as cursor:
        cursor.copy_expert(
            "COPY peer.memberships (user_id, segment_id) FROM STDIN (FORMAT binary)",
            io.BytesIO(_HEADER + rows.tobytes() + _TRAILER),
        )
