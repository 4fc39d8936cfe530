"""Roles in the databases: the migrating login owns the tables, the services' login changes rows, an analyst's reads."""

from __future__ import annotations

import re
from collections.abc import Iterator
from contextlib import contextmanager
from dataclasses import dataclass

import pytest
import sqlalchemy as sa

from segsvc.config import Settings
from segsvc.local.postgres import PostgresServer
from segsvc.postgres.installation.migrate import MigrationError, migrate, verify
from segsvc.postgres.installation.roles import roles_of

LOGINS = ("roles_owner", "roles_services", "roles_analyst", "roles_stranger")
DATABASES = ("roles_catalog", "roles_shard")


@dataclass(frozen=True)
class Server:
    server: PostgresServer

    def settings(self, login: str) -> Settings:
        def dsn(database: str) -> str:
            return self.server.dsn(database).replace("postgres@", f"{login}@")

        catalog, *shards = DATABASES
        return Settings(
            _env_file=None, cluster="of-roles", catalog_dsn=dsn(catalog), shard_dsns=tuple(map(dsn, shards))
        )

    @contextmanager
    def connected(self, login: str, database: str) -> Iterator[sa.Connection]:
        settings = self.settings(login)
        dsn = settings.catalog_dsn if database == DATABASES[0] else settings.shard_dsns[0]
        engine = sa.create_engine(dsn, poolclass=sa.NullPool, isolation_level="AUTOCOMMIT")
        with engine.connect() as connection:
            yield connection


@pytest.fixture(scope="module")
def server(pg_server: PostgresServer) -> Iterator[Server]:
    made = Server(pg_server)
    roles = roles_of(made.settings("postgres"))
    for login in LOGINS:
        pg_server.psql(f"CREATE ROLE {login} LOGIN")
    for database in DATABASES:
        pg_server.psql(f"CREATE DATABASE {database} OWNER roles_owner")
    try:
        # The owner may make no roles: it says so and changes nothing.
        owner = made.settings("roles_owner")
        with pytest.raises(MigrationError, match=f"CREATE ROLE {roles.change} NOLOGIN"):
            migrate(owner, roles=True)
        with made.connected("postgres", DATABASES[0]) as connection:
            assert sa.inspect(connection).get_table_names() == []

        for role in (roles.change, roles.read):
            pg_server.psql(f"CREATE ROLE {role} NOLOGIN")
        migrate(owner, roles=True)
        pg_server.psql(f"GRANT {roles.change} TO roles_services; GRANT {roles.read} TO roles_analyst")
        yield made
    finally:
        for database in DATABASES:
            pg_server.psql(f"DROP DATABASE {database} WITH (FORCE)")
        for login in (*LOGINS, roles.change, roles.read):
            pg_server.psql(f"DROP ROLE IF EXISTS {login}")


def refused(connection: sa.Connection, statement: str) -> bool:
    try:
        connection.exec_driver_sql(statement)
    except sa.exc.ProgrammingError as error:
        return re.search("permission denied|must be owner", str(error)) is not None
    return False


@pytest.mark.parametrize("database", DATABASES)
def test_each_role_may_do_its_work_and_nothing_else(server: Server, database: str) -> None:
    with server.connected("postgres", database) as connection:
        tables = set(sa.inspect(connection).get_table_names())
    own = tables & {"alembic_version", "installation"}
    assert own
    assert len(tables) > 5

    with server.connected("roles_services", database) as connection:
        for table in tables:
            connection.exec_driver_sql(f"SELECT FROM {table}")
            change = f"DELETE FROM {table} WHERE false"
            assert refused(connection, change) == (table in own), table
            for statement in (f"DROP TABLE {table}", f"TRUNCATE {table}", f"ALTER TABLE {table} ADD x int"):
                assert refused(connection, statement), statement
        assert refused(connection, "CREATE TABLE t ()")
        assert refused(connection, "CREATE ROLE t")

    with server.connected("roles_analyst", database) as connection:
        for table in tables:
            connection.exec_driver_sql(f"SELECT FROM {table}")
            assert refused(connection, f"DELETE FROM {table} WHERE false"), table

    with server.connected("roles_stranger", database) as connection:
        for table in tables:
            assert refused(connection, f"SELECT FROM {table}"), table


def test_the_services_start_and_the_migrator_can_be_run_again(server: Server) -> None:
    for login in ("roles_services", "roles_analyst"):
        assert verify(server.settings(login)) == []
    assert all(step.before == step.after for step in migrate(server.settings("roles_owner"), roles=True))


def test_tables_of_later_migrations_have_the_same_rights(server: Server) -> None:
    with server.connected("roles_owner", DATABASES[1]) as connection:
        connection.exec_driver_sql("CREATE TABLE later (id bigserial)")
    with server.connected("roles_services", DATABASES[1]) as connection:
        connection.exec_driver_sql("INSERT INTO later DEFAULT VALUES")
        assert refused(connection, "DROP TABLE later")
    with server.connected("roles_analyst", DATABASES[1]) as connection:
        assert connection.exec_driver_sql("SELECT count(*) FROM later").scalar_one() == 1
        assert refused(connection, "INSERT INTO later DEFAULT VALUES")
    with server.connected("roles_owner", DATABASES[1]) as connection:
        connection.exec_driver_sql("DROP TABLE later")
