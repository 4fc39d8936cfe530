"""Reads many users' entries in one round trip: the part of the cache that the hot lane uses."""

from __future__ import annotations

import time
from collections.abc import Generator, Sequence
from contextlib import closing
from typing import Final

from redis.exceptions import RedisError

from segsvc.cache import entry as entries
from segsvc.cache.client import CacheClient
from segsvc.cache.connection import CacheConnection
from segsvc.domain.errors import cache_unavailable
from segsvc.domain.membership import Entry

_COMMANDS_AHEAD: Final = 2
"""One command that the server works on, and one whose reply is on its way."""


class CacheReader:
    """The connection of one reading thread. That thread calls ``lookup``; any other thread calls ``connect``.

    The two are separate so that the reading thread never waits for a server that is down: it checks ``connected`` and
    goes on without the cache, while another thread tries to connect.
    """

    def __init__(self, client: CacheClient, shard_count: int) -> None:
        self._client = client
        self._shard_count = shard_count
        # Beginnings of the users' keys, and the generations' keys, by shard; set when it is connected.
        self._prefixes: list[bytes] = []
        self._generations: list[bytes] = []
        self._connection: CacheConnection | None = None

    @property
    def connected(self) -> bool:
        return self._connection is not None

    def connect(self) -> None:
        """Connect unless it is connected. Raises CACHE_UNAVAILABLE."""
        if self._connection is None:
            keys = self._client.keys
            self._prefixes = [keys.user_prefix(shard) for shard in range(self._shard_count)]
            self._generations = [keys.generation(shard) for shard in range(self._shard_count)]
            # Set last: the reading thread checks it.
            self._connection = self._client.connect()

    def close(self) -> None:
        connection, self._connection = self._connection, None
        if connection is not None:
            connection.close()

    def lookup(self, user_ids: Sequence[int]) -> list[Entry | None]:
        """The users' entries in the cache, in the order of the users; None: a miss.

        A value is a hit if it decodes, carries the nonce of its shard's generation, that generation is of this run of
        this server, and its valid_until has not passed. Generations and values come from one MGET, so all are of one
        moment.

        Raises:
            ServiceError: CACHE_UNAVAILABLE; ``connected`` is then False.
        """
        with closing(self.lookups(user_ids, max(1, len(user_ids)))) as found:
            return next(found, [])

    def lookups(self, user_ids: Sequence[int], users_per_command: int) -> Generator[list[Entry | None]]:
        """As ``lookup``, in pieces: one command for each ``users_per_command`` users. While the caller works on one
        piece, the server prepares the next one. Each piece is of one moment. Close the generator if it is not read to
        its end.

        Raises:
            ServiceError: CACHE_UNAVAILABLE, at any piece; ``connected`` is then False.
        """
        connection = self._connection
        if connection is None:
            raise cache_unavailable()
        pieces = [user_ids[first : first + users_per_command] for first in range(0, len(user_ids), users_per_command)]
        received = 0

        try:
            connection.send([self._command(piece) for piece in pieces[:_COMMANDS_AHEAD]])
            for number, piece in enumerate(pieces):
                values = connection.receive()
                received += 1
                if number + _COMMANDS_AHEAD < len(pieces):
                    connection.send([self._command(pieces[number + _COMMANDS_AHEAD])])
                yield self._entries(piece, values, connection.run_id)
        except (RedisError, OSError) as error:
            self._connection = None
            raise cache_unavailable() from error
        finally:
            if received < len(pieces):
                # Replies are still to come, which the next lookup would take for its own.
                connection.close()
                self._connection = None

    def _command(self, user_ids: Sequence[int]) -> list[bytes | str | int | float]:
        # There is one server, so one command reads all shards. A Redis Cluster would need one command for each shard,
        # still with the shard's generation in it.
        shards, prefixes = self._shard_count, self._prefixes
        return ["MGET", *self._generations, *[prefixes[user_id % shards] + b"%d" % user_id for user_id in user_ids]]

    def _entries(self, user_ids: Sequence[int], values: Sequence[bytes | None], run_id: bytes) -> list[Entry | None]:
        shards = self._shard_count
        usable = [
            entries.prefix(nonce) if (nonce := entries.nonce_of(value, run_id)) is not None else None
            for value in values[:shards]
        ]
        now_us = time.time_ns() // 1000
        return entries.decode_all(values[shards:], [usable[user_id % shards] for user_id in user_ids], now_us)
