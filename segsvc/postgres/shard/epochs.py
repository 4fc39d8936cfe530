"""A shard's epoch: the number of committed operations that may have changed lists of its users.

An operation raises it in the transaction that inserts its fence, so both are committed with its bits, and exactly once.
The shard's lock (``locks.SHARD_LOCK``) keeps an epoch as it is while a change of users is going on: what such a change
notes under an epoch is committed before the operation that begins the next one.
"""

from __future__ import annotations

from typing import Any, Final

import numpy as np
import numpy.typing as npt
import sqlalchemy as sa
from sqlalchemy.dialects.postgresql import insert

from segsvc.domain.operation import Operation
from segsvc.postgres import tables

_epoch = tables.shard_epoch.c.epoch


def current_epoch() -> sa.ColumnElement[int]:
    """The shard's epoch in a statement's snapshot; a shard that no operation has changed is in epoch 0.

    By its key, although there is but one row: sessions of reads may not scan tables (``engine.Pool.by_key``).
    """
    return sa.func.coalesce(sa.select(_epoch).where(tables.shard_epoch.c.one).scalar_subquery(), 0)


def epoch_begun_by(operation_id: sa.ColumnElement[Any]) -> sa.ColumnElement[int | None]:
    """The epoch that a committed operation began; null: it began none, or is not committed here."""
    fences = tables.applied_operations.c
    return sa.select(fences.epoch).where(fences.operation_id == operation_id).scalar_subquery()


def unpacked_slots(noted: bytes | None) -> npt.NDArray[np.int64]:
    """The slots in a note, or in several one after the other; None: there is no note."""
    return np.frombuffer(noted or b"", dtype=">i4").astype(np.int64)


# Built once: building one takes as long as running it.
_INSERT_FENCE: Final = (
    insert(tables.applied_operations)
    .values(
        operation_id=sa.bindparam("operation_id"),
        kind=sa.bindparam("kind"),
        epoch=sa.case((sa.bindparam("changes_lists", type_=sa.Boolean), current_epoch() + 1)),
    )
    .on_conflict_do_nothing(index_elements=["operation_id"])
    .returning(tables.applied_operations.c.epoch)
)
_INSERT_EPOCH: Final = insert(tables.shard_epoch).values(epoch=sa.bindparam("epoch"))
_RAISE_EPOCH: Final = _INSERT_EPOCH.on_conflict_do_update(
    index_elements=["one"], set_={"epoch": _INSERT_EPOCH.excluded.epoch}
)


def insert_fence(connection: sa.Connection, operation: Operation) -> bool:
    """Whether this transaction is the one that applies the operation here; if so, it is in the operation's epoch.

    The caller holds the shard's lock exclusively. If the fence of a twin is not committed yet, this waits for the twin
    to end (at most ``lock_timeout``).
    """
    kind = operation.plan.kind
    values = {"operation_id": operation.id, "kind": kind, "changes_lists": kind.changes_lists}
    fence = connection.execute(_INSERT_FENCE, values).one_or_none()
    if fence is None:
        return False  # the epoch stays: it was raised with the fence that is there

    if fence.epoch is not None:
        connection.execute(_RAISE_EPOCH, {"epoch": fence.epoch})
    return True
