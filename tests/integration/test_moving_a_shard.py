"""A shard moves to another PostgreSQL server while users are read, and no read gives a false answer."""

from __future__ import annotations

from collections.abc import Iterator
from concurrent.futures import ThreadPoolExecutor
from contextlib import ExitStack
from pathlib import Path

import grpc
import pytest
import sqlalchemy as sa

from segsvc.bootstrap import Check, settle_shard
from segsvc.domain.bucketing import bucket
from segsvc.domain.errors import Reason, ServiceError
from segsvc.domain.events import CreateUser, DeleteUser
from segsvc.local.postgres import PostgresServer
from segsvc.local.redis import RedisServer
from segsvc.postgres import tables
from segsvc.postgres.installation import moving
from segsvc.postgres.installation.migrate import StartupError, verify
from segsvc.postgres.installation.moving import MoveRefused
from segsvc.postgres.installation.roles import roles_of
from segsvc.postgres.locks import SHARD_LOCK
from tests.contract.conftest import running_front
from tests.eventually import eventually
from tests.integration.moving_shard import (
    MOVED,
    SHARDS,
    USERS,
    Moving,
    Readers,
    Segments,
    apply,
    command,
    new_database,
    roll_out,
    segments_of,
)


@pytest.fixture(scope="module")
def second_server(servers_folder: Path) -> Iterator[PostgresServer]:
    server = PostgresServer(servers_folder / "pg2", mark=servers_folder, fast=True)
    server.start()
    try:
        yield server
    finally:
        server.purge()


@pytest.fixture
def installation(
    request: pytest.FixtureRequest,
    pg_server: PostgresServer,
    second_server: PostgresServer,
    cache_server: RedisServer,
) -> Iterator[Moving]:
    name = f"moving-{request.node.name.removeprefix('test_').replace('_', '-')[:20].strip('-')}"

    made = Moving(name, pg_server, cache_server)
    try:
        yield made
    finally:
        left = [server.psql("SELECT gid FROM pg_prepared_xacts") for server in (pg_server, second_server)]
        assert left == ["", ""]


def test_a_shard_moves_while_users_are_read(
    installation: Moving, second_server: PostgresServer, tmp_path: Path
) -> None:
    old_dsn, new_dsn = installation.dsns[MOVED], new_database(second_server, "moved")
    with installation.ingestion() as ingestion:
        apply(ingestion, [CreateUser(user_id, "{}") for user_id in USERS])

    for folder in ("old", "new"):
        (tmp_path / folder).mkdir()

    with ExitStack() as stack:
        old_front = stack.enter_context(running_front("native", installation, tmp_path / "old"))
        eventually(old_front.serving)
        old_front.create("moving")
        roll_out(old_front, "moving", 10)
        salt = installation.salt_of("moving")
        percents = [10]

        def truth(user_id: int) -> set[Segments]:
            found = {bucket(user_id, salt) < percent * 1000 for percent in percents}
            return {frozenset({"moving"}) if member else frozenset() for member in found}

        readers = Readers(installation, old_front, truth)
        stack.callback(readers.stop)
        readers.await_reads()

        copied = command(installation, "shards", "copy", str(MOVED), "--to", new_dsn, "--json")
        assert copied.returncode == 0, copied.stderr
        readers.await_reads()

        # The fronts change to the new database one after the other. Both give the same answers, and writes wait.
        installation.dsns[MOVED] = new_dsn
        new_front = stack.enter_context(running_front("native", installation, tmp_path / "new"))
        stack.callback(readers.stop)
        eventually(new_front.serving)
        readers.fronts = [old_front, new_front]
        readers.await_reads()
        for dsn in (old_dsn, new_dsn):
            installation.dsns[MOVED] = dsn
            with installation.ingestion() as ingestion, pytest.raises(ServiceError) as refused:
                ingestion.apply_batch(MOVED, [CreateUser(7000, "{}")])
            assert refused.value.reason is Reason.SHARD_UNAVAILABLE
        readers.fronts = [new_front]
        readers.await_reads()
        assert readers.failures == []

        # The move is settled: the old database is closed, and the shard takes events again.
        settled = command(installation, "shards", "settle", str(MOVED), "--fence", old_dsn, "--json")
        assert settled.returncode == 0, settled.stderr
        fresh, gone = 6001 + (MOVED - 6001) % SHARDS, 5010 + (MOVED - 5010) % SHARDS
        segments_of(new_front, gone)  # now it is in the cache
        with installation.ingestion() as ingestion:
            apply(ingestion, [CreateUser(fresh, "{}"), DeleteUser(gone)])
        assert segments_of(new_front, fresh) in truth(fresh)
        # The front on the old database still has the cache and the other shards; it returns no old data of this shard.
        for front, code in ((new_front, grpc.StatusCode.NOT_FOUND), (old_front, grpc.StatusCode.UNAVAILABLE)):
            with pytest.raises(grpc.RpcError) as unread:
                segments_of(front, gone)
            assert unread.value.code() is code

        # A rollout takes effect on all shards or none, over two servers.
        percents.append(30)
        roll_out(new_front, "moving", 30)
        percents.remove(10)
        for user_id in range(1, 200):
            assert segments_of(new_front, user_id) in truth(user_id)
        # By now the moved shard's users among these are all in the cache, for every front.
        for user_id in range(1, 200):
            assert segments_of(old_front, user_id) in truth(user_id)
        readers.await_reads()

    assert readers.wrong == []
    # Reads failed only while sessions were ended to let writes in again, and only on the moved shard.
    assert {shard for shard, _ in readers.failures} <= {MOVED}
    assert {reason.partition(":")[0] for _, reason in readers.failures} <= {"UNAVAILABLE shard 1 cannot be reached"}
    assert verify(installation.settings) == []

    check = Check(installation.settings)
    try:
        report = check.checker.run(lambda *_: None)
    finally:
        check.close()
    assert report.differences == []
    assert report.users == len(USERS)
    assert_left_for_good(installation, old_dsn)


def assert_left_for_good(installation: Moving, old_dsn: str) -> None:
    """No session can open the old database; and if a person opens it again, no process starts on it."""
    database = old_dsn.partition("?")[0].rpartition("/")[2]
    shut = installation.server.psql("SELECT datallowconn FROM pg_database WHERE datname = :'name'", name=database)
    assert shut.strip() == "f"

    installation.server.psql(f'ALTER DATABASE "{database}" ALLOW_CONNECTIONS true')

    stale = installation.settings.model_copy(
        update={"shard_dsns": (installation.dsns[0], old_dsn, installation.dsns[2])}
    )

    with pytest.raises(StartupError, match=r"shard 1: it was moved away .* and here are old data"):
        verify(stale)


def test_the_copy_has_everything(installation: Moving, second_server: PostgresServer) -> None:
    with installation.ingestion() as ingestion:
        apply(ingestion, [CreateUser(user_id, '{"plan": "ü"}') for user_id in range(1, 4000)])
        apply(ingestion, [DeleteUser(user_id) for user_id in range(1, 40)])

    installation.execute(MOVED, "INSERT INTO overrides (user_id, segment_id, effect) VALUES (1000, 1, 1)")
    installation.execute(MOVED, "INSERT INTO segments (id, slug, salt) VALUES (1, 'one', -5)")
    installation.execute(MOVED, "INSERT INTO applied_operations (operation_id, kind) VALUES (gen_random_uuid(), 1)")
    installation.execute(MOVED, "INSERT INTO shard_epoch (epoch) VALUES (7)")
    installation.execute(
        MOVED, "INSERT INTO memberships (block, segment_id, bits) VALUES (0, 1, decode(repeat('01ff', 64), 'hex'))"
    )
    installation.execute(
        MOVED,
        "INSERT INTO user_requests (user_id, request_id, content_hash, answer) "
        "VALUES (1000, gen_random_uuid(), '\\x00ff', '[null]')",
    )

    roles = roles_of(installation.settings)
    for role in (roles.change, roles.read):
        second_server.psql('CREATE ROLE :"role" NOLOGIN', role=role)

    new_dsn = new_database(second_server, "complete")
    told: list[tuple[int, int]] = []
    copied = moving.copy(installation.settings, MOVED, new_dsn, lambda done, total: told.append((done, total)))
    assert told == [(number, len(tables.shard.tables)) for number in range(1, len(tables.shard.tables) + 1)]

    def contents() -> list[list[str]]:
        return [
            installation.execute(
                MOVED, f"SELECT count(*), md5(string_agg(t::text, '|' ORDER BY t::text)) FROM {name} t"
            )
            for name in [*tables.shard.tables, "alembic_version"]
        ]

    before = contents()
    old_dsn, installation.dsns[MOVED] = installation.dsns[MOVED], new_dsn
    assert contents() == before
    assert [table for table, rows in zip(tables.shard.tables, before, strict=False) if rows[0].startswith("(0,")] == []
    assert copied.users == int(installation.execute(MOVED, "SELECT count(*) FROM users")[0].strip("(,)"))

    # Rights are not copied: they are given again.
    right = f"SELECT has_table_privilege('{roles.change}', 'users', 'UPDATE')"
    assert "t" in installation.execute(MOVED, right)[0].lower()

    # COPY does not copy sequences and identity columns; a schema that has one must extend the copy.
    assert tables.shard._sequences == {}
    assert not [column for table in tables.shard.tables.values() for column in table.columns if column.identity]

    assert settle_shard(installation.settings, MOVED, old_dsn)
    assert settle_shard(installation.settings, MOVED, old_dsn)  # a second call changes nothing
    assert verify(installation.settings) == []


def test_a_copy_waits_for_what_is_prepared(installation: Moving, second_server: PostgresServer) -> None:
    new_dsn = new_database(second_server, "waits")
    engine = sa.create_engine(installation.dsns[MOVED], poolclass=sa.NullPool)
    with engine.connect() as connection:
        connection.execute(sa.select(sa.func.pg_advisory_xact_lock(SHARD_LOCK)))
        connection.exec_driver_sql("INSERT INTO deleted_users (id, version) VALUES (4, 0)")
        connection.exec_driver_sql("PREPARE TRANSACTION 'segsvc:moving:prepared:1'")
        connection.rollback()

    with ThreadPoolExecutor(1) as thread:
        copying = thread.submit(moving.copy, installation.settings, MOVED, new_dsn)
        waiting = "SELECT 1 FROM pg_locks WHERE locktype = 'advisory' AND NOT granted"
        eventually(lambda: bool(installation.execute(MOVED, waiting)) or copying.done())
        assert not copying.done()
        installation.execute(MOVED, "COMMIT PREPARED 'segsvc:moving:prepared:1'")
        copying.result(timeout=30)

    old_dsn, installation.dsns[MOVED] = installation.dsns[MOVED], new_dsn
    assert installation.execute(MOVED, "SELECT id FROM deleted_users") == ["(4,)"]
    settle_shard(installation.settings, MOVED, old_dsn)


def test_somebody_elses_prepared_transaction_stops_a_move(installation: Moving, second_server: PostgresServer) -> None:
    new_dsn = new_database(second_server, "foreign")
    engine = sa.create_engine(installation.dsns[MOVED], poolclass=sa.NullPool)
    with engine.connect() as connection:
        connection.exec_driver_sql("INSERT INTO deleted_users (id, version) VALUES (4, 0)")
        connection.exec_driver_sql("PREPARE TRANSACTION 'theirs'")
        connection.rollback()

    with pytest.raises(MoveRefused, match="'theirs' is prepared there"):
        moving.copy(installation.settings, MOVED, new_dsn)

    installation.execute(MOVED, "ROLLBACK PREPARED 'theirs'")
    assert verify(installation.settings) == []


def test_a_copy_that_fails_leaves_the_shard_as_it_was(
    installation: Moving, second_server: PostgresServer, monkeypatch: pytest.MonkeyPatch
) -> None:
    new_dsn = new_database(second_server, "fails")
    copy_table = moving.copy_table

    def fail_at_users(source: sa.Connection, target: sa.Connection, table: sa.Table) -> None:
        copy_table(source, target, table)
        if table is tables.users:
            second_server.psql("SELECT pg_terminate_backend(pid) FROM pg_stat_activity WHERE datname = 'fails'")

    monkeypatch.setattr(moving, "copy_table", fail_at_users)

    with pytest.raises(ServiceError):
        moving.copy(installation.settings, MOVED, new_dsn)

    monkeypatch.undo()
    assert verify(installation.settings) == []
    with installation.ingestion() as ingestion:
        apply(ingestion, [CreateUser(1, "{}")])
    moving.copy(installation.settings, MOVED, new_dsn)  # the failed copy left nothing there


def test_a_move_can_be_broken_off(installation: Moving, second_server: PostgresServer) -> None:
    new_dsn = new_database(second_server, "broken_off")
    moving.copy(installation.settings, MOVED, new_dsn)

    with pytest.raises(MoveRefused, match="a move was begun"):
        moving.copy(installation.settings, MOVED, new_database(second_server, "broken_off_2"))

    settle_shard(installation.settings, MOVED, new_dsn)
    with installation.ingestion() as ingestion:
        apply(ingestion, [CreateUser(1, "{}")])

    installation.dsns[MOVED] = new_dsn
    [finding] = verify(installation.settings)
    assert finding.outage
    assert "not currently accepting connections" in finding.problem


def test_after_a_copy_that_was_killed_the_shard_is_opened_again(
    installation: Moving, second_server: PostgresServer
) -> None:
    """A kill leaves the shard closed and the new database empty: its transaction was never committed."""
    new_dsn = new_database(second_server, "killed")
    name = sa.make_url(installation.dsns[MOVED]).database
    installation.execute(MOVED, f'ALTER DATABASE "{name}" SET default_transaction_read_only = on')

    [finding] = verify(installation.settings)
    assert f"segsvc shards settle {MOVED} --fence" in finding.remedy

    assert not settle_shard(installation.settings, MOVED, new_dsn)  # it is empty, so it is not closed
    assert verify(installation.settings) == []
    moving.copy(installation.settings, MOVED, new_dsn)


def test_settling_refuses_a_database_that_is_not_the_other_half(
    installation: Moving, second_server: PostgresServer
) -> None:
    old_dsn, new_dsn = installation.dsns[MOVED], new_database(second_server, "half")
    settings = installation.settings

    with pytest.raises(MoveRefused, match="it is the one that SEGSVC_SHARD_DSNS names"):
        settle_shard(settings, MOVED, old_dsn)
    with pytest.raises(MoveRefused, match="it is shard 0 of cluster"):
        settle_shard(settings, MOVED, installation.dsns[0])
    with pytest.raises(MoveRefused, match="there is no 'nowhere' on that server"):
        settle_shard(settings, MOVED, second_server.dsn("nowhere"))

    moving.copy(settings, MOVED, new_dsn)

    # The old database was opened by hand, and took writes on its own.
    database = old_dsn.partition("?")[0].rpartition("/")[2]
    installation.server.psql(f'ALTER DATABASE "{database}" RESET default_transaction_read_only')
    with pytest.raises(MoveRefused, match="it is open to writes"):
        settle_shard(settings, MOVED, new_dsn)

    with installation.ingestion() as ingestion:
        apply(ingestion, [CreateUser(1, "{}")])
    installation.server.psql(f'ALTER DATABASE "{database}" SET default_transaction_read_only = on')
    with pytest.raises(MoveRefused, match="does not hold the same data"):
        settle_shard(settings, MOVED, new_dsn)

    assert second_server.psql("SELECT datallowconn FROM pg_database WHERE datname = 'half'").strip() == "t"


def test_a_server_that_prepares_too_little_is_refused(installation: Moving, second_server: PostgresServer) -> None:
    new_dsn = new_database(second_server, "scarce")
    second_server.psql("ALTER SYSTEM SET max_prepared_transactions = 5")
    second_server.restart()

    try:
        [found] = [second_server.psql("SHOW max_prepared_transactions").strip()]
        assert found == "5"
        with pytest.raises(MoveRefused, match="max_prepared_transactions is 5, and 6 is the least"):
            moving.copy(installation.settings, MOVED, new_dsn)
    finally:
        second_server.psql("ALTER SYSTEM RESET max_prepared_transactions")
        second_server.restart()

    assert verify(installation.settings) == []
