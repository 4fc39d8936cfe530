"""What ``segsvc doctor`` says of the databases and the cache."""

from __future__ import annotations

import pytest

from segsvc.cli import doctor_storage
from segsvc.config import Settings
from segsvc.domain.operation import Gid, OperationKind, OperationState
from segsvc.local.redis import RedisServer
from segsvc.postgres.engine import Databases
from segsvc.postgres.maintenance import PostgresMaintainedCatalog
from tests.integration.check.checking import ABSENT, ageless, finish, prepare
from tests.integration.check.world import World


def test_nothing_is_said_of_what_is_well(world: World, check_settings: Settings) -> None:
    assert doctor_storage.databases(check_settings) == []
    assert doctor_storage.prepared_transactions(check_settings) == []
    assert doctor_storage.cache(check_settings) == []
    assert [item.text for item in doctor_storage.shard_skew(check_settings)] == ["users a shard: 1,498, 1,499"]


@pytest.mark.parametrize(
    ("state", "why"),
    [
        (OperationState.PREPARING, "it waits for all shards to vote, until "),
        (OperationState.COMMITTED, "recovery commits it"),
        (OperationState.ABORTED, "recovery rolls it back"),
    ],
)
def test_a_transaction_in_doubt_is_explained(
    world: World, check_settings: Settings, monkeypatch: pytest.MonkeyPatch, state: OperationState, why: str
) -> None:
    operation = world.add_operation(OperationKind.ROLL_OUT, world.segments[1], state, rule=world.segments[1].rule)
    world.write()
    gid = str(Gid("check", operation, 1))
    prepare(world, gid)
    try:
        [item] = doctor_storage.prepared_transactions(check_settings)
        said = f"shard 1: {gid} is prepared: operation {operation} (ROLL_OUT beta, {state.name}); {why}"
        assert ageless(item.text).startswith(said)
        assert item.remedy == ""
        monkeypatch.setattr(doctor_storage, "IN_DOUBT_MAX_S", 0.0)
        [item] = doctor_storage.prepared_transactions(check_settings)
        assert bool(item.remedy) == (state is not OperationState.PREPARING)
    finally:
        finish(world, gid)


@pytest.mark.parametrize(
    ("gid", "said"),
    [
        (f"segsvc:check:{ABSENT}:1", "the ledger has no such operation on this shard"),
        (f"segsvc:other:{ABSENT}:1", "it is not ours"),
        ("backup", "it is not ours"),
    ],
)
def test_a_transaction_of_nobody_asks_for_a_person(world: World, check_settings: Settings, gid: str, said: str) -> None:
    prepare(world, gid)
    try:
        [item] = doctor_storage.prepared_transactions(check_settings)
        assert ageless(item.text) == f"shard 1: {gid} is prepared; {said}"
        assert item.remedy
    finally:
        finish(world, gid)


def test_recovery_that_does_not_look_is_found(world: World, check_settings: Settings) -> None:
    def age(interval: str | None) -> None:
        with world.catalog.begin() as connection:
            now = "NULL" if interval is None else f"now() - interval '{interval}'"
            connection.exec_driver_sql(f"UPDATE installation SET recovery_time = {now}")

    age(None)
    [item] = doctor_storage.recovery(check_settings)
    assert item.text == "recovery has never looked"
    assert "segsvc beat" in item.remedy
    age("5 minutes")
    [item] = doctor_storage.recovery(check_settings)
    assert item.text.startswith("recovery last looked 30")
    databases = Databases(check_settings, "test")
    try:
        PostgresMaintainedCatalog(databases).note_recovery()
    finally:
        databases.close()
    assert doctor_storage.recovery(check_settings) == []


def test_outages_are_findings(check_settings: Settings) -> None:
    gone = check_settings.model_copy(
        update={"shard_dsns": (check_settings.shard_dsns[0], "postgresql+psycopg2:///x?host=/nowhere")}
    )
    [item] = doctor_storage.databases(gone)
    assert item.text.startswith('shard 1: cannot be reached (connection to server on socket "/nowhere/')
    assert item.remedy == "start its server or correct SEGSVC_SHARD_DSNS"
    for examine in (doctor_storage.prepared_transactions, doctor_storage.shard_skew):
        [item] = examine(gone)
        assert item.text == "SHARD_UNAVAILABLE: shard 1 cannot be reached now"


def test_a_cache_that_is_a_broker_is_found(check_settings: Settings, broker_server: RedisServer) -> None:
    items = doctor_storage.cache(check_settings.model_copy(update={"cache_url": broker_server.url}))
    assert any("noeviction" in item.text for item in items)
    assert all(item.remedy for item in items)
