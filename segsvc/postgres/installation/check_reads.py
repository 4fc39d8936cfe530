"""What the checker reads. Implements ``services.check.CheckReads``."""

from __future__ import annotations

from collections.abc import Collection, Iterator, Sequence
from contextlib import contextmanager
from typing import Any
from uuid import UUID

import numpy as np
import sqlalchemy as sa
from psycopg2 import sql

from segsvc.domain import bits
from segsvc.domain.operation import Failure, OperationPlan, OperationState, PreparedTransaction
from segsvc.domain.override import Effect
from segsvc.domain.segment import ShardSegment
from segsvc.domain.sharding import BLOCK_BYTES, BLOCK_SLOTS
from segsvc.domain.stored import (
    CatalogView,
    DirectoryRows,
    Int64s,
    LedgerEntry,
    OverrideColumns,
    StateRow,
    UserColumns,
)
from segsvc.postgres import segment_rows, tables
from segsvc.postgres.conditions.statements import slots_where
from segsvc.postgres.copying import copy_rows
from segsvc.postgres.engine import Databases, translated
from segsvc.postgres.shard.epochs import current_epoch
from segsvc.postgres.shard.participant import select_prepared


class PostgresCheckReads:
    """Reads of one process; each statement is bounded, as on every connection."""

    def __init__(self, databases: Databases) -> None:
        self._databases = databases

    def catalog(self, *, fence_ttl_s: float, asked_for: Collection[UUID] = ()) -> CatalogView:
        """Segments and operations in one snapshot of the catalog."""
        with translated("catalog"), _snapshot(self._databases.catalog) as connection:
            now = connection.execute(sa.select(sa.func.now())).scalar_one()
            segments = connection.execute(sa.select(*segment_rows.COLUMNS).order_by(tables.segments.c.id)).all()
            operations = _operations(connection, fence_ttl_s, asked_for)
        return CatalogView(now, [segment_rows.to_segment(row) for row in segments], operations)

    def recovery_age_s(self) -> float | None:
        """How long ago recovery last ran over everything, by the catalog's clock; None: never."""
        age = sa.extract("epoch", sa.func.now() - tables.installation.c.recovery_time)
        with self._databases.catalog_tx() as connection:
            found = connection.execute(sa.select(age)).scalar_one_or_none()
        return None if found is None else float(found)

    def unpublished(self) -> tuple[int, float]:
        """Commits that are not published to ``segment-events``: how many, and for how many seconds the oldest has
        waited, by the catalog's clock; 0 if there is none."""
        audit = tables.audit.c
        age = sa.func.coalesce(sa.extract("epoch", sa.func.now() - sa.func.min(audit.time)), 0)
        statement = sa.select(sa.func.count(), age).where(sa.not_(audit.published))
        with self._databases.catalog_tx() as connection:
            count, age_s = connection.execute(statement).one()
        return int(count), float(age_s)

    def changing_segments(self) -> frozenset[int]:
        """Segments of operations that are COMMITTED now."""
        table = tables.operations.c
        with self._databases.catalog_tx() as connection:
            rows = connection.execute(
                sa.select(table.segment_id).where(table.state == OperationState.COMMITTED.name)
            ).scalars()
            return frozenset(rows)

    @contextmanager
    def shard(self, shard: int) -> Iterator[PostgresShardSnapshot]:
        """A snapshot of a shard, for as long as the block lasts."""
        with translated(shard), _snapshot(self._databases.shards[shard]) as connection:
            yield PostgresShardSnapshot(connection)


@contextmanager
def _snapshot(engine: sa.Engine) -> Iterator[sa.Connection]:
    """A transaction whose statements all see the database at the moment of the first one."""
    with engine.connect().execution_options(isolation_level="REPEATABLE READ", postgresql_readonly=True) as connection:
        yield connection


def _operations(connection: sa.Connection, fence_ttl_s: float, asked_for: Collection[UUID]) -> list[LedgerEntry]:
    """Operations that are not final, ended within this time, or are asked for; and all operations of the segments that
    have one which is not final."""
    table = tables.operations.c
    votes = tables.votes.c
    voted = sa.select(sa.func.array_agg(votes.shard)).where(votes.operation_id == table.id).scalar_subquery()
    open_ones = tables.operations.alias("open_ones")

    rows = connection.execute(
        sa.select(
            table.id,
            table.plan,
            table.state,
            table.create_time,
            table.start_time,
            table.deadline,
            table.commit_time,
            table.shards_committed_time,
            table.end_time,
            table.failure,
            voted.label("voted"),
        ).where(
            sa.or_(
                table.segment_id.in_(sa.select(open_ones.c.segment_id).where(open_ones.c.end_time.is_(None))),
                table.end_time > sa.func.now() - sa.func.make_interval(0, 0, 0, 0, 0, 0, fence_ttl_s),
                table.id == sa.any_(sa.cast(list(asked_for), sa.ARRAY(sa.UUID))),
            )
        )
    ).all()
    return [
        LedgerEntry(
            row.id,
            OperationPlan.from_json(row.plan),
            OperationState[row.state],
            row.create_time,
            row.start_time,
            row.deadline,
            row.commit_time,
            row.shards_committed_time,
            row.end_time,
            frozenset(row.voted or ()),
            Failure.from_json(row.failure) if row.failure else None,
        )
        for row in rows
    ]


class PostgresShardSnapshot:
    """One shard in one read-only REPEATABLE READ transaction."""

    def __init__(self, connection: sa.Connection) -> None:
        self._connection = connection

    def state(self) -> StateRow:
        """The shard's counters."""
        table = tables.shard_state.c
        row = self._connection.execute(sa.select(table.next_slot, table.user_count)).one()
        return StateRow(row.next_slot, row.user_count)

    def segments(self) -> Sequence[ShardSegment]:
        """All segments that the shard knows."""
        rows = self._connection.execute(sa.select(*segment_rows.SHARD_COLUMNS))
        return [segment_rows.to_shard_segment(*row) for row in rows]

    def users(self, first: int, count: int) -> UserColumns:
        """Ids and slots of the users of a range of blocks."""
        rows = self._copy(
            "SELECT slot, id FROM users WHERE slot >= {} AND slot < {}",
            first * BLOCK_SLOTS,
            (first + count) * BLOCK_SLOTS,
            slots=">i8",
            ids=">i8",
        )
        return UserColumns(rows["slots"].astype(np.int64), rows["ids"].astype(np.int64))

    def directory(self, first: int, count: int) -> DirectoryRows:
        """Directory rows of a range of blocks; rows of a wrong size are left out."""
        rows = self._copy(
            "SELECT block, user_ids FROM directory WHERE block >= {} AND block < {} AND octet_length(user_ids) = {}",
            first,
            first + count,
            BLOCK_SLOTS * 8,
            blocks=">i8",
            user_ids=("<i8", BLOCK_SLOTS),
        )
        return DirectoryRows(rows["blocks"].astype(np.int64), rows["user_ids"].astype(np.int64))

    def bit_rows(self, first: int, count: int) -> bits.BitRows:
        """Membership rows of a range of blocks, by segment and block; rows of a wrong size are left out."""
        rows = self._copy(
            "SELECT segment_id, block, bits FROM memberships "
            "WHERE block >= {} AND block < {} AND octet_length(bits) = {} ORDER BY segment_id, block",
            first,
            first + count,
            BLOCK_BYTES,
            segment_ids=">i8",
            blocks=">i8",
            packed=("u1", BLOCK_BYTES),
        )

        return bits.BitRows(
            segment_ids=rows["segment_ids"].astype(np.int64),
            blocks=rows["blocks"].astype(np.int64),
            packed=rows["packed"],
        )

    def overrides(self, first: int, count: int) -> OverrideColumns:
        """Overrides of the users of a range of blocks that hold at the snapshot's moment, by the shard's clock."""
        rows = self._copy(
            "SELECT u.slot, o.segment_id, o.effect FROM overrides o JOIN users u ON u.id = o.user_id "
            "WHERE u.slot >= {} AND u.slot < {} AND (o.expire_time IS NULL OR o.expire_time > now())",
            first * BLOCK_SLOTS,
            (first + count) * BLOCK_SLOTS,
            slots=">i8",
            segment_ids=">i8",
            effects=">i2",
        )

        return OverrideColumns(
            rows["slots"].astype(np.int64), rows["segment_ids"].astype(np.int64), rows["effects"] == Effect.INCLUDE
        )

    def condition_slots(self, condition: str, first: int, count: int) -> Int64s:
        """Slots of the users of a range of blocks for whom a condition holds."""
        return slots_where(self._connection, condition, first, count)

    def users_outside(self, slots: int) -> Sequence[tuple[int, int]]:
        """(id, slot) of users whose slot is not below this number, or negative."""
        table = tables.users.c
        return self._tuples(
            sa.select(table.id, table.slot).where(sa.or_(table.slot < 0, table.slot >= slots)).order_by(table.slot)
        )

    def odd_directory_rows(self, blocks: int) -> Sequence[tuple[int, int]]:
        """(block, bytes) of directory rows outside the blocks or of a wrong size."""
        table = tables.directory.c
        size = sa.func.octet_length(table.user_ids)
        return self._tuples(
            sa.select(table.block, size)
            .where(sa.or_(table.block < 0, table.block >= blocks, size != BLOCK_SLOTS * 8))
            .order_by(table.block)
        )

    def odd_bit_rows(self, blocks: int) -> Sequence[tuple[int, int, int]]:
        """(block, segment, bytes) of membership rows outside the blocks or of a wrong size."""
        table = tables.memberships.c
        size = sa.func.octet_length(table.bits)
        return self._tuples(
            sa.select(table.block, table.segment_id, size)
            .where(sa.or_(table.block < 0, table.block >= blocks, size != BLOCK_BYTES))
            .order_by(table.block, table.segment_id)
        )

    def living_tombstones(self) -> Sequence[int]:
        """Deleted users who also have a row among the users."""
        return self._ids(
            sa.select(tables.deleted_users.c.id)
            .join_from(tables.deleted_users, tables.users, tables.users.c.id == tables.deleted_users.c.id)
            .order_by(tables.deleted_users.c.id)
        )

    def misplaced_tombstones(self, shard_count: int) -> Sequence[int]:
        """Deleted users who belong to another shard."""
        user_id = tables.deleted_users.c.id
        own = sa.select(tables.shard_state.c.shard).scalar_subquery()
        return self._ids(sa.select(user_id).where(user_id % shard_count != own).order_by(user_id))

    def orphaned_overrides(self) -> Sequence[tuple[int, int]]:
        """(user, segment) of overrides whose user or segment the shard does not have."""
        table = tables.overrides.c
        return self._tuples(
            sa.select(table.user_id, table.segment_id)
            .outerjoin_from(tables.overrides, tables.users, tables.users.c.id == table.user_id)
            .outerjoin(tables.shard_segments, tables.shard_segments.c.id == table.segment_id)
            .where(sa.or_(tables.users.c.id.is_(None), tables.shard_segments.c.id.is_(None)))
            .order_by(table.user_id, table.segment_id)
        )

    def fences(self) -> frozenset[UUID]:
        """Operations whose work is committed here."""
        return frozenset(self._connection.execute(sa.select(tables.applied_operations.c.operation_id)).scalars())

    def epochs(self) -> tuple[int, int | None]:
        """The shard's epoch, and the newest that a fence has begun; None: no fence has begun one."""
        newest = sa.select(sa.func.max(tables.applied_operations.c.epoch)).scalar_subquery()
        row = self._connection.execute(sa.select(current_epoch().label("epoch"), newest.label("newest"))).one()
        return row.epoch, row.newest

    def epoch_began_s(self, epoch: int) -> float | None:
        """How long ago a fence began this epoch; None: its fence is forgotten, or the epoch is 0."""
        fences = tables.applied_operations.c
        age_s = sa.cast(sa.extract("epoch", sa.func.clock_timestamp() - fences.apply_time), sa.Float)
        return self._connection.execute(sa.select(age_s).where(fences.epoch == epoch)).scalar_one_or_none()

    def changed_slots(self, epoch: int) -> Int64s:
        """Slots of the users who were changed or deleted in an epoch; a slot may occur twice."""
        notes = tables.changed_slots.c
        rows = self._connection.execute(sa.select(notes.slots).where(notes.epoch == epoch)).scalars()
        slots: Int64s = np.frombuffer(b"".join(map(bytes, rows)), dtype=">i4").astype(np.int64)
        return slots

    def prepared(self) -> Sequence[PreparedTransaction]:
        """Prepared transactions of this database, as they are now."""
        return select_prepared(self._connection)

    def deleted_users(self, after: int, limit: int) -> Int64s:
        """Ids of deleted users above this one, ascending."""
        rows = self._copy("SELECT id FROM deleted_users WHERE id > {} ORDER BY id LIMIT {}", after, limit, ids=">i8")
        ids: Int64s = rows["ids"].astype(np.int64)
        return ids

    def _copy(self, query: str, *values: int, **fields: str | tuple[str, int]) -> Any:
        return copy_rows(self._connection, sql.SQL(query).format(*map(sql.Literal, values)), **fields)

    def _tuples(self, query: sa.Select[Any]) -> list[Any]:
        return [tuple(row) for row in self._connection.execute(query)]

    def _ids(self, query: sa.Select[tuple[int]]) -> list[int]:
        return list(self._connection.execute(query).scalars())
