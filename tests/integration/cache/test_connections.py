"""Connections to the cache are bound to one run of one server and closed by any error; keys stay on one node."""

from __future__ import annotations

from collections.abc import Iterator
from pathlib import Path

import pytest
import redis

from segsvc.cache.client import CacheClient
from segsvc.cache.warm_notes import WarmNotes
from segsvc.domain.errors import Reason, ServiceError
from segsvc.domain.membership import NEVER_US, Entry, Sweep
from segsvc.local.redis import CACHE_CONFIG, RedisServer
from tests.eventually import eventually, seconds_of
from tests.installation import KEYS
from tests.integration.cache.conftest import CACHE_TIMEOUT_S, World

USER = 4
SHARD = 0
ENTRY: Entry = (NEVER_US, 1, 2, 0, 0, 7, 8)
G = KEYS.generation(SHARD)


# -- connections ----------------------------------------------------------------------------------------------------


def test_run_id_is_asked_before_anything_else(world: World) -> None:
    with world.raw.monitor() as monitor:
        connection = world.client.servers[0].connect()
        connection.run("GET", "x")
        own = connection._transport._sock.getsockname()[1]
        commands = []
        while not commands or commands[-1] != "GET x":
            event = monitor.next_command()
            if event["client_port"] == str(own):
                commands.append(event["command"])
        connection.close()

    assert next(command for command in commands if not command.startswith("AUTH")) == "INFO"


def test_connection_is_never_renewed_in_place(world: World) -> None:
    connection = world.client.servers[0].connect()
    world.raw.client_kill_filter(_type="normal", skipme=True)
    with pytest.raises((redis.RedisError, OSError)):
        connection.run("GET", "x")
    assert not connection.open
    with pytest.raises(OSError, match="closed"):
        connection.run("GET", "x")


def test_error_reply_closes_the_connection(world: World) -> None:
    """Otherwise later replies would be read as replies to another command."""
    connection = world.client.servers[0].connect()
    with pytest.raises(redis.ResponseError, match="unknown command"):
        connection.run_all([("NONSENSE",), ("GET", "x")])
    assert not connection.open


def test_idle_connections_that_were_cut_are_replaced_unseen(world: World) -> None:
    world.client.acquire(SHARD, [USER])
    world.raw.client_kill_filter(_type="normal", skipme=True)
    assert world.client.acquire(SHARD, [6]).user_ids == {6}


def test_scripts_come_back_after_they_were_flushed(world: World) -> None:
    world.client.acquire(SHARD, [USER])
    world.raw.script_flush()
    with pytest.raises(ServiceError) as error:
        world.client.acquire(SHARD, [6])
    assert error.value.reason is Reason.CACHE_UNAVAILABLE
    assert world.client.acquire(SHARD, [6]).user_ids == {6}


def test_server_that_is_down_and_back(own_world: World) -> None:
    client, server = own_world.client, own_world.server
    client.acquire(SHARD, [USER])
    server.kill()

    steps = [
        lambda: client.acquire(SHARD, [USER]),
        lambda: client.bar(SHARD, USER),
        lambda: client.drop_entries(SHARD, [USER]),
        lambda: client.drop_generations([SHARD]),
    ]
    for step in steps:
        with pytest.raises(ServiceError) as error:
            step()
        assert error.value.reason is Reason.CACHE_UNAVAILABLE

    server.start()

    def back() -> bool:
        try:
            client.drop_entries(SHARD, [USER])
        except ServiceError:
            return False
        return True

    eventually(back)


def test_a_hung_server_costs_one_caller_its_timeout_and_other_callers_nothing(own_world: World) -> None:
    client = own_world.client
    client.acquire(SHARD, [USER])
    own_world.server.pause()

    with pytest.raises(ServiceError):
        client.acquire(SHARD, [USER])

    def refused_at_once() -> None:
        with pytest.raises(ServiceError):
            client.acquire(SHARD, [USER])

    took = sorted(seconds_of(refused_at_once) for _ in range(40))
    assert took[20] < CACHE_TIMEOUT_S, took

    own_world.server.resume()

    def back() -> bool:
        try:
            client.acquire(SHARD, [USER])
        except ServiceError:
            return False
        return True

    eventually(back)


def test_wrong_password_is_an_outage(cache_server: RedisServer) -> None:
    client = CacheClient(
        cache_server.url.replace("redis://:", "redis://:wrong"), find_keys=lambda: KEYS, timeout_s=0.5, ttl_s=60
    )
    with pytest.raises(ServiceError) as error:
        client.acquire(SHARD, [USER])
    assert "wrong" not in str(error.value)


# -- Redis Cluster --------------------------------------------------------------------------------------------------


@pytest.fixture
def cluster_client(tmp_path: Path) -> Iterator[CacheClient]:
    """A server that refuses commands over several hash slots, as every node of a Redis Cluster does."""
    server = RedisServer("cluster", tmp_path / "cluster", {**CACHE_CONFIG, "cluster-enabled": "yes"})
    server.start()

    with redis.Redis.from_url(server.url) as raw:
        raw.execute_command("CLUSTER", "ADDSLOTSRANGE", 0, 16383)
        eventually(lambda: b"cluster_state:ok" in raw.execute_command("CLUSTER", "INFO"))
        with pytest.raises(redis.ResponseError, match="same slot"):
            raw.execute_command("MGET", G, KEYS.generation(1))

    client = CacheClient(server.url, find_keys=lambda: KEYS, timeout_s=1.0, ttl_s=60)

    yield client
    client.close()
    server.purge()


def test_every_step_stays_within_one_shards_hash_slot(cluster_client: CacheClient) -> None:
    notes = WarmNotes(cluster_client)

    for shard in (0, 1):
        users = list(range(shard + 2, 1000, 2))

        token = cluster_client.bar(shard, users[0])
        grant = cluster_client.acquire(shard, users)
        assert cluster_client.fill(shard, grant, [(user, ENTRY) for user in users[5:]]) == len(users) - 5
        cluster_client.release(shard, grant, users[:5])
        cluster_client.drop_entries(shard, users, token)

        notes.add_reads(shard, {1: 8, 2: 9})
        notes.fade(shard)
        assert notes.hottest(shard) == [2, 1]

        notes.note_sweep(shard, Sweep(grant.nonce, 7, 8))
        assert notes.last_sweep(shard) == Sweep(grant.nonce, 7, 8)
        assert notes.present(shard, [users, users[:1]]) == [0, 0]

    cluster_client.drop_generations([0, 1])
