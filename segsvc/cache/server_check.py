"""Checks that the cache's server is set up as the protocol needs it: at every start, and in ``segsvc doctor``."""

from __future__ import annotations

import re
import time
from typing import Any, Final

from redis.exceptions import RedisError, ResponseError

from segsvc.cache.connection import CacheConnection
from segsvc.config import mask

_LOOK_S: Final = 1.0
_TAG: Final = re.compile(rb"\{([0-9a-f]{8}):[0-9]+\}:")
OLDEST_VERSION: Final = (7, 0)
"""Oldest version of Redis that knows flags of scripts. (Valkey reports the Redis version it is compatible with.)"""


def cache_findings(url: str, *, timeout_s: float) -> list[str]:
    """What is wrong with the cache's server, one sentence for each fault; an empty list if nothing is.

    A server that cannot be reached is a fault too.
    """
    try:
        connection = CacheConnection(url, timeout_s)
    except (RedisError, OSError) as error:
        return [f"the cache's server cannot be reached ({mask(str(error)) or type(error).__name__})"]

    try:
        return [
            *_version(connection.info),
            *_mode(connection.info),
            *_eviction(connection.info),
            *_copies(connection),
            *_persistence(connection),
        ]
    except (RedisError, OSError):
        return ["the cache's server broke off the check"]
    finally:
        connection.close()


def run_id_of(url: str, *, timeout_s: float) -> str | None:
    """What tells one run of one server from every other; None: the server cannot be reached."""
    try:
        connection = CacheConnection(url, timeout_s)
    except (RedisError, OSError):
        return None
    connection.close()
    return connection.run_id.decode()


def other_tags(url: str, *, timeout_s: float) -> set[str]:
    """Tags of the installations that have keys in the server, as far as a scan of one second finds them: in a large
    server that is a sample. Empty if the server cannot be reached."""
    found: set[str] = set()
    try:
        connection = CacheConnection(url, timeout_s)
        try:
            cursor, end = b"0", time.monotonic() + _LOOK_S
            while time.monotonic() < end:
                cursor, names = connection.run("SCAN", cursor, "COUNT", 1000)
                found.update(tag[1].decode() for name in names if (tag := _TAG.match(name)))
                if cursor == b"0":
                    break
        finally:
            connection.close()
    except (RedisError, OSError):
        return found
    return found


def _version(info: dict[str, str]) -> list[str]:
    text = info.get("redis_version", "0")
    if tuple(int(part) for part in text.split(".")[:2] if part.isdigit()) >= OLDEST_VERSION:
        return []
    return [f"the cache's server is version {text}; it must be at least {'.'.join(map(str, OLDEST_VERSION))}"]


def _mode(info: dict[str, str]) -> list[str]:
    if info.get("cluster_enabled", "0") == "0" and info.get("redis_mode") != "cluster":
        return []
    # A node refuses a command with keys of two shards, and every key whose hash slot another node holds.
    return ["the cache's server is a node of a Redis Cluster; several servers are named with SEGSVC_CACHE_URLS instead"]


def _eviction(info: dict[str, str]) -> list[str]:
    policy = info.get("maxmemory_policy", "unknown")
    if policy == "volatile-lru":
        return []
    # Under allkeys-*, the server evicts the key of a shard's generation as soon as it is idle, and the shard goes
    # cold. Under noeviction a full cache takes no more entries.
    return [f"the cache's maxmemory-policy is {policy}; it must be volatile-lru"]


def _copies(connection: CacheConnection) -> list[str]:
    info = connection.info
    found = []
    # A replica could take over with older data: readers would no longer see a change that was acknowledged.
    if info.get("role") != "master":
        found.append(f"the cache's server is a {info.get('role', 'server of unknown role')}, not a master of its own")
    if int(info.get("connected_slaves", 0)):
        found.append(f"the cache's server has {info['connected_slaves']} replicas; it must have none")
    return found


def _persistence(connection: CacheConnection) -> list[str]:
    """A server that comes back with older data is worse than one that comes back empty."""
    found = []
    if connection.info.get("aof_enabled", "0") != "0":
        found.append("the cache's server has appendonly on; it must be off")
    saves = _setting(connection, "save")
    if saves is None:
        found.append("the cache's server does not let its setting 'save' be read; make sure that it is empty")
    elif saves:
        found.append(f"the cache's server writes snapshots (save {saves!r}); save must be empty")
    return found


def _setting(connection: CacheConnection, name: str) -> str | None:
    """One setting; None: the server does not allow reading it (hosted servers often do not)."""
    try:
        reply: Any = connection.run("CONFIG", "GET", name)
    except ResponseError:
        return None
    return reply[1].decode() if len(reply) == 2 else None
