"""Reading many users' entries in one round trip: the hot path's side of the cache."""

from __future__ import annotations

import time
from collections.abc import Sequence

from redis.exceptions import RedisError

from segsvc.cache import entry as entries
from segsvc.cache import keys
from segsvc.cache.client import CacheClient
from segsvc.cache.connection import CacheConnection
from segsvc.domain.errors import cache_unavailable
from segsvc.domain.membership import Entry


class CacheReader:
    """One reading thread's own connection. ``lookup`` is for that thread, ``connect`` for any other.

    They are apart so that the reading thread never waits for a server that is down: it sees ``connected`` and goes
    on without the cache, while somebody else tries to connect.
    """

    def __init__(self, client: CacheClient, shard_count: int) -> None:
        self._client = client
        self._shard_count = shard_count
        self._generations = [keys.generation(shard) for shard in range(shard_count)]
        self._connection: CacheConnection | None = None

    @property
    def connected(self) -> bool:
        return self._connection is not None

    def connect(self) -> None:
        """Connect if need be. Raises CACHE_UNAVAILABLE."""
        if self._connection is None:
            self._connection = self._client.connect()

    def close(self) -> None:
        connection, self._connection = self._connection, None
        if connection is not None:
            connection.close()

    def lookup(self, user_ids: Sequence[int]) -> list[Entry | None]:
        """What the cache holds of these users, in their order; None: a miss.

        A hit is a value that decodes, carries the nonce of its shard's generation, whose generation is of this very
        server, and whose valid_until has not passed. Generations and values come from one MGET, hence of one moment.

        Raises:
            ServiceError: CACHE_UNAVAILABLE; ``connected`` is then False.
        """
        connection = self._connection
        if connection is None:
            raise cache_unavailable()
        shards = self._shard_count
        try:
            # One server, so one command for all shards. On a Redis Cluster it would be one for each shard, still with
            # the shard's generation in it.
            values = connection.run(
                "MGET", *self._generations, *[b"{%d}:u:%d" % (user_id % shards, user_id) for user_id in user_ids]
            )
        except (RedisError, OSError) as error:
            self._connection = None
            raise cache_unavailable() from error
        usable = [
            entries.prefix(nonce) if (nonce := entries.nonce_of(value, connection.run_id)) is not None else None
            for value in values[:shards]
        ]
        now_us = time.time_ns() // 1000
        decode = entries.decode
        return [
            decode(value, usable[user_id % shards], now_us)
            for user_id, value in zip(user_ids, values[shards:], strict=True)
        ]
