"""A catalog and its shards on the session's PostgreSQL: emptied for each test, which is quicker than new databases."""

from __future__ import annotations

from collections.abc import Iterator, Sequence
from contextlib import contextmanager
from dataclasses import dataclass

import numpy as np
import sqlalchemy as sa

from segsvc.config import Settings
from segsvc.domain.sharding import BLOCK_SLOTS
from segsvc.local.postgres import PostgresServer
from segsvc.postgres import tables

_DATABASE_NAMES = "test_catalog", "test_shard{}"


def _empty_database(server: PostgresServer, name: str, metadata: sa.MetaData) -> None:
    """Make the database with its tables, or take everything out of it; whoever still uses it is thrown out."""
    engine = sa.create_engine(server.dsn(name), poolclass=sa.NullPool)
    try:
        with engine.begin() as connection:
            connection.execute(
                sa.text(
                    "SELECT pg_terminate_backend(pid) FROM pg_stat_activity "
                    "WHERE datname = current_database() AND pid <> pg_backend_pid()"
                )
            )
            names = ", ".join(f'"{table.name}"' for table in metadata.sorted_tables)
            connection.exec_driver_sql(f"TRUNCATE {names} RESTART IDENTITY")
    except sa.exc.OperationalError:  # there is no such database yet
        server.create_database(name)
        metadata.create_all(engine)


@dataclass(frozen=True, slots=True)
class Installation:
    """An empty installation; ``settings`` lead to it."""

    settings: Settings
    server: PostgresServer

    @property
    def shard_count(self) -> int:
        return self.settings.shard_count

    def execute(self, shard: int | None, statement: str, **parameters: object) -> Sequence[sa.Row[tuple[object, ...]]]:
        """Run one statement in a transaction of its own. ``shard`` None: on the catalog."""
        engine = sa.create_engine(
            self.settings.catalog_dsn if shard is None else self.settings.shard_dsns[shard], poolclass=sa.NullPool
        )
        with engine.begin() as connection:
            result = connection.execute(sa.text(statement), parameters)
            return result.all() if result.returns_rows else []

    def prepared(self, shard: int) -> list[str]:
        """Gids prepared on a shard."""
        rows = self.execute(shard, "SELECT gid FROM pg_prepared_xacts WHERE database = current_database()")
        return [str(row.gid) for row in rows]

    def add_users(self, user_ids: Sequence[int]) -> None:
        """Put users on an installation without users, in the order of their ids, past any event."""
        for shard in range(self.shard_count):
            mine = np.array([u for u in user_ids if u % self.shard_count == shard], dtype="<i8")
            if not mine.size:
                continue
            blocks = -(-mine.size // BLOCK_SLOTS)
            directory = np.zeros((blocks, BLOCK_SLOTS), dtype="<i8")
            directory.ravel()[: mine.size] = mine
            self.execute(
                shard,
                "INSERT INTO users (id, slot, attributes, version) "
                "SELECT id, n - 1, '{}', 0 FROM unnest(CAST(:ids AS bigint[])) WITH ORDINALITY u(id, n)",
                ids=mine.tolist(),
            )
            for block in range(blocks):
                self.execute(
                    shard,
                    "INSERT INTO directory (block, user_ids) VALUES (:block, :ids)",
                    block=block,
                    ids=directory[block].tobytes(),
                )
            self.execute(shard, "UPDATE shard_state SET next_slot = :n, user_count = :n", n=int(mine.size))

    def members(self, segment_id: int) -> set[int]:
        """Users whose bit of this segment is set, overrides apart."""
        found: set[int] = set()
        for shard in range(self.shard_count):
            rows = self.execute(
                shard,
                "SELECT u.id FROM users u JOIN memberships m ON m.block = u.slot / 1024 "
                "WHERE m.segment_id = :id AND get_bit(m.bits, u.slot % 1024) = 1",
                id=segment_id,
            )
            found.update(int(str(row.id)) for row in rows)
        return found


@contextmanager
def new_installation(server: PostgresServer, *, shards: int = 4, **overrides: object) -> Iterator[Installation]:
    """An empty installation; one at a time.

    Raises:
        AssertionError: at the end, if a prepared transaction was left.
    """
    catalog, shard_name = _DATABASE_NAMES
    names = [catalog, *(shard_name.format(shard) for shard in range(shards))]
    for name in names:
        _empty_database(server, name, tables.catalog if name == catalog else tables.shard)
    settings = Settings(
        _env_file=None,
        catalog_dsn=server.dsn(names[0]),
        shard_dsns=tuple(server.dsn(name) for name in names[1:]),
        **overrides,  # type: ignore[arg-type]
    )
    installation = Installation(settings, server)
    installation.execute(
        None, "INSERT INTO installation (cluster, shard_count) VALUES (:c, :n)", c=settings.cluster, n=shards
    )
    for shard in range(shards):
        installation.execute(
            shard,
            "INSERT INTO shard_state (cluster, shard, shard_count) VALUES (:c, :s, :n)",
            c=settings.cluster,
            s=shard,
            n=shards,
        )
    left: list[str] = []
    try:
        yield installation
    finally:
        for shard, name in enumerate(names[1:]):
            for gid in installation.prepared(shard):
                left.append(gid)
                server.psql("ROLLBACK PREPARED :'gid'", name, gid=gid)
    assert not left, f"left prepared: {left}"
