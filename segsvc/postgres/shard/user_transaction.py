"""Users of one shard, as a batch of events sees and changes them. Implements ``services.ingestion.UserStore``.

Rows go to the server as arrays of equal length, so that one statement takes any number of them.
"""

from __future__ import annotations

import time
from collections.abc import Iterator, Mapping, Sequence
from collections.abc import Set as AbstractSet
from contextlib import contextmanager

import numpy as np
import numpy.typing as npt
import psycopg2
import sqlalchemy as sa
from sqlalchemy import exc

from segsvc.domain.errors import LockTimeout, Reason, ServiceError
from segsvc.domain.events import Unstorable
from segsvc.domain.stored import Int64s
from segsvc.domain.user_fold import StoredUser, UserRow
from segsvc.postgres import tables
from segsvc.postgres.copying import append_documents, bigint_array
from segsvc.postgres.engine import Databases, sqlstate
from segsvc.postgres.locks import SHARD_LOCK
from segsvc.postgres.shard.user_bits import PostgresShardBits, int_array

_REFUSED_CLASSES = ("22", "23")
"""SQLSTATE classes of data exceptions and of violated constraints: the statement would fail every time."""
_RETRY_STATES = ("40001", "40P01")
"""Serialisation failure and deadlock: the transaction was the victim, not the cause, so it may be tried again."""


def lock_shared(connection: sa.Connection) -> None:
    """Wait for an operation on the shard to end, and keep the next one out until this transaction ends.

    A statement of its own, and the first of its transaction: at READ COMMITTED the next statement's snapshot is then
    younger than the lock, and sees the rules that the operation has written.
    """
    connection.execute(sa.select(sa.func.pg_advisory_xact_lock_shared(SHARD_LOCK)))


class PostgresUserStore:
    """The users of all shards."""

    def __init__(self, databases: Databases) -> None:
        self._databases = databases

    @property
    def shard_count(self) -> int:
        return self._databases.shard_count

    @contextmanager
    def transaction(self, shard: int, *, timeout_s: float | None) -> Iterator[PostgresUserTransaction]:
        """See ``services.ingestion.UserStore.transaction``."""
        until = None if timeout_s is None else time.monotonic() + timeout_s
        try:
            with self._databases.shard_tx(shard, timeout_s=timeout_s) as connection:
                yield PostgresUserTransaction(connection, until)
        except (exc.DBAPIError, psycopg2.Error) as error:  # psycopg2.Error comes from COPY, which bypasses SQLAlchemy
            state = sqlstate(error)
            if state.startswith(_REFUSED_CLASSES):
                raise Unstorable(state) from error
            if state in _RETRY_STATES:
                raise LockTimeout from error
            raise


class PostgresUserTransaction(PostgresShardBits):
    """One transaction of a shard. Implements ``services.ingestion.UserTransaction``.

    Args:
        until: ``time.monotonic()`` after which no further condition is asked; None: no bound.
    """

    def __init__(self, connection: sa.Connection, until: float | None) -> None:
        super().__init__(connection)
        self._until = until

    def matching(self, conditions: Sequence[str], slots: Int64s) -> Iterator[tuple[str, npt.NDArray[np.bool_]]]:
        """See ``UserTransaction.matching``. Raises ServiceError DEADLINE_EXCEEDED."""
        for answer in super().matching(conditions, slots):
            # Each statement has a bound of its own, and many conditions take several statements.
            if self._until is not None and time.monotonic() > self._until:
                raise ServiceError(Reason.DEADLINE_EXCEEDED, "the batch takes too long")
            yield answer

    def lock(self) -> int:
        """The shard's lock, shared; then the row of shard_state; returns its next free slot."""
        lock_shared(self._connection)
        return int(self._connection.execute(sa.select(tables.shard_state.c.next_slot).with_for_update()).scalar_one())

    def find(self, user_ids: Sequence[int]) -> Mapping[int, StoredUser]:
        """The users among these that exist, their rows locked in the order of their ids."""
        users = tables.users.c
        rows = self._connection.execute(
            sa.select(users.id, users.slot, users.version)
            .where(users.id == sa.any_(int_array(user_ids)))
            .order_by(users.id)
            .with_for_update()
        )
        return {row.id: StoredUser(row.slot, row.version) for row in rows}

    def find_tombstones(self, user_ids: Sequence[int]) -> AbstractSet[int]:
        """The users among these that were deleted."""
        deleted = tables.deleted_users.c
        return set(
            self._connection.execute(sa.select(deleted.id).where(deleted.id == sa.any_(int_array(user_ids)))).scalars()
        )

    def known(self, user_ids: Int64s) -> Int64s:
        """The users among these that exist or were deleted."""
        found = self._connection.execute(
            sa.text(
                "SELECT id FROM users WHERE id = ANY(CAST(:ids AS bigint[])) "
                "UNION ALL SELECT id FROM deleted_users WHERE id = ANY(CAST(:ids AS bigint[]))"
            ),
            {"ids": bigint_array(user_ids.tolist())},
        ).scalars()
        return np.array(found.all(), dtype=np.int64)

    def insert(self, user_ids: Int64s, first_slot: int, versions: Int64s | int, attributes: Sequence[str]) -> None:
        """Write new users."""
        append_documents(
            self._connection,
            tables.users,
            "attributes",
            attributes,
            id=user_ids,
            slot=np.arange(first_slot, first_slot + user_ids.size),
            version=versions,
        )

    def update(self, users: Sequence[UserRow]) -> None:
        """Replace attributes and version of users, and raise their row_version."""
        self._connection.execute(
            sa.text(
                "UPDATE users SET version = u.version, attributes = u.attributes::jsonb, "
                "row_version = users.row_version + 1, update_time = now() FROM unnest("
                "CAST(:ids AS bigint[]), CAST(:versions AS bigint[]), CAST(:attributes AS text[])) "
                "AS u(id, version, attributes) WHERE users.id = u.id"
            ),
            _keys(users),
        )

    def remove(self, user_ids: Sequence[int]) -> None:
        """Delete users, their overrides, and the answers kept for their requests."""
        ids = int_array(user_ids)
        for table in (tables.overrides, tables.user_requests):
            self._connection.execute(sa.delete(table).where(table.c.user_id == sa.any_(ids)))
        self._connection.execute(sa.delete(tables.users).where(tables.users.c.id == sa.any_(ids)))

    def insert_tombstones(self, versions: Mapping[int, int]) -> None:
        """Write tombstones."""
        self._connection.execute(
            sa.text(
                "INSERT INTO deleted_users (id, version) "
                "SELECT u.id, u.version FROM unnest(CAST(:ids AS bigint[]), CAST(:versions AS bigint[])) "
                "AS u(id, version)"
            ),
            {"ids": bigint_array(versions), "versions": bigint_array(versions.values())},
        )

    def advance(self, next_slot: int, users_added: int) -> None:
        """Store the next free slot, and add to the number of users."""
        state = tables.shard_state
        self._connection.execute(
            sa.update(state).values(next_slot=next_slot, user_count=state.c.user_count + users_added)
        )


def _keys(users: Sequence[UserRow]) -> dict[str, str | list[str]]:
    return {
        "ids": bigint_array(user.user_id for user in users),
        "versions": bigint_array(user.version for user in users),
        "attributes": [user.attributes for user in users],
    }
