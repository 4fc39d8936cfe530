"""An installation for the contract tests: databases of its own, and users added by the service's own ingestion."""

from __future__ import annotations

import json
from collections.abc import Iterator, Mapping, Sequence
from contextlib import contextmanager
from dataclasses import dataclass, field
from typing import Any

import sqlalchemy as sa

from segsvc.bootstrap import make_cache
from segsvc.config import Settings
from segsvc.domain.events import CreateUser, DeleteUser, UserEvent
from segsvc.domain.sharding import shard_of
from segsvc.failpoints import NoFailpoints
from segsvc.local.postgres import PostgresServer
from segsvc.local.redis import RedisServer
from segsvc.postgres import tables
from segsvc.postgres.engine import Databases, Pool
from segsvc.postgres.shard.user_transaction import PostgresUserStore
from segsvc.services.ingestion import Ingestion
from tests.installation import create_databases

SHARDS = 4


@dataclass
class Installation:
    """Databases of one front under test.

    Attributes:
        name: prefix of the databases; the cluster's name.
    """

    name: str
    server: PostgresServer
    cache: RedisServer
    databases: Databases = field(init=False)

    @property
    def database_names(self) -> list[str]:
        return [f"{self.name}_catalog", *(f"{self.name}_shard{shard}" for shard in range(SHARDS))]

    def environment(self) -> dict[str, str]:
        """The settings with which a process finds this installation."""
        catalog, *shards = (self.server.dsn(name) for name in self.database_names)
        return {
            "SEGSVC_CLUSTER": self.name,
            "SEGSVC_CATALOG_DSN": catalog,
            "SEGSVC_SHARD_DSNS": " ".join(shards),
            "SEGSVC_CACHE_URL": self.cache.url,
        }

    def settings(self) -> Settings:
        catalog, *shards = (self.server.dsn(name) for name in self.database_names)
        return Settings(cluster=self.name, catalog_dsn=catalog, shard_dsns=tuple(shards), cache_url=self.cache.url)

    def create(self) -> None:
        create_databases(self.server, self.database_names, self.name)
        self.databases = Databases(self.settings(), "test", Pool(2))

    def create_users(self, users: Mapping[int, Mapping[str, Any]]) -> None:
        """Apply create-user events for these users, given as attributes by user id."""
        self.apply([CreateUser(user_id, json.dumps(attributes)) for user_id, attributes in users.items()])

    def delete_users(self, user_ids: Sequence[int]) -> None:
        self.apply([DeleteUser(user_id) for user_id in user_ids])

    def apply(self, events: Sequence[UserEvent]) -> None:
        cache = make_cache(self.settings())
        ingestion = Ingestion(PostgresUserStore(self.databases), cache, NoFailpoints())
        for shard in range(SHARDS):
            batch = [event for event in events if shard_of(event.user_id, SHARDS) == shard]
            report = ingestion.apply_batch(shard, batch)
            assert not report.dead
        cache.close()

    def fill_catalog(self, segments: int, marker: str, *, description: str = "") -> None:
        """Insert segments directly into the catalog, labelled ``marker``; the shards do not know them."""
        with self.databases.catalog.begin() as connection:
            connection.execute(
                sa.text(
                    "INSERT INTO segments (id, slug, uid, salt, display_name, description, labels, state, etag,"
                    " create_time, update_time)"
                    " SELECT -n, 'filler-' || n, gen_random_uuid(), 0, '', :description,"
                    " jsonb_build_object('marker', CAST(:marker AS text)), 1, 'x', now(), now()"
                    " FROM generate_series(1, :segments) AS n"
                ),
                {"marker": marker, "description": description, "segments": segments},
            )

    def empty_catalog(self) -> None:
        """Remove what ``fill_catalog`` put there."""
        with self.databases.catalog.begin() as connection:
            connection.execute(sa.delete(tables.segments).where(tables.segments.c.id < 0))

    def override(self, user_id: int, slug: str, effect: int, *, expired: bool = False) -> None:
        """Include (1) or exclude (2) a user by hand, with a row written directly into the table."""
        with self.databases.shards[shard_of(user_id, SHARDS)].begin() as connection:
            segment_id = connection.execute(
                sa.select(tables.shard_segments.c.id).where(tables.shard_segments.c.slug == slug)
            ).scalar_one()

            connection.execute(
                sa.insert(tables.overrides).values(
                    user_id=user_id,
                    segment_id=segment_id,
                    effect=effect,
                    expire_time=sa.text("now() - interval '1 second'") if expired else None,
                )
            )

    @contextmanager
    def outage(self, database: str) -> Iterator[None]:
        """One database is out of reach: its sessions are ended, and new ones refused, until the block ends."""
        self.server.psql(f'ALTER DATABASE "{database}" ALLOW_CONNECTIONS false')
        try:
            self.server.psql(
                "SELECT pg_terminate_backend(pid) FROM pg_stat_activity WHERE datname = :'name'", name=database
            )
            yield
        finally:
            self.server.psql(f'ALTER DATABASE "{database}" ALLOW_CONNECTIONS true')
