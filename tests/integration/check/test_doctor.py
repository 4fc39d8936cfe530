"""What ``segsvc doctor`` reports about the databases and the cache."""

from __future__ import annotations

import json
import re
import socket
import time
from collections.abc import Sequence
from uuid import UUID

import pytest
import redis
import typer

from segsvc.cache.client import CacheClient
from segsvc.cli.commands import doctor
from segsvc.cli.doctor import doubt, running, storage
from segsvc.config import Settings
from segsvc.domain.operation import Failure, Gid, OperationKind, OperationState
from segsvc.local.redis import RedisServer
from segsvc.postgres.catalog.maintenance import PostgresMaintainedCatalog
from segsvc.postgres.engine import Databases
from tests.integration.check.checking import ABSENT, ageless, finish, prepare
from tests.integration.check.world import World


def test_a_sound_installation_has_no_findings(world: World, check_settings: Settings) -> None:
    assert storage.databases(check_settings) == []
    assert doubt.in_doubt(check_settings) == []
    assert storage.cache(check_settings) == []
    assert [item.text for item in storage.shard_skew(check_settings)] == ["users a shard: 1,498, 1,499"]


@pytest.fixture(autouse=True)
def _cache_of_nobody_else(check_settings: Settings) -> None:
    """The whole session shares the server, and the doctor names every installation that has keys in it."""
    with redis.Redis.from_url(check_settings.cache_url) as raw:
        raw.flushall()


PAST = 1000.0
"""An age in seconds, long past any deadline."""


@pytest.mark.parametrize(
    ("state", "age_s", "voted", "why", "overdue"),
    [
        (
            OperationState.PREPARING,
            0,
            (1,),
            "it waits for the vote of shard 0; recovery sends what is missing again, and aborts it at ",
            False,
        ),
        (OperationState.PREPARING, 0, (0, 1), "all shards have voted for it; recovery decides it", False),
        (
            OperationState.PREPARING,
            PAST,
            (),
            "shards 0, 1 did not vote in time; a front or recovery aborts it and rolls it back",
            True,
        ),
        (
            OperationState.PREPARING,
            PAST,
            (0, 1),
            "all shards have voted, but no decision came in time; a front or recovery aborts it and rolls it back",
            True,
        ),
        (
            OperationState.COMMITTED,
            PAST,
            (0, 1),
            "it is decided, but not committed here yet; recovery commits it",
            True,
        ),
        (OperationState.ABORTED, PAST, (1,), "it was aborted (CANCELLED); recovery rolls it back", True),
        (
            OperationState.DONE,
            PAST,
            (0, 1),
            "every shard has its work, so this is a second copy; recovery rolls it back",
            True,
        ),
    ],
)
def test_a_transaction_in_doubt_is_explained(
    world: World,
    check_settings: Settings,
    monkeypatch: pytest.MonkeyPatch,
    state: OperationState,
    age_s: float,
    voted: tuple[int, ...],
    why: str,
    overdue: bool,
) -> None:
    operation = begun(world, state, age_s=age_s, voted=voted)
    gid = str(Gid("check", operation, 1))
    prepare(world, gid)

    try:
        item = doubt.in_doubt(check_settings)[0]
        said = f"shard 1: {gid} is prepared: operation {operation} (ROLL_OUT beta, {state.name}); {why}"
        assert ageless(item.text).startswith(said)
        assert item.remedy == ""

        monkeypatch.setattr(doubt, "IN_DOUBT_MAX_S", 0.0)
        item = doubt.in_doubt(check_settings)[0]
        assert bool(item.remedy) == item.text.endswith(", which is overdue") == overdue
    finally:
        finish(world, gid)


def begun(
    world: World,
    state: OperationState,
    *,
    age_s: float = 100.0,
    voted: Sequence[int] = (),
    fenced_on: Sequence[int] | None = None,
) -> UUID:
    """Write a ledger that holds only one operation, in this state. Returns the operation's id."""
    segment = world.segments[1]
    operation = world.add_operation(
        OperationKind.ROLL_OUT, segment, state, rule=segment.rule, age_s=age_s, fenced_on=fenced_on
    )
    world.write()

    for shard in voted:
        world.on_catalog(
            "INSERT INTO votes (operation_id, shard, matched, added, removed, members) "
            "VALUES (:id, :shard, 0, 0, 0, 0)",
            id=operation,
            shard=shard,
        )

    if state is OperationState.ABORTED:
        failure = Failure("OPERATION_ABORTED", "cancelled", {"why": "CANCELLED"})
        world.on_catalog(
            "UPDATE operations SET failure = CAST(:failure AS jsonb) WHERE id = :id",
            id=operation,
            failure=json.dumps(failure.to_json()),
        )

    return operation


def test_an_operation_is_explained_when_nothing_is_prepared_any_more(world: World, check_settings: Settings) -> None:
    operation = begun(world, OperationState.COMMITTED, fenced_on=[0])
    name = f"operation {operation} (ROLL_OUT beta, COMMITTED) for"

    def said() -> str:
        [item] = doubt.in_doubt(check_settings)
        assert item.remedy  # 100 s is too long
        assert item.text.startswith(name)
        return item.text

    assert (
        "it is decided, but not known to be committed on shard 1; recovery commits it there, which is overdue" in said()
    )

    world.on_shard(1, "INSERT INTO applied_operations (operation_id, kind) VALUES (:id, 2)", id=operation)
    assert "all shards have committed; recovery drops the outdated cache entries" in said()

    world.on_catalog("UPDATE operations SET shards_committed_time = now()")
    assert (
        "all shards have committed, but the cache cannot be invalidated; it is done when the cache can be reached"
        in said()
    )


def test_the_queue_is_reported(world: World, check_settings: Settings) -> None:
    operation = begun(world, OperationState.QUEUED)
    world.on_catalog("UPDATE operations SET create_time = now() - interval '100 s' WHERE id = :id", id=operation)
    [item] = doubt.in_doubt(check_settings)
    assert item.text == "1 in the queue, for up to 100 s; recovery starts the oldest, which is overdue"
    assert item.remedy


@pytest.mark.parametrize(
    ("gid", "said"),
    [
        (f"segsvc:check:{ABSENT}:1", "the ledger has no such operation on this shard"),
        (f"segsvc:other:{ABSENT}:1", "it does not belong to this installation"),
        ("backup", "it does not belong to this installation"),
    ],
)
def test_a_transaction_without_an_operation_asks_for_a_person(
    world: World, check_settings: Settings, gid: str, said: str
) -> None:
    prepare(world, gid)
    try:
        [item] = doubt.in_doubt(check_settings)
        assert ageless(item.text) == f"shard 1: {gid} is prepared; {said}"
        assert item.remedy
    finally:
        finish(world, gid)


def test_an_unreachable_server_hides_no_other_finding(world: World, check_settings: Settings) -> None:
    operation = begun(world, OperationState.PREPARING, age_s=0, voted=[1])
    gid = str(Gid("check", operation, 1))
    prepare(world, gid)
    nowhere = "postgresql+psycopg2:///x?host=/nowhere"

    try:
        shard_away = check_settings.model_copy(update={"shard_dsns": (nowhere, check_settings.shard_dsns[1])})
        silent, prepared, open_operation = doubt.in_doubt(shard_away)
        assert silent.text == "shard 0: its prepared transactions cannot be read"
        for item in (prepared, open_operation):
            assert "it waits for the vote of shard 0 (out of reach); recovery sends what is missing again" in item.text

        [item] = doubt.in_doubt(check_settings.model_copy(update={"catalog_dsn": nowhere}))
        assert "the catalog, which alone decides, cannot be read; it stays until the catalog is back" in item.text
        assert item.text.startswith(f"shard 1: {gid} is prepared for")
        assert item.remedy
    finally:
        finish(world, gid)


def test_a_database_that_is_not_a_shard_hides_nothing_else(
    world: World, check_settings: Settings, capsys: pytest.CaptureFixture[str], monkeypatch: pytest.MonkeyPatch
) -> None:
    wrong = check_settings.model_copy(update={"shard_dsns": (check_settings.catalog_dsn, check_settings.shard_dsns[1])})
    gid = str(Gid("check", ABSENT, 1))
    prepare(world, gid)

    try:
        silent, prepared = doubt.in_doubt(wrong)
        assert silent.text == "shard 0: its prepared transactions cannot be read"
        assert prepared.text.startswith(f"shard 1: {gid} is prepared for")

        monkeypatch.setattr(doctor, "settings_of_process", lambda: wrong)
        looked_at = {
            "databases": storage.databases,
            "spread of the users": storage.shard_skew,
            "cache": storage.cache,
        }
        monkeypatch.setattr(doctor, "_checks", lambda: looked_at)

        with pytest.raises(typer.Exit) as ended:
            doctor.doctor(json_output=True)
    finally:
        finish(world, gid)

    assert ended.value.exit_code == 1
    found = {result["name"]: result["findings"] for result in json.loads(capsys.readouterr().out)}
    assert found["databases"][1]["text"].startswith("shard 0: its DSN points to the catalog of cluster 'check'")
    [spread] = found["spread of the users"]
    assert spread["text"] == "it cannot be checked (ProgrammingError)"
    assert "segsvc config" in spread["remedy"]
    assert found["cache"] == []


def test_a_role_that_may_read_nothing_is_found(world: World, check_settings: Settings) -> None:
    with world.catalog.begin() as connection:
        connection.exec_driver_sql("CREATE ROLE nobody_here LOGIN")

    dsn = re.sub(r"//[^@/]*@?", "//nobody_here@", check_settings.catalog_dsn, count=1)

    try:
        [item] = storage.databases(check_settings.model_copy(update={"catalog_dsn": dsn}))
    finally:
        with world.catalog.begin() as connection:
            connection.exec_driver_sql("DROP ROLE nobody_here")

    assert item.text == "the catalog: cannot be read (permission denied for table alembic_version)"
    assert item.remedy == "correct SEGSVC_CATALOG_DSN, or its role's rights"


def test_many_servers_out_of_reach_are_waited_for_together(check_settings: Settings) -> None:
    """All sixteen shards are on a server that accepts connections and never answers."""
    with socket.create_server(("127.0.0.1", 0), backlog=128) as silent:
        dsn = f"postgresql+psycopg2://x@127.0.0.1:{silent.getsockname()[1]}/x"
        away = check_settings.model_copy(update={"shard_dsns": (dsn,) * 16, "connect_timeout_s": 2})

        started = time.monotonic()
        items = storage.databases(away)

        *unreachable, founded = items
        assert [item.text.split(" (")[0] for item in unreachable] == [
            f"shard {shard}: cannot be reached" for shard in range(16)
        ]
        assert founded.text.startswith("the catalog: it was founded with 2 shards")
        assert len(doubt.in_doubt(away)) >= 16
        assert time.monotonic() - started < 16


def test_unpublished_commits_are_found(world: World, check_settings: Settings) -> None:
    settings = check_settings.model_copy(update={"kafka_stand_in": True})  # Kafka's groups are not queried

    with world.catalog.begin() as connection:
        connection.exec_driver_sql("UPDATE audit SET published = true")
    assert running.bridge(settings) == []

    with world.catalog.begin() as connection:
        connection.exec_driver_sql(
            "INSERT INTO audit (seq, time, action, segment_id, slug, details)"
            " SELECT 900 + n, now() - n * interval '50 seconds', 'created', 1, 'x', '{}' FROM generate_series(1, 2) n"
        )

    [item] = running.bridge(settings)
    assert item.text == "2 commits are not yet on segment-events, the oldest for 100 s"
    assert "segsvc bridge" in item.remedy

    with world.catalog.begin() as connection:
        connection.exec_driver_sql("DELETE FROM audit WHERE seq > 900")


def test_a_flower_that_does_not_answer_is_found(check_settings: Settings) -> None:
    [item] = running.flower(check_settings)
    assert (item.text, item.remedy) == ("not checked: SEGSVC_FLOWER_PASSWORD is empty", "")
    there = check_settings.model_copy(update={"flower_password": "x", "flower_address": "127.0.0.1:1"})
    [item] = running.flower(there)
    assert item.text == "it does not answer at 127.0.0.1:1 (URLError)"
    assert "segsvc flower" in item.remedy


def test_recovery_that_does_not_look_is_found(world: World, check_settings: Settings) -> None:
    def age(interval: str | None) -> None:
        with world.catalog.begin() as connection:
            now = "NULL" if interval is None else f"now() - interval '{interval}'"
            connection.exec_driver_sql(f"UPDATE installation SET recovery_time = {now}")

    age(None)
    [item] = storage.recovery(check_settings)
    assert item.text == "recovery has never run"
    assert "segsvc beat" in item.remedy

    age("5 minutes")
    [item] = storage.recovery(check_settings)
    assert item.text.startswith("the last complete recovery run was 30")

    databases = Databases(check_settings, "test")
    try:
        PostgresMaintainedCatalog(databases).note_recovery()
    finally:
        databases.close()
    assert storage.recovery(check_settings) == []


def test_outages_are_findings(check_settings: Settings) -> None:
    gone = check_settings.model_copy(
        update={"shard_dsns": (check_settings.shard_dsns[0], "postgresql+psycopg2:///x?host=/nowhere")}
    )
    [item] = storage.databases(gone)
    assert item.text.startswith('shard 1: cannot be reached (connection to server on socket "/nowhere/')
    assert item.remedy == "start its server or correct SEGSVC_SHARD_DSNS"
    [item] = storage.shard_skew(gone)
    assert item.text == "SHARD_UNAVAILABLE: shard 1 cannot be reached now"


def test_a_cache_that_is_a_broker_is_found(check_settings: Settings, broker_server: RedisServer) -> None:
    items = storage.cache(check_settings.model_copy(update={"cache_url": broker_server.url}))
    assert any("noeviction" in item.text for item in items)
    assert all(item.remedy for item in items)


def test_an_installation_that_shares_the_cache_is_named(check_settings: Settings, cache: CacheClient) -> None:
    cache.acquire(0, [2])
    assert storage.cache(check_settings) == []
    with redis.Redis.from_url(check_settings.cache_url) as raw:
        raw.set("{07be4000:1}:g", b"x")
    [item] = storage.cache(check_settings)
    assert item.text == "another installation uses this server too: its keys begin with {07be4000:"
    assert "a server of its own" in item.remedy
