"""A small installation without faults, written again for each test."""

from __future__ import annotations

from collections.abc import Iterator

import pytest
import redis

from segsvc.bootstrap import Check, make_cache
from segsvc.cache.client import CacheClient
from segsvc.config import Settings
from segsvc.domain.operation import OperationKind, OperationState
from segsvc.local.postgres import PostgresServer
from segsvc.local.redis import RedisServer
from segsvc.postgres.installation.migrate import migrate
from tests.integration.check.world import SHARDS, World


@pytest.fixture(scope="module")
def check_settings(pg_server: PostgresServer, cache_server: RedisServer) -> Settings:
    """Settings of two migrated shards, a catalog and the cache."""
    names = ["check_catalog", *(f"check_{shard}" for shard in range(SHARDS))]
    for name in names:
        pg_server.create_database(name)

    settings = Settings(
        _env_file=None,  # type: ignore[call-arg]
        cluster="check",
        catalog_dsn=pg_server.dsn(names[0]),
        shard_dsns=tuple(pg_server.dsn(name) for name in names[1:]),
        cache_url=cache_server.url,
    )

    migrate(settings)
    return settings


@pytest.fixture
def cache(check_settings: Settings) -> Iterator[CacheClient]:
    with redis.Redis.from_url(check_settings.cache_url) as client:
        client.flushall()
    made = make_cache(check_settings, timeout_s=2)
    yield made
    made.close()


@pytest.fixture
def world(check_settings: Settings) -> World:
    """An installation without faults, with past operations; nothing is in the cache yet."""
    made = World(check_settings)
    for segment in made.segments:
        made.add_operation(OperationKind.CREATE, segment, OperationState.DONE)
        if segment.rule is not None:
            made.add_operation(OperationKind.ROLL_OUT, segment, OperationState.DONE, rule=segment.rule)
    made.add_operation(OperationKind.DELETE, made.segments[0], OperationState.ABORTED)
    made.write()
    return made


@pytest.fixture
def service(check_settings: Settings) -> Iterator[Check]:
    made = Check(check_settings)
    yield made
    made.close()
