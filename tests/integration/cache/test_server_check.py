"""A cache's server with settings that the protocol does not permit is named at startup."""

from __future__ import annotations

from collections.abc import Iterator
from pathlib import Path

import pytest
import redis

from segsvc.cache.server_check import cache_findings
from segsvc.local.redis import RedisServer


def findings(server: RedisServer) -> list[str]:
    return cache_findings(server.url, timeout_s=1.0)


def test_sound_server_has_no_findings(cache_server: RedisServer) -> None:
    assert findings(cache_server) == []


@pytest.mark.parametrize(
    ("setting", "value", "finding"),
    [
        ("maxmemory-policy", "allkeys-lru", "the cache's maxmemory-policy is allkeys-lru; it must be volatile-lru"),
        ("maxmemory-policy", "noeviction", "the cache's maxmemory-policy is noeviction; it must be volatile-lru"),
        ("save", "900 1", "the cache's server writes snapshots (save '900 1'); save must be empty"),
        ("appendonly", "yes", "the cache's server has appendonly on; it must be off"),
    ],
)
def test_each_wrong_setting_is_named(own_cache: RedisServer, setting: str, value: str, finding: str) -> None:
    with redis.Redis.from_url(own_cache.url) as client:
        client.config_set(setting, value)
    assert findings(own_cache) == [finding]
    own_cache.kill()  # an orderly stop writes the file first


@pytest.fixture
def replica(own_cache: RedisServer, tmp_path: Path) -> Iterator[RedisServer]:
    password = own_cache.url.split(":")[2].split("@")[0]

    server = RedisServer(
        "replica",
        tmp_path / "replica",
        {
            "maxmemory-policy": "volatile-lru",
            "replicaof": f"127.0.0.1 {own_cache.port}",
            "masterauth": password,
            "repl-diskless-sync-delay": "0",
        },
    )

    server.start()
    yield server
    server.purge()


def test_replica_and_its_master_are_named(own_cache: RedisServer, replica: RedisServer) -> None:
    assert findings(replica) == ["the cache's server is a slave, not a master of its own"]
    with redis.Redis.from_url(own_cache.url) as client:
        assert client.info("replication")["connected_slaves"] == 1
    assert findings(own_cache) == ["the cache's server has 1 replicas; it must have none"]


def test_an_unreadable_setting_is_reported(own_cache: RedisServer) -> None:
    with redis.Redis.from_url(own_cache.url) as client:
        client.acl_setuser("guest", enabled=True, passwords=["+secret"], categories=["+@all"], commands=["-config"])
    guest = own_cache.url.split("@")[1]
    found = cache_findings(f"redis://guest:secret@{guest}", timeout_s=1.0)
    assert found == ["the cache's server does not let its setting 'save' be read; make sure that it is empty"]


def test_server_out_of_reach_is_a_finding(own_cache: RedisServer) -> None:
    own_cache.kill()
    (finding,) = findings(own_cache)
    assert finding.startswith("the cache's server cannot be reached (")
    # A connection that the kernel had accepted before the kill is reset instead.
    assert "refused" in finding or "reset" in finding
