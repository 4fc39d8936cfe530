"""The sum of the migrations is the declared schema, and a DSN that points to a wrong database is refused."""

from __future__ import annotations

from concurrent.futures import ProcessPoolExecutor, ThreadPoolExecutor
from itertools import count
from multiprocessing import get_context
from typing import Any

import pytest
import sqlalchemy as sa
from alembic.autogenerate import compare_metadata
from alembic.migration import MigrationContext

from segsvc.config import Settings
from segsvc.local.postgres import PostgresServer
from segsvc.postgres import engine, tables
from segsvc.postgres.installation import identity
from segsvc.postgres.installation.demands import Nature, unmet
from segsvc.postgres.installation.identity import Kind, StartupError
from segsvc.postgres.installation.migrate import Migrated, MigrationError, head, inspect, migrate, verify
from segsvc.postgres.locks import MIGRATION_LOCK

_numbers = count()

CATALOGUE_QUERIES = {
    "tables": """
        SELECT relname, relpersistence, reloptions, obj_description(oid, 'pg_class') FROM pg_class
        WHERE relnamespace = 'public'::regnamespace AND relkind = 'r' AND relname <> 'alembic_version'""",
    "columns": """
        SELECT c.relname, a.attname, format_type(a.atttypid, a.atttypmod), a.attnotnull, a.attidentity, a.attstorage,
               pg_get_expr(d.adbin, d.adrelid), col_description(c.oid, a.attnum)
        FROM pg_attribute a JOIN pg_class c ON c.oid = a.attrelid
        LEFT JOIN pg_attrdef d ON d.adrelid = c.oid AND d.adnum = a.attnum
        WHERE c.relnamespace = 'public'::regnamespace AND c.relkind = 'r' AND c.relname <> 'alembic_version'
          AND a.attnum > 0 AND NOT a.attisdropped""",
    "constraints": """
        SELECT conrelid::regclass::text, conname, pg_get_constraintdef(oid) FROM pg_constraint
        WHERE connamespace = 'public'::regnamespace AND conrelid::regclass::text <> 'alembic_version'""",
    "indexes": """
        SELECT tablename, indexname, indexdef FROM pg_indexes
        WHERE schemaname = 'public' AND tablename <> 'alembic_version'""",
    "sequences": """
        SELECT sequencename, data_type::text, start_value, increment_by, max_value, cycle FROM pg_sequences
        WHERE schemaname = 'public'""",
    "triggers": "SELECT tgrelid::regclass::text, pg_get_triggerdef(oid) FROM pg_trigger WHERE NOT tgisinternal",
    "functions": """
        SELECT pg_get_functiondef(oid) FROM pg_proc WHERE pronamespace = 'public'::regnamespace AND prokind = 'f'""",
}
"""Queries of PostgreSQL's own catalogs, because Alembic's comparison does not see predicates of indexes, check
constraints, comments, UNLOGGED, sequences, triggers and functions."""


@pytest.fixture
def settings(pg_server: PostgresServer) -> Settings:
    """Settings of a new installation of three shards on empty databases."""
    return new_settings(pg_server)


def new_settings(pg_server: PostgresServer, **overrides: Any) -> Settings:
    number = next(_numbers)
    names = [f"migrate_{number}_{kind}" for kind in ("catalog", "0", "1", "2")]
    for name in names:
        pg_server.create_database(name)

    given: dict[str, Any] = {
        "cluster": "test",
        "catalog_dsn": pg_server.dsn(names[0]),
        "shard_dsns": tuple(pg_server.dsn(name) for name in names[1:]),
    }

    return Settings(_env_file=None, **given | overrides)  # type: ignore[call-arg]


def changed(settings: Settings, **changes: Any) -> Settings:
    return settings.model_copy(update=changes)


def rows(dsn: str, query: str) -> list[Any]:
    engine = sa.create_engine(dsn, poolclass=sa.NullPool)
    with engine.connect() as connection:
        return sorted(map(repr, connection.execute(sa.text(query)).all()))


def execute(dsn: str, statement: str) -> None:
    engine = sa.create_engine(dsn, poolclass=sa.NullPool)
    with engine.begin() as connection:
        connection.execute(sa.text(statement))


def is_empty(dsn: str) -> bool:
    return not rows(dsn, "SELECT 1 FROM pg_tables WHERE schemaname = 'public'")


# -- the schema -----------------------------------------------------------------------------------------------------


@pytest.mark.parametrize(("kind", "metadata"), [("catalog", tables.catalog), ("shard", tables.shard)])
def test_the_migrations_make_the_declared_schema(
    pg_server: PostgresServer, settings: Settings, kind: Kind, metadata: sa.MetaData
) -> None:
    migrate(settings)
    migrated = settings.catalog_dsn if kind == "catalog" else settings.shard_dsns[0]
    pg_server.create_database(f"declared_{kind}")
    declared = pg_server.dsn(f"declared_{kind}")
    metadata.create_all(sa.create_engine(declared, poolclass=sa.NullPool))

    for name, query in CATALOGUE_QUERIES.items():
        assert rows(migrated, query) == rows(declared, query), name
    with sa.create_engine(migrated, poolclass=sa.NullPool).connect() as connection:
        options = {"compare_type": True, "compare_server_default": True}
        assert compare_metadata(MigrationContext.configure(connection, opts=options), metadata) == []


def test_the_comparison_sees_each_kind_of_difference(settings: Settings) -> None:
    migrate(settings)
    before = {name: rows(settings.catalog_dsn, query) for name, query in CATALOGUE_QUERIES.items()}

    execute(settings.catalog_dsn, "ALTER TABLE progress SET LOGGED")
    execute(settings.catalog_dsn, "COMMENT ON COLUMN segments.state IS NULL")
    execute(settings.catalog_dsn, "ALTER TABLE operations DROP CONSTRAINT ck_operations_state")
    execute(settings.catalog_dsn, "DROP INDEX uq_operations_in_flight")
    execute(settings.catalog_dsn, "ALTER SEQUENCE commit_seq INCREMENT 2")
    function = "CREATE FUNCTION nothing() RETURNS trigger LANGUAGE plpgsql AS 'BEGIN RETURN NULL; END'"
    execute(settings.catalog_dsn, function)
    execute(settings.catalog_dsn, "CREATE TRIGGER t AFTER DELETE ON audit EXECUTE FUNCTION nothing()")

    for name, query in CATALOGUE_QUERIES.items():
        assert rows(settings.catalog_dsn, query) != before[name], name


# -- founding -------------------------------------------------------------------------------------------------------


def test_migrating_founds_an_installation_once(settings: Settings) -> None:
    steps: list[Migrated] = []

    migrate(settings, steps.append)

    assert [(step.where, step.before, step.number, step.total) for step in steps] == [
        ("the catalog", None, 1, 4),
        ("shard 0", None, 2, 4),
        ("shard 1", None, 3, 4),
        ("shard 2", None, 4, 4),
    ]
    assert rows(settings.catalog_dsn, "SELECT cluster, shard_count FROM installation") == ["('test', 3)"]
    for shard, dsn in enumerate(settings.shard_dsns):
        found = rows(dsn, "SELECT one, cluster, shard, shard_count, next_slot, user_count FROM shard_state")
        assert found == [f"(True, 'test', {shard}, 3, 0, 0)"]

    execute(settings.shard_dsns[1], "UPDATE shard_state SET next_slot = 7")

    again = migrate(settings)

    assert [step.before for step in again] == [head("catalog"), head("shard"), head("shard"), head("shard")]
    assert rows(settings.shard_dsns[1], "SELECT next_slot FROM shard_state") == ["(7,)"]
    assert verify(settings) == []


def test_two_migrators_at_once_are_safe(settings: Settings) -> None:
    with ProcessPoolExecutor(3, mp_context=get_context("spawn")) as pool:
        for future in [pool.submit(migrate, settings) for _ in range(3)]:
            future.result()
    assert verify(settings) == []


def test_a_migrator_waits_for_another(settings: Settings) -> None:
    engine = sa.create_engine(settings.catalog_dsn, poolclass=sa.NullPool)

    with ThreadPoolExecutor(1) as pool, engine.begin() as other:
        other.execute(sa.select(sa.func.pg_advisory_xact_lock(MIGRATION_LOCK)))
        waiting = pool.submit(migrate, settings)

        waiters = sa.text("SELECT count(*) FROM pg_locks WHERE locktype = 'advisory' AND NOT granted")
        while other.execute(waiters).scalar_one() == 0:
            assert not waiting.done(), waiting.exception()

        assert is_empty(settings.catalog_dsn)

        other.rollback()
        waiting.result()

    assert verify(settings) == []


def test_a_migration_does_not_queue_behind_a_table_in_use(settings: Settings) -> None:
    migrate(settings)

    # A stand-in for a migration of a table in use: the same code path, with the newest revision taken back.
    execute(settings.shard_dsns[1], f"DROP TABLE {', '.join(tables.shard.tables)}; DELETE FROM alembic_version")
    execute(settings.catalog_dsn, "UPDATE installation SET founded = NULL")

    engine = sa.create_engine(settings.shard_dsns[1], poolclass=sa.NullPool)
    with engine.begin() as user:
        user.execute(sa.text("LOCK TABLE alembic_version IN ROW EXCLUSIVE MODE"))
        user.execute(sa.text("LOCK TABLE alembic_version IN SHARE MODE"))
        with pytest.raises(MigrationError) as caught:
            migrate(settings)

    assert str(caught.value) == (
        "shard 1: another migrator or its traffic holds it locked; nothing was changed there; run it again"
    )

    migrate(settings)
    assert verify(settings) == []


def test_a_shard_of_the_release_before_epochs_goes_on_while_its_processes_still_run(settings: Settings) -> None:
    migrate(settings)
    shard = settings.shard_dsns[0]
    back_to_s0001 = (
        "DROP TABLE changed_slots, shard_epoch; ALTER TABLE applied_operations DROP COLUMN epoch; "
        "DROP FUNCTION note_changed_slots CASCADE; ALTER TABLE overrides DROP COLUMN creator; "
        "UPDATE alembic_version SET version_num = 's0001'"
    )
    execute(shard, back_to_s0001)
    add_fence = "INSERT INTO applied_operations (operation_id, kind) VALUES (gen_random_uuid(), 1)"
    execute(shard, add_fence)
    execute(shard, "INSERT INTO users (id, slot, attributes, version) VALUES (3, 0, '{}', 0), (6, 1, '{}', 0)")

    steps = migrate(settings)

    assert [step.before for step in steps[1:]] == ["s0001", head("shard"), head("shard")]

    # What processes of the release before do: they know neither epochs nor notes.
    execute(shard, add_fence)
    execute(shard, "UPDATE users SET row_version = row_version + 1 WHERE id = 6")
    execute(shard, "DELETE FROM users WHERE id = 3")
    execute(shard, "UPDATE users SET row_version = row_version + 1 WHERE id = 99")

    assert rows(shard, "SELECT epoch FROM applied_operations") == ["(None,)", "(None,)"]
    assert rows(shard, "SELECT epoch, encode(slots, 'hex') FROM changed_slots") == [
        "(0, '00000000')",
        "(0, '00000001')",
    ]
    assert inspect(settings) == []


# -- refusals -------------------------------------------------------------------------------------------------------


def refusal(settings: Settings) -> str:
    """Return why migrate refuses. Verify must report the same findings."""
    with pytest.raises(MigrationError) as refused:
        migrate(settings)
    with pytest.raises(StartupError) as not_started:
        verify(settings)
    assert set(refused.value.findings) <= set(not_started.value.findings)
    return str(refused.value)


def test_shards_in_the_wrong_order_are_refused(settings: Settings) -> None:
    migrate(settings)
    first, second, third = settings.shard_dsns
    assert refusal(changed(settings, shard_dsns=(second, first, third))).splitlines() == [
        "shard 0: its DSN points to shard 1 of cluster 'test' with 3 shards; correct SEGSVC_SHARD_DSNS",
        "shard 1: its DSN points to shard 0 of cluster 'test' with 3 shards; correct SEGSVC_SHARD_DSNS",
    ]


def test_another_clusters_databases_are_refused(pg_server: PostgresServer, settings: Settings) -> None:
    other = new_settings(pg_server, cluster="other")
    migrate(settings)
    migrate(other)

    mixed = changed(settings, shard_dsns=(*settings.shard_dsns[:2], other.shard_dsns[2]))
    assert refusal(mixed) == (
        "shard 2: its DSN points to shard 2 of cluster 'other' with 3 shards, and this is cluster 'test'; "
        "correct SEGSVC_SHARD_DSNS or SEGSVC_CLUSTER"
    )

    assert refusal(changed(settings, catalog_dsn=other.catalog_dsn)) == (
        "the catalog: its DSN points to the catalog of cluster 'other' with 3 shards, and this is cluster 'test'; "
        "correct SEGSVC_CATALOG_DSN or SEGSVC_CLUSTER"
    )


def test_a_shard_of_another_installation_of_the_same_name_is_refused(
    pg_server: PostgresServer, settings: Settings
) -> None:
    other = new_settings(pg_server)
    migrate(settings)
    migrate(other)

    [mine] = rows(settings.catalog_dsn, "SELECT CAST(id AS text) FROM installation")
    [theirs] = rows(other.shard_dsns[1], "SELECT CAST(installation AS text) FROM shard_state")

    first, _, third = settings.shard_dsns
    assert refusal(changed(settings, shard_dsns=(first, other.shard_dsns[1], third))) == (
        "shard 1: its DSN points to shard 1 of cluster 'test' with 3 shards, but of another installation of that name "
        f"({theirs[2:-3]}, and the catalog is of {mine[2:-3]}); correct SEGSVC_SHARD_DSNS or SEGSVC_CATALOG_DSN"
    )

    assert mine != theirs


def test_a_database_that_its_shard_has_left_is_refused(settings: Settings) -> None:
    migrate(settings)
    execute(settings.shard_dsns[1], "UPDATE shard_state SET retired_time = '2026-01-02 03:04:05+00'")
    found = refusal(settings)
    assert found.startswith("shard 1: it was moved away from the database 'migrate_")
    assert found.endswith("' at 2026-01-02T03:04:05+00:00, and here are old data; correct SEGSVC_SHARD_DSNS")


def test_a_database_closed_for_a_move_lets_processes_start_but_not_migrators(settings: Settings) -> None:
    migrate(settings)

    name = settings.shard_dsns[1].partition("/@/"[1:])[2].partition("?")[0]
    execute(settings.shard_dsns[1], f'ALTER DATABASE "{name}" SET default_transaction_read_only = on')

    [finding] = verify(settings)
    assert finding.outage
    assert str(finding) == (
        f"shard 1: the database '{name}' is closed to writes, because it is being moved; "
        "end the move with `segsvc shards settle 1 --fence` and the DSN of the other database"
    )

    with pytest.raises(MigrationError, match="is closed to writes"):
        migrate(settings)


def test_another_number_of_shards_is_refused(settings: Settings) -> None:
    migrate(settings)
    found = refusal(changed(settings, shard_dsns=settings.shard_dsns[:2])).splitlines()
    assert found[0] == (
        "the catalog: it was founded with 3 shards, and SEGSVC_SHARD_DSNS names 2; "
        "name them all, in their order; only `segsvc shards double` changes their number"
    )
    assert len(found) == 3


def test_one_database_for_two_shards_is_refused(settings: Settings) -> None:
    first, second, _ = settings.shard_dsns
    found = refusal(changed(settings, shard_dsns=(first, second, first)))
    assert found.startswith("shard 2: its DSN points to the same database as that of shard 0 ('migrate_")
    assert is_empty(first)


def test_a_catalog_for_a_shard_and_the_reverse_are_refused(settings: Settings) -> None:
    migrate(settings)
    swapped = changed(
        settings, catalog_dsn=settings.shard_dsns[0], shard_dsns=(settings.catalog_dsn, *settings.shard_dsns[1:])
    )
    assert refusal(swapped).splitlines() == [
        "the catalog: its DSN points to shard 0 of cluster 'test' with 3 shards; correct SEGSVC_CATALOG_DSN",
        "shard 0: its DSN points to the catalog of cluster 'test' with 3 shards; correct SEGSVC_SHARD_DSNS",
    ]


def test_an_empty_database_in_place_of_a_shard_is_refused(pg_server: PostgresServer, settings: Settings) -> None:
    migrate(settings)
    empty = new_settings(pg_server).shard_dsns[1]
    found = refusal(changed(settings, shard_dsns=(settings.shard_dsns[0], empty, settings.shard_dsns[2])))
    assert found.startswith("shard 1: the database 'migrate_")
    assert found.endswith(
        "is new, and the catalog says that the installation is founded; correct SEGSVC_SHARD_DSNS, or restore the data"
    )
    assert is_empty(empty)


def test_an_empty_catalog_beside_founded_shards_is_refused(pg_server: PostgresServer, settings: Settings) -> None:
    migrate(settings)
    empty = new_settings(pg_server).catalog_dsn
    found = refusal(changed(settings, catalog_dsn=empty))
    assert found.endswith(
        "is new, and shard 0 is that of a founded installation; correct SEGSVC_CATALOG_DSN, or restore the data"
    )
    assert is_empty(empty)


def test_a_database_of_something_else_is_refused(settings: Settings) -> None:
    execute(settings.shard_dsns[1], "CREATE TABLE orders (id int)")
    found = refusal(settings)
    assert found.endswith("has tables of something else (orders); give it a database of its own")
    assert is_empty(settings.catalog_dsn)


def test_a_schema_of_a_newer_release_is_refused(settings: Settings) -> None:
    migrate(settings)
    execute(settings.shard_dsns[1], "UPDATE alembic_version SET version_num = 's9999'")
    assert refusal(settings) == (
        "shard 1: its schema is at s9999, which this release does not know; "
        "use the release that made it, or a newer one"
    )


def test_a_crash_before_the_last_step_is_mended_by_running_it_again(settings: Settings) -> None:
    migrate(settings)
    execute(settings.catalog_dsn, "UPDATE installation SET founded = NULL")

    with pytest.raises(StartupError) as caught:
        verify(settings)
    assert str(caught.value) == "the catalog: it was never set up; run `segsvc migrate`"

    migrate(settings)
    assert verify(settings) == []


# -- starting -------------------------------------------------------------------------------------------------------


def test_a_process_does_not_start_on_an_old_schema(settings: Settings) -> None:
    with pytest.raises(StartupError) as caught:
        verify(settings)
    assert str(caught.value).splitlines()[0] == "the catalog: it was never set up; run `segsvc migrate`"


def test_a_process_starts_while_a_shard_is_out_of_reach(settings: Settings) -> None:
    migrate(settings)

    gone = settings.shard_dsns[1].replace("host=", "host=/nowhere")
    away = changed(settings, shard_dsns=(settings.shard_dsns[0], gone, settings.shard_dsns[2]))

    [finding] = verify(away)
    assert finding.outage
    assert finding.where == "shard 1"
    assert finding.problem.startswith("cannot be reached (")

    with pytest.raises(MigrationError, match="shard 1: cannot be reached"):
        migrate(away)


def test_too_few_prepared_transactions_are_found(settings: Settings) -> None:
    migrate(settings)
    many = changed(settings, shard_dsns=settings.shard_dsns * 11)  # 33 shards need 70, the server has 64
    assert any(
        "max_prepared_transactions is 64, and 70 is the least for its shards" in finding.problem
        for finding in inspect(many)
    )


# -- what our SQL relies on -----------------------------------------------------------------------------------------


@pytest.mark.parametrize("encoding", ["SQL_ASCII", "LATIN1"])
@pytest.mark.parametrize("kind", ["the catalog", "shard 1"])
def test_a_database_that_is_not_utf8_is_refused_with_the_mend(
    pg_server: PostgresServer, settings: Settings, encoding: str, kind: str
) -> None:
    name = f"encoded_{next(_numbers)}"
    pg_server.psql(f"CREATE DATABASE {name} TEMPLATE template0 ENCODING '{encoding}' LOCALE_PROVIDER libc LOCALE 'C'")

    dsns = list(settings.shard_dsns)
    dsns[1] = pg_server.dsn(name)
    wrong = {"catalog_dsn": pg_server.dsn(name)} if kind == "the catalog" else {"shard_dsns": tuple(dsns)}

    with pytest.raises(MigrationError) as refused:
        migrate(changed(settings, **wrong))

    text = str(refused.value)
    assert text.startswith(f"{kind}: the encoding of the database '{name}' is {encoding}, and must be UTF8"), text
    assert "TEMPLATE template0 ENCODING 'UTF8'" in text
    assert is_empty(settings.catalog_dsn), "nothing was changed anywhere"
    assert is_empty(pg_server.dsn(name))


def test_an_installation_that_was_founded_on_another_encoding_does_not_start(
    pg_server: PostgresServer, settings: Settings, monkeypatch: pytest.MonkeyPatch
) -> None:
    """It was founded by a release that did not check the encoding."""
    name = f"encoded_{next(_numbers)}"
    pg_server.psql(f"CREATE DATABASE {name} TEMPLATE template0 ENCODING 'LATIN1' LOCALE_PROVIDER libc LOCALE 'C'")
    given = changed(settings, shard_dsns=(*settings.shard_dsns[:2], pg_server.dsn(name)))

    with monkeypatch.context() as before:
        before.setattr(identity, "unfit", lambda _: iter(()))
        migrate(given)
        verify(given)

    with pytest.raises(StartupError, match=f"shard 2: the encoding of the database '{name}' is LATIN1"):
        verify(given)
    assert [finding.where for finding in inspect(given)] == ["shard 2"], "doctor says it, too"


def test_a_session_overrules_what_the_database_is_set_to(settings: Settings) -> None:
    migrate(settings)
    shard = settings.shard_dsns[0]
    name = sa.make_url(shard).database

    for setting in (
        "client_encoding = 'LATIN1'",
        "standard_conforming_strings = off",
        "TimeZone = 'Pacific/Kiritimati'",
        "transform_null_equals = on",
        "default_transaction_isolation = 'serializable'",
    ):
        execute(shard, f"ALTER DATABASE {name} SET {setting}")

    assert inspect(settings) == []
    with identity.open_databases(settings) as databases, databases[1].engine.connect() as connection:
        assert connection.execute(sa.text(r"SELECT 'ж\', 'x'")).one() == ("ж\\", "x")
        assert connection.execute(sa.text("SELECT show FROM current_setting('TimeZone') AS show")).scalar_one() == "UTC"


@pytest.mark.parametrize(
    ("setting", "problem"),
    [
        ("synchronous_commit = off", "synchronous_commit is 'off'"),
        ("session_replication_role = replica", "session_replication_role is 'replica'"),
    ],
)
def test_a_setting_that_breaks_a_promise_is_refused(settings: Settings, setting: str, problem: str) -> None:
    migrate(settings)

    name = sa.make_url(settings.catalog_dsn).database
    execute(settings.catalog_dsn, f"ALTER DATABASE {name} SET {setting}")

    with pytest.raises(StartupError, match=f"the catalog: {problem}") as refused:
        verify(settings)
    assert f"ALTER DATABASE {name} RESET" in str(refused.value)
    with pytest.raises(MigrationError, match=problem):
        migrate(settings)


def test_what_a_pooler_drops_is_noticed(settings: Settings, monkeypatch: pytest.MonkeyPatch) -> None:
    migrate(settings)
    name = sa.make_url(settings.shard_dsns[2]).database
    execute(settings.shard_dsns[2], f"ALTER DATABASE {name} SET standard_conforming_strings = off")
    monkeypatch.setattr(engine, "SESSION_SETTINGS", {})
    with pytest.raises(StartupError, match="standard_conforming_strings is 'off' in our sessions") as refused:
        verify(settings)
    assert "pooler" in str(refused.value)


def test_an_old_server_is_refused() -> None:
    problem, remedy = next(unmet("any", Nature("UTF8", 14, {})))
    assert "PostgreSQL 14, and 15 is the oldest" in problem
    assert "15 or later" in remedy
