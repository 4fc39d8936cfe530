"""Attributes too large for their row are fetched once per statement, for any number of conditions and attributes."""

from __future__ import annotations

import json
from collections.abc import Callable

import numpy as np
import pytest
import sqlalchemy as sa

from segsvc.domain.events import CreateUser
from segsvc.postgres.conditions.statements import matching, slots_where
from tests.integration.events.conftest import Shards

USERS = 20
NAMES = [f"attribute_{number}" for number in range(30)]
ALL = " || ".join(f"user.{name} == 'no'" for name in NAMES)
"""Holds for no user, so that every attribute is looked up."""


@pytest.fixture
def shard_of_large(one_shard: Shards) -> Shards:
    """Users of about 8 KB each that cannot be compressed into their row."""
    random = np.random.default_rng(1)
    attributes = [json.dumps({name: random.bytes(110).hex() for name in NAMES}) for _ in range(USERS)]
    one_shard.ingestion.apply_batch(0, [CreateUser(n + 1, text) for n, text in enumerate(attributes)])
    return one_shard


def blocks_read(shards: Shards, ask: Callable[[sa.Connection], object]) -> int:
    """Number of blocks of large attributes that the server reads for ``ask``."""
    told = sa.text(
        "SELECT coalesce(toast_blks_read, 0) + coalesce(toast_blks_hit, 0) FROM pg_statio_user_tables "
        "WHERE relname = 'users'"
    )

    with shards.databases.shard_autocommit(0) as connection:

        def counted() -> int:
            # By itself a session publishes its counters later; and it keeps counters that it has read only within a
            # statement.
            connection.exec_driver_sql("SELECT pg_stat_force_next_flush()")
            return int(connection.execute(told).scalar_one())

        before = counted()
        ask(connection)
        return counted() - before


def test_a_rollout_fetches_them_once(shard_of_large: Shards) -> None:
    one = blocks_read(shard_of_large, lambda connection: slots_where(connection, "user.attribute_0 == 'no'", 0, None))
    every = blocks_read(shard_of_large, lambda connection: slots_where(connection, ALL, 0, None))
    assert one >= USERS
    assert every == one


def test_a_batch_fetches_them_once_for_all_conditions(shard_of_large: Shards) -> None:
    slots = np.arange(USERS)
    conditions = [f"{ALL} || user.{name} == 'neither'" for name in NAMES]
    one = blocks_read(
        shard_of_large, lambda connection: list(matching(connection, ["user.attribute_0 == 'no'"], slots))
    )
    every = blocks_read(shard_of_large, lambda connection: list(matching(connection, conditions, slots)))
    assert one >= USERS
    assert every == one
