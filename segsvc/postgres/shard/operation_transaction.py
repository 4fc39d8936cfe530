"""A shard inside an operation's transaction: directory and bits in bulk, by binary COPY both ways.

Implements ``services.shard_work.ShardTransaction``.
"""

from __future__ import annotations

from collections.abc import Iterator, Sequence
from contextlib import contextmanager
from typing import Any, Final

import numpy as np
import numpy.typing as npt
import sqlalchemy as sa
from psycopg2 import sql
from sqlalchemy.dialects.postgresql import ARRAY

from segsvc.domain import bits
from segsvc.domain.evaluation import Position
from segsvc.domain.override import Effect
from segsvc.domain.segment import Rule, ShardSegment
from segsvc.domain.sharding import BLOCK_BYTES, BLOCK_SLOTS
from segsvc.domain.stored import Int64s
from segsvc.postgres import tables
from segsvc.postgres.conditions.statements import matching, slots_where
from segsvc.postgres.copying import append_rows, bigint_array, copy_rows
from segsvc.postgres.engine import Databases
from segsvc.postgres.locks import SHARD_LOCK
from segsvc.postgres.segment_rows import SHARD_COLUMNS, to_shard_segment
from segsvc.postgres.shard.attribute_names import absent_attributes, attribute_names
from segsvc.postgres.shard.epochs import current_epoch, unpacked_slots
from segsvc.postgres.shard.override_expiry import holds_now

_BLOCKS_LISTED_MAX: Final = 64
"""Up to this number of blocks, deleting listed blocks takes no longer than deleting a range."""

# Built once: building one takes as long as running it.
_TAKE_LOCK: Final = sa.select(sa.func.pg_advisory_xact_lock(SHARD_LOCK))
_SELECT_NEXT_SLOT: Final = sa.select(tables.shard_state.c.next_slot)
_SELECT_SEGMENT: Final = sa.select(*SHARD_COLUMNS).where(tables.shard_segments.c.id == sa.bindparam("segment_id"))
_SELECT_OVERRIDDEN: Final = (
    sa.select(tables.users.c.slot, tables.overrides.c.effect)
    .join_from(tables.overrides, tables.users, tables.users.c.id == tables.overrides.c.user_id)
    .where(tables.overrides.c.segment_id == sa.bindparam("segment_id"), holds_now())
)
_SNAPSHOT: Final = sa.func.pg_current_snapshot()
_SELECT_POSITION: Final = sa.select(
    current_epoch().label("epoch"),
    sa.cast(sa.cast(sa.func.pg_snapshot_xmin(_SNAPSHOT), sa.Text), sa.BigInteger).label("oldest_xid"),
    sa.cast(_SNAPSHOT, sa.Text).label("snapshot"),
)
# By its key, it looks at notes of transactions that had not ended at the position, and at few others.
_SELECT_CHANGED: Final = sa.text(
    "SELECT string_agg(slots, ''::bytea) FROM changed_slots WHERE epoch = :epoch AND xid >= :oldest_xid "
    "AND NOT pg_visible_in_snapshot(CAST(CAST(xid AS text) AS xid8), CAST(:snapshot AS pg_snapshot))"
)
_PUT_RULE: Final = sa.update(tables.shard_segments).where(tables.shard_segments.c.id == sa.bindparam("segment_id"))
_DELETE_RANGE: Final = sa.delete(tables.memberships).where(
    tables.memberships.c.segment_id == sa.bindparam("segment_id"),
    tables.memberships.c.block.between(sa.bindparam("first"), sa.bindparam("last")),
)
_DELETE_LISTED: Final = sa.delete(tables.memberships).where(
    tables.memberships.c.segment_id == sa.bindparam("segment_id"),
    tables.memberships.c.block == sa.any_(sa.bindparam("blocks", type_=ARRAY(sa.BigInteger))),
)


def lock_exclusive(connection: sa.Connection) -> None:
    """Wait for every change of users of the shard to end, and keep new changes out until this transaction ends.

    A statement of its own, and the first of its transaction: at READ COMMITTED the next statement's snapshot is then
    younger than the lock. In one statement with a read, the read could still see an older rule.
    """
    connection.execute(_TAKE_LOCK)


class PostgresShardTransaction:
    """One open transaction of a shard. The caller that opened it holds the lock and ends it."""

    def __init__(self, connection: sa.Connection, shard: int) -> None:
        self._connection = connection
        self.shard = shard

    def next_slot(self) -> int:
        """Slots given out so far; the next user gets this one."""
        return int(self._connection.execute(_SELECT_NEXT_SLOT).scalar_one())

    def segment(self, segment_id: int) -> ShardSegment | None:
        """The shard's copy of a segment; None: the shard does not know it."""
        row = self._connection.execute(_SELECT_SEGMENT, {"segment_id": segment_id}).one_or_none()
        return None if row is None else to_shard_segment(*row)

    def overridden(self, segment_id: int) -> bits.OverriddenSlots:
        """Slots with an override of this segment that holds now, by the shard's clock."""
        rows = self._connection.execute(_SELECT_OVERRIDDEN, {"segment_id": segment_id}).all()

        def slots(effect: Effect) -> npt.NDArray[np.int64]:
            return np.array([row.slot for row in rows if row.effect == effect], dtype=np.int64)

        return bits.OverriddenSlots(slots(Effect.INCLUDE), slots(Effect.EXCLUDE))

    def directory(self, first_block: int, blocks: int) -> bits.UserIds:
        """User ids of a range of blocks; 0 where a slot has no user."""
        rows = copy_rows(
            self._connection,
            sql.SQL("SELECT block, user_ids FROM directory WHERE block >= {} AND block < {}").format(
                sql.Literal(first_block), sql.Literal(first_block + blocks)
            ),
            block=">i8",
            user_ids=("<i8", BLOCK_SLOTS),
        )

        user_ids = np.zeros((blocks, BLOCK_SLOTS), dtype=np.int64)
        user_ids[rows["block"].astype(np.int64) - first_block] = rows["user_ids"]
        return user_ids

    def condition_slots(self, condition: str, first_block: int, blocks: int) -> Int64s:
        """Slots of the users of a range of blocks for whom a condition holds."""
        # Without an end (and a beginning) the server scans the table sequentially, which is faster than by slots.
        to_the_end = (first_block + blocks) * BLOCK_SLOTS >= self.next_slot()
        return slots_where(self._connection, condition, first_block, None if to_the_end else blocks)

    def absent_attributes(self, names: Sequence[str], slots: Int64s | None = None) -> Sequence[str]:
        """The attributes among these that no user has: of the users in these slots; None: of all of the shard."""
        return absent_attributes(self._connection, names, slots)

    def position(self) -> Position:
        """Which transactions this one's snapshot sees."""
        row = self._connection.execute(_SELECT_POSITION).one()
        return Position(row.epoch, row.oldest_xid, row.snapshot)

    def changed_since(self, position: Position) -> Int64s:
        """Slots of users who were changed or deleted by transactions that are committed and that an earlier snapshot
        of the same epoch does not see; in any order, perhaps twice."""
        noted = self._connection.execute(
            _SELECT_CHANGED,
            {"epoch": position.epoch, "oldest_xid": position.oldest_xid, "snapshot": position.snapshot},
        ).scalar_one()
        return unpacked_slots(noted)

    def users_at(self, slots: Int64s) -> bits.UserIds:
        """The user in each of these slots, which ascend; 0: there is none."""
        rows = copy_rows(
            self._connection,
            sql.SQL("SELECT slot, id FROM users WHERE slot = ANY(CAST({} AS bigint[]))").format(
                sql.Literal(bigint_array(slots.tolist()))
            ),
            slot=">i8",
            id=">i8",
        )
        user_ids = np.zeros(slots.size, dtype=np.int64)
        user_ids[np.searchsorted(slots, rows["slot"].astype(np.int64))] = rows["id"]
        return user_ids

    def condition_holds(self, condition: str, slots: Int64s) -> npt.NDArray[np.bool_]:
        """For which of the users in these slots a condition holds."""
        [(_, holds)] = matching(self._connection, [condition], slots)
        return holds

    def attribute_names(self) -> Sequence[str]:
        """Attributes that users have, from a sample of some thousands of users."""
        return attribute_names(self._connection)

    def segment_bits(self, segment_id: int, first_block: int, blocks: int) -> bits.Packed:
        """Bits of one segment in a range of blocks."""
        rows = copy_rows(
            self._connection,
            sql.SQL("SELECT block, bits FROM memberships WHERE segment_id = {} AND block >= {} AND block < {}").format(
                sql.Literal(segment_id), sql.Literal(first_block), sql.Literal(first_block + blocks)
            ),
            block=">i8",
            bits=("u1", BLOCK_BYTES),
        )

        packed = bits.empty(blocks)
        packed[rows["block"].astype(np.int64) - first_block] = rows["bits"]
        return packed

    def write_segment_bits(self, segment_id: int, first_block: int, old: bits.Packed, new: bits.Packed) -> None:
        """Store the blocks that differ from ``old``; one without a bit set loses its row.

        Rows are deleted and appended rather than updated: COPY fills pages, and a new version of a row would not fit on
        the page of the old one anyway. No reader sees the moment between: it is one transaction, under the shard's
        exclusive lock.
        """
        rewritten = np.flatnonzero((old != new).any(axis=1))
        if not rewritten.size:
            return

        where: dict[str, Any] = {"segment_id": segment_id}
        if rewritten.size > max(_BLOCKS_LISTED_MAX, len(new) // 2):
            # Nearly all: a rollout changes either every block or few. One range is found faster than each block.
            rewritten = np.arange(len(new))
            self._connection.execute(_DELETE_RANGE, where | {"first": first_block, "last": first_block + len(new) - 1})
        else:
            self._connection.execute(_DELETE_LISTED, where | {"blocks": (rewritten + first_block).tolist()})

        kept = rewritten[new[rewritten].any(axis=1)]
        if kept.size:
            append_rows(
                self._connection, tables.memberships, block=kept + first_block, segment_id=segment_id, bits=new[kept]
            )

    def put_rule(self, segment_id: int, rule: Rule, rule_count: int, frozen_slot: int | None) -> None:
        """Put a rule in force on this shard, with the count of the bits it set."""
        self._connection.execute(
            _PUT_RULE,
            {
                "segment_id": segment_id,
                "rule_threshold": rule.threshold,
                "rule_condition": rule.condition,
                "rule_policy": rule.policy,
                "rule_count": rule_count,
                "frozen_slot": frozen_slot,
            },
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
        # One exchange: the rows of bits are few, so the exchanges determine how long a deletion takes.
        self._connection.exec_driver_sql(
            "WITH of_bits AS (DELETE FROM memberships WHERE segment_id = %(id)s), "
            "of_overrides AS (DELETE FROM overrides WHERE segment_id = %(id)s) "
            "DELETE FROM segments WHERE id = %(id)s",
            {"id": segment_id},
        )


class PostgresShardSnapshots:
    """Snapshots of shards, for counting. Implements ``services.preview.ShardSnapshots``."""

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
