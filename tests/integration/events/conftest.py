"""Shards that have only their schema, and user events applied to them by the real service."""

from __future__ import annotations

import itertools
import threading
from collections.abc import Callable, Iterator, Sequence
from dataclasses import dataclass, field

import pytest
import sqlalchemy as sa

from segsvc.config import Settings
from segsvc.domain.errors import cache_unavailable
from segsvc.failpoints import NoFailpoints
from segsvc.local.postgres import PostgresServer
from segsvc.postgres import tables
from segsvc.postgres.engine import Databases, Pool
from segsvc.postgres.shard.user_transaction import PostgresUserStore
from segsvc.services import ingestion
from segsvc.services.ingestion import Ingestion
from tests.installation import create_databases

_numbers = itertools.count()


class FakeCache:
    """Remembers which users were dropped; can be made unreachable."""

    def __init__(self) -> None:
        self.dropped: list[tuple[int, list[int]]] = []
        self.down = False
        self._lock = threading.Lock()

    def drop_entries(self, shard: int, user_ids: Sequence[int]) -> None:
        if self.down:
            raise cache_unavailable()
        with self._lock:
            self.dropped.append((shard, list(user_ids)))

    def dropped_ids(self) -> set[int]:
        return {user_id for _, user_ids in self.dropped for user_id in user_ids}


@dataclass
class Shards:
    """Databases of a fresh installation, with an ingestion service on them."""

    settings: Settings
    databases: Databases
    ingestion: Ingestion
    cache: FakeCache = field(default_factory=FakeCache)

    def add_segment(
        self,
        segment_id: int,
        threshold: int | None,
        *,
        salt: int = 0,
        policy: int = 1,
        condition: str = "",
        frozen_slot: int | None = None,
    ) -> None:
        """Make a segment known to all shards; its rule then holds for users who are created later."""
        for shard in range(self.databases.shard_count):
            with self.databases.shard_tx(shard) as connection:
                connection.execute(
                    sa.insert(tables.shard_segments).values(
                        id=segment_id,
                        slug=f"segment-{segment_id}",
                        salt=tables.salt_to_db(salt or segment_id * 0x9E3779B97F4A7C15 % 2**64),
                        rule_threshold=threshold,
                        rule_condition=condition if threshold is not None else None,
                        rule_policy=policy if threshold is not None else None,
                        frozen_slot=frozen_slot,
                    )
                )

    def reset(self) -> None:
        """Remove all users and segments."""
        for shard in range(self.databases.shard_count):
            with self.databases.shard_tx(shard) as connection:
                connection.execute(
                    sa.text("TRUNCATE users, directory, memberships, segments, overrides, deleted_users")
                )
                connection.execute(sa.update(tables.shard_state).values(next_slot=0, user_count=0))
        self.cache.dropped.clear()
        self.cache.down = False


@pytest.fixture(autouse=True)
def _slow_machine(monkeypatch: pytest.MonkeyPatch) -> None:
    """A batch that this process applies may take long: otherwise a busy machine would make its bound pass."""
    monkeypatch.setattr(ingestion, "BATCH_S", 60.0)


MakeShards = Callable[..., Shards]


@pytest.fixture(scope="session")
def make_shards(pg_server: PostgresServer) -> Iterator[MakeShards]:
    """Make a fresh installation: ``make_shards(shard_count, **settings)``."""
    made: list[Databases] = []

    def make(shard_count: int = 1, **settings: object) -> Shards:
        number = next(_numbers)
        catalog, *shards = [f"events_{number}_{name}" for name in ("catalog", *range(shard_count))]
        values = Settings(
            _env_file=None,
            shard_dsns=tuple(pg_server.dsn(name) for name in shards),
            catalog_dsn=pg_server.dsn(catalog),
            **settings,
        )

        create_databases(pg_server, [catalog, *shards], values.cluster)
        databases = Databases(values, "test", Pool(4))
        made.append(databases)

        cache = FakeCache()
        return Shards(values, databases, Ingestion(PostgresUserStore(databases), cache, NoFailpoints()), cache)

    yield make
    for databases in made:
        databases.close()


@pytest.fixture(scope="session")
def one_shard_for_all(make_shards: MakeShards) -> Shards:
    return make_shards(1)


@pytest.fixture
def one_shard(one_shard_for_all: Shards) -> Shards:
    """One empty shard."""
    one_shard_for_all.reset()
    return one_shard_for_all
