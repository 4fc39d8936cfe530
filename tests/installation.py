"""A catalog and its shards on the session's PostgreSQL: emptied and used again, which is quicker than new databases."""

from __future__ import annotations

from collections.abc import Iterator, Sequence
from contextlib import contextmanager
from dataclasses import dataclass
from functools import cache
from typing import Final, Protocol
from uuid import UUID

import numpy as np
import sqlalchemy as sa

from segsvc.cache.keys import Keys
from segsvc.config import Settings
from segsvc.domain.sharding import BLOCK_SLOTS
from segsvc.postgres import tables
from segsvc.postgres.installation.roles import grant, roles_of

INSTALLATION_ID: Final = UUID("7e57ca5e-0000-4000-8000-000000000000")
"""The id of every installation made here: databases are used again, and a process asks only once whose they are."""
KEYS: Final = Keys(INSTALLATION_ID.hex[:8].encode())
"""The keys of its cache."""

_DATABASE_NAMES = "test_catalog", "test_shard{}"

SERVICES: Final = "test_services"
"""The login of the services under test: it may do what docs/operations.md allows, and nothing else."""


class DatabaseServer(Protocol):
    """A PostgreSQL server that this process may use as it likes."""

    def dsn(self, database: str) -> str: ...

    def create_database(self, name: str) -> None: ...


_OF_OPERATIONS = {
    "catalog": ("requests", "progress", "votes", "operations", "audit", "segments"),
    "shard": ("memberships", "overrides", "applied_operations", "segments"),
}
"""Tables that operations write; a table that refers to another one comes before it."""


@cache
def _engine(dsn: str) -> sa.Engine:
    """For the tests' own statements: its connections stay open, as connecting takes longer than most statements."""
    return sa.create_engine(dsn, isolation_level="AUTOCOMMIT", pool_pre_ping=True)


def _empty_database(server: DatabaseServer, name: str, metadata: sa.MetaData) -> None:
    """Make the database with its tables, or empty it; sessions that still use it are ended."""
    engine = _engine(server.dsn(name))
    try:
        connection = engine.connect()
    except sa.exc.OperationalError:  # there is no such database yet
        server.create_database(name)
        metadata.create_all(engine)
        return

    with connection:
        connection.execute(
            sa.text(
                "SELECT pg_terminate_backend(pid) FROM pg_stat_activity "
                "WHERE datname = current_database() AND pid <> pg_backend_pid()"
            )
        )
        names = ", ".join(f'"{table.name}"' for table in metadata.sorted_tables)
        connection.exec_driver_sql(f"TRUNCATE {names} RESTART IDENTITY; {_restart_sequences(metadata)}")


def _restart_sequences(metadata: sa.MetaData) -> str:
    """Statements that restart at 1 the sequences that belong to no column."""
    return "".join(f"ALTER SEQUENCE {sequence.name} RESTART;" for sequence in metadata._sequences.values())


def create_databases(server: DatabaseServer, names: Sequence[str], cluster: str) -> None:
    """New databases of an empty installation: the catalog, then the shards in their order."""
    for name in names:
        server.create_database(name)
        engine = _engine(server.dsn(name))
        (tables.catalog if name == names[0] else tables.shard).create_all(engine)
    _found(server, names, cluster)
    for name in names:
        _engine(server.dsn(name)).dispose()


def _found(server: DatabaseServer, names: Sequence[str], cluster: str) -> None:
    """Write into empty databases which installation they belong to, as the migrator does."""
    catalog, *shards = names
    with _engine(server.dsn(catalog)).connect() as connection:
        installation = connection.execute(
            sa.insert(tables.installation)
            .values(cluster=cluster, shard_count=len(shards), id=INSTALLATION_ID)
            .returning(tables.installation.c.id)
        ).scalar_one()

    for shard, name in enumerate(shards):
        with _engine(server.dsn(name)).connect() as connection:
            connection.execute(
                sa.insert(tables.shard_state).values(
                    cluster=cluster, installation=installation, shard=shard, shard_count=len(shards)
                )
            )


@dataclass(frozen=True, slots=True)
class Installation:
    """An empty installation; ``settings`` lead to it."""

    settings: Settings
    server: DatabaseServer

    @property
    def shard_count(self) -> int:
        return self.settings.shard_count

    def dsn(self, shard: int | None) -> str:
        """For the tests' own statements, as a superuser. ``shard`` None: the catalog."""
        dsn = self.settings.catalog_dsn if shard is None else self.settings.shard_dsns[shard]
        return sa.make_url(dsn).set(username="postgres").render_as_string(hide_password=False)

    def execute(self, shard: int | None, statement: str, **parameters: object) -> Sequence[sa.Row[tuple[object, ...]]]:
        """Run one statement in a transaction of its own. ``shard`` None: on the catalog."""
        with _engine(self.dsn(shard)).connect() as own:
            result = own.execute(sa.text(statement), parameters)
            return result.all() if result.returns_rows else []

    def prepared(self, shard: int) -> list[str]:
        """Gids prepared on a shard."""
        rows = self.execute(shard, "SELECT gid FROM pg_prepared_xacts WHERE database = current_database()")
        return [str(row.gid) for row in rows]

    def forget_operations(self) -> None:
        """Delete all operations and segments, with all that they made; the users stay, as in a new installation."""
        dsns = [self.dsn(None), *map(self.dsn, range(self.shard_count))]
        for dsn, metadata in zip(dsns, [tables.catalog, *[tables.shard] * self.shard_count], strict=True):
            # Not TRUNCATE: it makes new files for every table and index, which takes longer than a few rows.
            names = _OF_OPERATIONS["catalog" if metadata is tables.catalog else "shard"]
            statements = "".join(f"DELETE FROM {name};" for name in names)
            with _engine(dsn).connect() as connection:
                connection.exec_driver_sql(statements + _restart_sequences(metadata))

    def users_digest(self) -> list[object]:
        """Equal digests: the same users in the same slots, with the same attributes and versions, on every shard."""
        return [
            self.execute(
                shard,
                "SELECT (SELECT md5(string_agg(u::text, '|' ORDER BY id)) FROM users u), "
                "(SELECT md5(string_agg(d::text, '|' ORDER BY block)) FROM directory d), "
                "(SELECT string_agg(s::text, '|') FROM shard_state s), (SELECT count(*) FROM deleted_users)",
            )
            for shard in range(self.shard_count)
        ]

    def roll_back_prepared(self) -> list[str]:
        """Roll back every prepared transaction of the shards. Returns their gids."""
        left: list[str] = []
        for shard in range(self.shard_count):
            for gid in self.prepared(shard):
                left.append(gid)
                with _engine(self.dsn(shard)).connect() as connection:
                    connection.exec_driver_sql("ROLLBACK PREPARED %s", (gid,))
        return left

    def add_users(self, user_ids: Sequence[int]) -> None:
        """Add users to an installation without users, in the order of their ids, without any event."""
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
        """Users whose bit of this segment is set; overrides are not considered."""
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


def _as_services(dsn: str) -> str:
    return sa.make_url(dsn).set(username=SERVICES).render_as_string(hide_password=False)


def _allow_services(server: DatabaseServer, names: Sequence[str], settings: Settings) -> None:
    """Give the services' login its rights in these databases."""
    roles = roles_of(settings)
    for name in names:
        engine = _engine(server.dsn(name)).execution_options(isolation_level="READ COMMITTED")
        with engine.begin() as connection:
            assert grant(connection, name, roles) is None
            connection.exec_driver_sql(
                f"DO $$ BEGIN CREATE ROLE {SERVICES} LOGIN; EXCEPTION WHEN duplicate_object THEN END $$;"
                f"GRANT {roles.change} TO {SERVICES}"
            )


@contextmanager
def new_installation(server: DatabaseServer, *, shards: int = 4, **overrides: object) -> Iterator[Installation]:
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
        catalog_dsn=_as_services(server.dsn(names[0])),
        shard_dsns=tuple(_as_services(server.dsn(name)) for name in names[1:]),
        **overrides,  # type: ignore[arg-type]
    )
    _found(server, names, settings.cluster)
    _allow_services(server, names, settings)

    installation = Installation(settings, server)
    left: list[str] = []
    try:
        yield installation
    finally:
        left = installation.roll_back_prepared()
    assert not left, f"left prepared: {left}"
