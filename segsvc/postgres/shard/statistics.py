"""Counting a segment on its shards, and reading one user's row. Implements ``services.statistics.ShardCounter`` and
``services.users.UserReader``."""

from __future__ import annotations

from typing import Any, Final

import sqlalchemy as sa

from segsvc.domain.override import Effect
from segsvc.domain.sharding import BLOCK_SLOTS, shard_of
from segsvc.domain.statistics import ShardStatistics
from segsvc.domain.user import User
from segsvc.postgres import tables
from segsvc.postgres.engine import Databases
from segsvc.postgres.shard.override_expiry import holds_now


def _override_effects() -> sa.Subquery:
    """How many overrides of ``:segment_id`` include a non-member of the rule, or exclude a member."""
    overrides, users, memberships = tables.overrides.c, tables.users.c, tables.memberships.c
    by_rule = sa.func.coalesce(sa.func.get_bit(memberships.bits, users.slot % BLOCK_SLOTS) == 1, sa.false())

    return (
        sa.select(
            sa.func.count().filter(overrides.effect == Effect.INCLUDE, sa.not_(by_rule)).label("included"),
            sa.func.count().filter(overrides.effect == Effect.EXCLUDE, by_rule).label("excluded"),
        )
        .select_from(tables.overrides)
        .join(tables.users, users.id == overrides.user_id)
        .outerjoin(
            tables.memberships,
            sa.and_(
                memberships.block == users.slot // BLOCK_SLOTS,
                memberships.segment_id == overrides.segment_id,
            ),
        )
        .where(overrides.segment_id == sa.bindparam("segment_id"), holds_now())
        .subquery()
    )


def _counts() -> sa.Select[Any]:
    segments, state = tables.shard_segments.c, tables.shard_state.c
    effects = _override_effects()

    return (
        sa.select(
            segments.id,
            segments.rule_count,
            state.user_count,
            effects.c.included,
            effects.c.excluded,
            sa.func.now().label("read_time"),
        )
        .select_from(tables.shard_state)
        .join(effects, sa.true())
        .outerjoin(tables.shard_segments, segments.id == sa.bindparam("segment_id"))
    )


_SELECT_COUNTS: Final = _counts()
"""Built once: building it takes longer than running it."""


def select_counts(connection: sa.Connection, shard: int, segment_id: int) -> ShardStatistics:
    """All counts of one segment on one shard, in one statement: they belong to the same moment."""
    row = connection.execute(_SELECT_COUNTS, {"segment_id": segment_id}).one()
    known = row.id is not None
    return ShardStatistics(
        shard=shard,
        known=known,
        rule_count=row.rule_count if known else 0,
        included_count=row.included if known else 0,
        excluded_count=row.excluded if known else 0,
        user_count=row.user_count,
        read_time=row.read_time,
    )


def select_user(connection: sa.Connection, shard: int, user_id: int) -> User | None:
    """One user's row; None: there is no such user."""
    users = tables.users.c
    row = connection.execute(
        sa.select(users.id, users.attributes, users.version, users.create_time, users.update_time).where(
            users.id == user_id
        )
    ).one_or_none()
    if row is None:
        return None
    return User(row.id, row.attributes, row.version, row.create_time, row.update_time, shard)


class PostgresShardCounter:
    """Counts on the shards of an installation."""

    def __init__(self, databases: Databases) -> None:
        self._databases = databases

    @property
    def shard_count(self) -> int:
        return self._databases.shard_count

    def count(self, shard: int, segment_id: int, *, timeout_s: float | None) -> ShardStatistics:
        """Raises ServiceError SHARD_UNAVAILABLE, DEADLINE_EXCEEDED."""
        with self._databases.shard_autocommit(shard, timeout_s=timeout_s) as connection:
            return select_counts(connection, shard, segment_id)


class PostgresUserReader:
    """Reads users where they live."""

    def __init__(self, databases: Databases) -> None:
        self._databases = databases

    def get(self, user_id: int, *, timeout_s: float | None) -> User | None:
        """None: there is no such user. Raises ServiceError SHARD_UNAVAILABLE, DEADLINE_EXCEEDED."""
        shard = shard_of(user_id, self._databases.shard_count)
        with self._databases.shard_autocommit(shard, timeout_s=timeout_s) as connection:
            return select_user(connection, shard, user_id)
