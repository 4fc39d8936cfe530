"""The warmer's client leaves the server time for other clients, whatever the number of its threads."""

from __future__ import annotations

import time
from concurrent.futures import ThreadPoolExecutor

import redis

from segsvc.cache.client import CacheClient
from segsvc.domain.membership import NEVER_US, Entry
from segsvc.local.redis import RedisServer
from tests.installation import KEYS

REST = 3.0
USERS = 5_000
ENTRY: Entry = (NEVER_US, 1, 2, 0, 0, *range(50))


def test_a_client_that_rests_never_has_the_server_for_itself(cache_server: RedisServer) -> None:
    client = CacheClient(cache_server.url, find_keys=lambda: KEYS, timeout_s=5.0, ttl_s=60, rest=REST)

    def fill(shard: int) -> int:
        users = list(range(shard + 2, 2 * USERS, 2))
        grant = client.acquire(shard, users)
        return client.fill(shard, grant, [(user, ENTRY) for user in users])

    with redis.Redis.from_url(cache_server.url) as raw, ThreadPoolExecutor(2) as threads:
        raw.config_resetstat()
        begun = time.monotonic()
        filled = sum(threads.map(fill, (0, 1)))
        took_s = time.monotonic() - begun
        busy_s = raw.info("commandstats")["cmdstat_evalsha"]["usec"] / 1e6

    client.close()
    assert filled >= 2 * USERS - 2
    assert took_s >= (1 + REST) * busy_s
