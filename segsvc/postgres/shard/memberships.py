"""Memberships as readers need them: single users for a miss, whole blocks for the warmer.

Each function is one statement, hence one snapshot (READ COMMITTED): bits, row_version, overrides and the shard's epoch
of one moment. An override that has not expired by the shard's clock takes precedence over the rule's bit.
``statement_timestamp()`` is the time of an answer: the snapshot is not older than it, so it has everything that was
acknowledged before.
"""

from __future__ import annotations

from collections.abc import Callable, Iterator, Sequence
from contextlib import contextmanager
from typing import Any, Final, TypeVar

import numpy as np
import numpy.typing as npt
import sqlalchemy as sa
from sqlalchemy.dialects import postgresql
from sqlalchemy.dialects.postgresql import ARRAY, BYTEA, aggregate_order_by

from segsvc.domain.errors import Reason, ServiceError
from segsvc.domain.membership import NEVER_US, LoadedUser, UserBlock
from segsvc.domain.override import Effect
from segsvc.domain.sharding import BLOCK_BYTES, BLOCK_SLOTS
from segsvc.postgres import tables
from segsvc.postgres.engine import Databases, bound_ms
from segsvc.postgres.locks import WARM_LOCK
from segsvc.postgres.shard.epochs import current_epoch
from segsvc.postgres.shard.override_expiry import holds_now

T = TypeVar("T")

WARM_SILENCE_S: Final = 60.0
"""Longest time between two statements of a warmer's session. Between them it waits for the cache, some calls of some
milliseconds each."""

_BIT_LENGTH = BLOCK_SLOTS.bit_length() - 1

_users = tables.users.c
_memberships = tables.memberships.c
_overrides = tables.overrides.c
_directory = tables.directory.c


def _microseconds(time: sa.ColumnElement[Any]) -> sa.ColumnElement[int]:
    """A timestamp as microseconds since 1970, exactly (``extract`` gives a numeric, not a float)."""
    return sa.cast(sa.extract("epoch", time) * 1_000_000, sa.BigInteger)


_READ_TIME = _microseconds(sa.func.statement_timestamp()).label("read_time_us")
_EPOCH = current_epoch().label("epoch")
_USER_IDS: sa.ColumnElement[Any] = sa.literal_column("$1", ARRAY(sa.BigInteger))
_BLOCKS = sa.bindparam("blocks", type_=ARRAY(sa.BigInteger))
_SLOTS = sa.bindparam("slots", type_=ARRAY(sa.BigInteger))


def _packed_int64s(*columns: sa.ColumnElement[Any]) -> sa.ColumnElement[bytes]:
    """All rows of a subquery as one bytea of big-endian int64s: far cheaper to fetch than rows or arrays."""
    row: sa.ColumnElement[Any] = sa.func.int8send(columns[0], type_=BYTEA)
    for column in columns[1:]:
        row = row.concat(sa.func.int8send(column, type_=BYTEA))
    return sa.func.string_agg(row, sa.literal(b"", BYTEA))


# The statements are built once: building one takes longer than running it.


def _users_statement() -> sa.Select[Any]:
    block = _users.slot.bitwise_rshift(_BIT_LENGTH)
    bit = sa.cast(_users.slot.bitwise_and(BLOCK_SLOTS - 1), sa.Integer)
    by_rule = (
        sa.select(_packed_int64s(_memberships.segment_id))
        .where(_memberships.block == block, sa.func.get_bit(_memberships.bits, bit) == 1)
        .scalar_subquery()
    )
    segment_ids = sa.func.array_agg(_overrides.segment_id)

    overridden = (
        sa.select(
            segment_ids.filter(_overrides.effect == Effect.INCLUDE).label("included"),
            segment_ids.filter(_overrides.effect == Effect.EXCLUDE).label("excluded"),
            _microseconds(sa.func.min(_overrides.expire_time)).label("valid_until_us"),
        )
        .where(_overrides.user_id == _users.id, holds_now())
        .lateral("overridden")
    )

    return (
        sa.select(
            _users.id,
            _users.slot,
            _users.row_version,
            _READ_TIME,
            _EPOCH,
            by_rule.label("by_rule"),
            overridden.c.included,
            overridden.c.excluded,
            overridden.c.valid_until_us,
        )
        .select_from(tables.users.join(overridden, sa.true()))
        .where(_users.id == sa.any_(_USER_IDS))
    )


def _blocks_statement() -> sa.Select[Any]:
    first_slot = _directory.block * BLOCK_SLOTS
    in_block = _users.slot.between(first_slot, first_slot + (BLOCK_SLOTS - 1))
    bit = _users.slot.bitwise_and(BLOCK_SLOTS - 1)

    # Both in one number, which saves the server a third of the work; a row_version stays far below 2**53.
    version_and_bit = _users.row_version.bitwise_lshift(_BIT_LENGTH).bitwise_or(bit)
    versions = sa.select(_packed_int64s(version_and_bit)).where(in_block).scalar_subquery()

    until_us = sa.func.coalesce(_microseconds(_overrides.expire_time), NEVER_US)
    included = sa.cast(sa.case((_overrides.effect == Effect.INCLUDE, 1), else_=0), sa.BigInteger)
    overrides = (
        sa.select(_packed_int64s(bit, _overrides.segment_id, included, until_us))
        .select_from(tables.overrides.join(tables.users, _overrides.user_id == _users.id))
        .where(in_block, holds_now())
        .scalar_subquery()
    )
    by_rule = (
        sa.select(
            sa.func.array_agg(aggregate_order_by(_memberships.segment_id, _memberships.segment_id)).label("ids"),
            sa.func.string_agg(
                _memberships.bits, aggregate_order_by(sa.literal(b"", BYTEA), _memberships.segment_id)
            ).label("bits"),
        )
        .where(_memberships.block == _directory.block)
        .lateral("by_rule")
    )

    return (
        sa.select(
            _directory.block,
            _directory.user_ids,
            _READ_TIME,
            _EPOCH,
            versions.label("versions"),
            overrides.label("overrides"),
            by_rule.c.ids,
            by_rule.c.bits,
        )
        .select_from(tables.directory.join(by_rule, sa.true()))
        .where(_directory.block == sa.any_(_BLOCKS))
    )


# Prepared on each connection: planning it takes about as long as running it for one user.
# If the message that prepared it was cancelled, it may be prepared nevertheless, and PostgreSQL would refuse to prepare
# it again for as long as the connection lives. So everything is deallocated first: no other statement stays prepared.
_PREPARE_USERS = "DEALLOCATE ALL; PREPARE segsvc_users (bigint[]) AS " + str(
    _users_statement().compile(dialect=postgresql.dialect(), compile_kwargs={"literal_binds": True})  # type: ignore[no-untyped-call]
)
_SELECT_USERS = "EXECUTE segsvc_users (%s)"
_BOUND = "SELECT set_config('statement_timeout', %s, true);"
"""Sent in one message with the next statement, so the two are one transaction and one round trip."""
_SELECT_BLOCKS = _blocks_statement()
_SELECT_DIRECTORY = sa.select(_directory.block, _directory.user_ids).where(_directory.block == sa.any_(_BLOCKS))
_SELECT_AT_SLOTS = sa.select(_users.id).where(_users.slot == sa.any_(_SLOTS))
_SELECT_SLUGS = sa.select(tables.shard_segments.c.id, tables.shard_segments.c.slug)
_SELECT_NEXT_SLOT = sa.select(tables.shard_state.c.next_slot)


def select_users(
    connection: sa.Connection, user_ids: Sequence[int], timeout_s: float | None = None
) -> list[LoadedUser]:
    """The users among these that exist, in no order, with overrides applied.

    Args:
        timeout_s: bound of the statement; None: the session's.
    """
    bound = () if timeout_s is None else (bound_ms(timeout_s),)
    before = _BOUND if bound else ""

    # With the driver's own cursor: SQLAlchemy's result for one row costs as much as the rest of the exchange.
    driver: Any = connection.connection.driver_connection
    with driver.cursor() as cursor:
        if _PREPARE_USERS not in connection.info:
            # A message of its own: the prepared statement stays even if the statement that follows fails.
            cursor.execute(before + _PREPARE_USERS, bound)
            connection.info[_PREPARE_USERS] = True  # gone with the connection
        cursor.execute(before + _SELECT_USERS, (*bound, list(user_ids)))
        rows = cursor.fetchall()

    return [
        LoadedUser(
            user_id,
            slot,
            row_version,
            read_time_us,
            NEVER_US if valid_until_us is None else valid_until_us,
            _with_overrides(_unpacked_int64s(by_rule).tolist(), included, excluded),
            epoch,
        )
        for user_id, slot, row_version, read_time_us, epoch, by_rule, included, excluded, valid_until_us in rows
    ]


def _with_overrides(
    by_rule: Sequence[int], included: Sequence[int] | None, excluded: Sequence[int] | None
) -> tuple[int, ...]:
    if not included and not excluded:
        return tuple(by_rule)
    return tuple(set(by_rule).union(included or ()).difference(excluded or ()))


def select_slugs(connection: sa.Connection) -> dict[int, str]:
    """Every segment that the shard knows: id -> slug."""
    return {row.id: row.slug for row in connection.execute(_SELECT_SLUGS)}


def select_next_slot(connection: sa.Connection) -> int:
    """Slots given out so far."""
    return int(connection.execute(_SELECT_NEXT_SLOT).scalar_one())


def select_directory(connection: sa.Connection, blocks: Sequence[int]) -> dict[int, list[int]]:
    """The users of these blocks; a block without a directory row is left out."""
    found = {}
    for row in connection.execute(_SELECT_DIRECTORY, {"blocks": list(blocks)}):
        user_ids = np.frombuffer(row.user_ids, dtype="<i8")
        found[row.block] = user_ids[user_ids > 0].tolist()
    return found


def select_blocks(connection: sa.Connection, blocks: Sequence[int]) -> list[UserBlock]:
    """Everything that the memberships of these blocks' users depend on, in one snapshot."""
    return [_user_block(row) for row in connection.execute(_SELECT_BLOCKS, {"blocks": list(blocks)})]


def _user_block(row: Any) -> UserBlock:
    row_versions = np.zeros(BLOCK_SLOTS, dtype=np.int64)
    versions = _unpacked_int64s(row.versions)
    row_versions[versions & (BLOCK_SLOTS - 1)] = versions >> _BIT_LENGTH

    return UserBlock(
        block=row.block,
        user_ids=np.frombuffer(row.user_ids, dtype="<i8"),
        row_versions=row_versions,
        segment_ids=np.array(row.ids or (), dtype=np.int64),
        packed=np.frombuffer(row.bits or b"", dtype=np.uint8).reshape(-1, BLOCK_BYTES),
        overrides=_unpacked_int64s(row.overrides).reshape(-1, 4),
        read_time_us=row.read_time_us,
        epoch=row.epoch,
    )


def _unpacked_int64s(value: Any) -> npt.NDArray[np.int64]:
    return np.frombuffer(value or b"", dtype=">i8").astype(np.int64)


class PostgresMemberships:
    """Implements the reading ports of ``services.cold_reads`` and ``services.warming``.

    Args:
        databases: with as many connections as threads read at once, and with the statement timeout of reads on their
            sessions.
    """

    def __init__(self, databases: Databases) -> None:
        self._databases = databases

    def load(self, shard: int, user_ids: Sequence[int], *, timeout_s: float | None = None) -> list[LoadedUser]:
        """The users among these that exist.

        Args:
            timeout_s: bound of the statement; None: the session's.

        Raises:
            ServiceError: SHARD_UNAVAILABLE, DEADLINE_EXCEEDED, OVERLOADED (every connection is in use).
            LockTimeout: another transaction holds the tables exclusively (a migration).
        """
        return self._read(shard, lambda connection: select_users(connection, user_ids, timeout_s))

    def slugs(self, shard: int) -> dict[int, str]:
        """Every segment that the shard knows: id -> slug. Raises as ``load``."""
        return self._read(shard, select_slugs)

    def next_slot(self, shard: int) -> int:
        """Slots given out so far: every user's slot is below this. Raises as ``load``."""
        return self._read(shard, select_next_slot)

    def _read(self, shard: int, read: Callable[[sa.Connection], T]) -> T:
        """Run one statement, again on a new connection if the first one turns out to be lost. It changes nothing, so it
        may run twice; its snapshot is that of the second run."""
        try:
            with self._databases.shard_connection(shard) as connection:
                return read(connection)
        except ServiceError as error:
            # The pool has dropped every idle connection of this shard together with the lost one.
            if error.reason is not Reason.SHARD_UNAVAILABLE:
                raise

        with self._databases.shard_connection(shard) as connection:
            return read(connection)

    @contextmanager
    def warm_session(self, shard: int) -> Iterator[PostgresWarmSession | None]:
        """A session for one run of the warmer; None: another run is going on on this shard.

        The advisory lock belongs to the session, not to a transaction: the run is many short transactions, so that no
        snapshot grows old. Whatever ends the session (the end of the block, a crash, a lost connection) releases the
        lock, and the next run of any process takes the shard over. A process that is frozen keeps its connection; so
        the server itself ends a session that has asked nothing for ``WARM_SILENCE_S``, and the process learns of it at
        its next statement. The lock only saves work: two runs at once would still be correct, because each fills under
        its own leases.
        """
        with self._databases.shard_autocommit(shard) as connection:
            if not connection.execute(sa.select(sa.func.pg_try_advisory_lock(WARM_LOCK))).scalar_one():
                yield None
                return
            try:
                _bound_silence(connection, WARM_SILENCE_S)
                yield PostgresWarmSession(connection)
            finally:
                # A session that was lost has released its lock.
                if not connection.invalidated:
                    _unlock(connection)


def _bound_silence(connection: sa.Connection, seconds: float) -> None:
    """Let the server end this session once it has asked nothing for so long; 0: never."""
    connection.execute(sa.select(sa.func.set_config("idle_session_timeout", str(int(seconds * 1000)), False)))


def _unlock(connection: sa.Connection) -> None:
    try:
        _bound_silence(connection, 0)
        connection.execute(sa.select(sa.func.pg_advisory_unlock(WARM_LOCK)))
    except sa.exc.SQLAlchemyError:
        # The session may still hold the lock, so it must not go back into the pool.
        connection.invalidate()


class PostgresWarmSession:
    """What the warmer reads of one shard; see ``select_directory`` and ``select_blocks``."""

    def __init__(self, connection: sa.Connection) -> None:
        self._connection = connection

    def users_of(self, blocks: Sequence[int]) -> dict[int, list[int]]:
        return select_directory(self._connection, blocks)

    def users_at(self, slots: Sequence[int]) -> list[int]:
        return list(self._connection.execute(_SELECT_AT_SLOTS, {"slots": list(slots)}).scalars())

    def read(self, blocks: Sequence[int]) -> list[UserBlock]:
        return select_blocks(self._connection, blocks)
