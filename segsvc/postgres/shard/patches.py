"""What an operation changed in the lists of a shard's users, to be laid over the cache's entries.

Memory: a byte and a bit for each slot, and four bytes for each user who changed. What comes from the server comes in
parts.
"""

from __future__ import annotations

from collections.abc import Iterator
from typing import Final

import numpy as np
import numpy.typing as npt
import sqlalchemy as sa
from sqlalchemy.dialects.postgresql import BYTEA

from segsvc.domain import bits
from segsvc.domain.operation import Operation, OperationKind
from segsvc.domain.patch import Patch
from segsvc.domain.sharding import BLOCK_SLOTS
from segsvc.postgres import tables
from segsvc.postgres.engine import Databases
from segsvc.postgres.shard.epochs import current_epoch, epoch_begun_by, unpacked_slots
from segsvc.postgres.shard.operation_transaction import PostgresShardTransaction

BLOCKS_AT_ONCE: Final = 16_384
"""Blocks of bits read at a time: 2 MB."""
NOTES_AT_ONCE: Final = 500
"""The fewest notes read at a time: some MB if each is of a large batch of events."""
_NOTES_AT_ONCE_MAX: Final = 100_000
_BYTES_AT_ONCE: Final = 4 << 20
"""Notes of few users are read in larger numbers, until they come to this size."""

_notes = tables.changed_slots.c

# Built once: building one takes as long as running it.
_SELECT_STATE: Final = sa.select(
    current_epoch().label("now"),
    epoch_begun_by(sa.bindparam("operation_id")).label("begun"),
    tables.shard_state.c.next_slot,
)


def _notes_statement() -> sa.Select[tuple[bytes | None, int, int]]:
    some = (
        sa.select(_notes.xid, _notes.slots)
        .where(_notes.epoch == sa.bindparam("epoch"), _notes.xid > sa.bindparam("after"))
        .order_by(_notes.xid)
        .limit(sa.bindparam("limit"))
        .subquery()
    )
    slots = sa.func.string_agg(some.c.slots, sa.literal(b"", BYTEA))
    return sa.select(slots.label("slots"), sa.func.count().label("notes"), sa.func.max(some.c.xid).label("last"))


_SELECT_NOTES: Final = _notes_statement()


class PostgresPatches:
    """Reads patches from the shards of an installation."""

    def __init__(self, databases: Databases) -> None:
        self._databases = databases

    def read(self, shard: int, operation: Operation) -> Patch | None:
        """What a committed operation changed on one shard.

        Returns:
            None: there is no patch, and the shard's entries must be dropped instead. Either the operation began no
            epoch here (a process of a release before epochs applied it, or it is not committed here), or a later one
            has begun another: then this one has ended long ago, and notes that its patch needs may be forgotten.

        Raises:
            ServiceError: SHARD_UNAVAILABLE, DEADLINE_EXCEEDED.
        """
        # Bits, overrides and notes of one moment. With notes from before the bits, a user who changed in between would
        # get this segment as it is after the change, and all other segments as they were before it.
        with self._databases.shard_snapshot(shard) as connection:
            state = connection.execute(_SELECT_STATE, {"operation_id": operation.id}).one()
            if state.begun is None or state.begun != state.now:
                return None

            plan = operation.plan
            deleted = plan.kind is OperationKind.DELETE
            transaction = PostgresShardTransaction(connection, shard)
            return Patch(
                epoch=state.begun,
                segment_id=plan.segment_id,
                slots=state.next_slot,
                members=None if deleted else _members(transaction, plan.segment_id, state.next_slot),
                changed=_changed(connection, state.begun, state.next_slot),
            )


def _members(transaction: PostgresShardTransaction, segment_id: int, next_slot: int) -> bits.Packed:
    """The segment's members by slot, overrides included."""
    blocks = -(-next_slot // BLOCK_SLOTS)
    overridden = transaction.overridden(segment_id)
    members = bits.empty(blocks)
    for first in range(0, blocks, BLOCKS_AT_ONCE):
        count = min(BLOCKS_AT_ONCE, blocks - first)
        by_rule = transaction.segment_bits(segment_id, first, count)
        included = bits.at_slots(overridden.included, first, count)
        excluded = bits.at_slots(overridden.excluded, first, count)
        members[first : first + count] = (by_rule | included) & ~excluded
    return members


def _changed(connection: sa.Connection, epoch: int, next_slot: int) -> npt.NDArray[np.uint32]:
    """Slots of the users who changed in this epoch or the one before it: ascending, each once.

    The one before, too: an entry that was read in it can be older than a change in it, as long as the writer has not
    dropped the entry yet.
    """
    changed = np.zeros(next_slot, dtype=np.bool_)
    for each in (epoch - 1, epoch):
        for slots in _noted(connection, each):
            changed[slots[slots < next_slot]] = True
    return np.flatnonzero(changed).astype(np.uint32)


def _noted(connection: sa.Connection, epoch: int) -> Iterator[npt.NDArray[np.int64]]:
    """Slots that are noted under an epoch, in parts."""
    after, limit = -1, NOTES_AT_ONCE
    while True:
        row = connection.execute(_SELECT_NOTES, {"epoch": epoch, "after": after, "limit": limit}).one()
        if not row.notes:
            return

        yield unpacked_slots(row.slots)
        if row.notes < limit:
            return
        after = row.last
        limit = min(max(limit * _BYTES_AT_ONCE // len(row.slots), NOTES_AT_ONCE), _NOTES_AT_ONCE_MAX)
