"""Reads many users' entries in one round trip to their server: the part of the cache that the hot lane uses."""

from __future__ import annotations

import time
from collections.abc import Generator, Sequence
from contextlib import closing
from typing import Final

from redis.exceptions import RedisError

from segsvc import metrics
from segsvc.cache import entry as entries
from segsvc.cache.client import CacheClient
from segsvc.cache.connection import CacheConnection
from segsvc.cache.server import CacheServer
from segsvc.domain.errors import cache_unavailable
from segsvc.domain.membership import Entry

COMMANDS_AHEAD: Final = 2
"""One command that the server works on, and one whose reply is on its way."""


class CacheReader:
    """The connection of one reading thread to one server. That thread calls ``lookup``; any other thread calls
    ``connect``.

    The two are separate so that the reading thread never waits for a server that is down: it checks ``connected`` and
    goes on without the cache, while another thread tries to connect.

    Args:
        server: one of the client's servers, which is asked only for users of the shards that it holds; None: the client
            has one server.
    """

    def __init__(self, client: CacheClient, shard_count: int, server: CacheServer | None = None) -> None:
        self._client = client
        self._shard_count = shard_count
        self._server = server or client.servers[0]
        self._shards = [shard for shard in range(shard_count) if client.server_of(shard) is self._server]
        self._gauge = metrics.cache_connected.labels(self._server.name)
        # Beginnings of the users' keys, by shard, and the generations' keys of the server's shards; set when it is
        # connected.
        self._prefixes: list[bytes] = []
        self._generations: list[bytes] = []
        self._connection: CacheConnection | None = None

    @property
    def name(self) -> str:
        """The server's, for people."""
        return self._server.name

    @property
    def connected(self) -> bool:
        return self._connection is not None

    @property
    def complete(self) -> bool:
        """Whether there is nothing left to connect to."""
        return self._connection is not None

    def connect(self) -> None:
        """Connect unless it is connected. Raises CACHE_UNAVAILABLE."""
        if self._connection is None:
            keys = self._client.keys
            self._prefixes = [keys.user_prefix(shard) for shard in range(self._shard_count)]
            self._generations = [keys.generation(shard) for shard in self._shards]
            # Set last: the reading thread checks it.
            self._connection = self._server.connect()
            self._gauge.set(1)

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
        pieces = [user_ids[first : first + users_per_command] for first in range(0, len(user_ids), users_per_command)]
        received = 0

        connection = self.ask(pieces[:COMMANDS_AHEAD])
        try:
            for number, piece in enumerate(pieces):
                values = self.receive(connection)
                received += 1
                if number + COMMANDS_AHEAD < len(pieces):
                    self.ask([pieces[number + COMMANDS_AHEAD]], connection)
                yield self.entries(piece, values, connection)
        finally:
            if received < len(pieces):
                # Replies are still to come, which the next lookup would take for its own.
                self.lose(connection)

    # -- the parts of a lookup ----------------------------------------------------------------------------------------

    def ask(self, pieces: Sequence[Sequence[int]], connection: CacheConnection | None = None) -> CacheConnection:
        """Send a command for each of these pieces of users. Returns the connection that the replies come by.

        Args:
            connection: what an earlier call has returned; None: the one that there is now.

        Raises:
            ServiceError: CACHE_UNAVAILABLE; ``connected`` is then False.
        """
        connection = connection or self._connection
        if connection is None:
            raise cache_unavailable()
        try:
            connection.send([self._command(piece) for piece in pieces])
        except (RedisError, OSError) as error:
            self.lose(connection)
            raise cache_unavailable() from error
        return connection

    def receive(self, connection: CacheConnection) -> Sequence[bytes | None]:
        """The next reply: values for ``entries``. Raises as ``ask``."""
        try:
            values: Sequence[bytes | None] = connection.receive()
        except (RedisError, OSError) as error:
            self.lose(connection)
            raise cache_unavailable() from error
        return values

    def lose(self, connection: CacheConnection) -> None:
        """Close a connection whose replies are of no use, so that the next ``connect`` opens another one."""
        connection.close()
        if self._connection is connection:
            self._connection = None
            self._gauge.set(0)

    def entries(
        self, user_ids: Sequence[int], values: Sequence[bytes | None], connection: CacheConnection
    ) -> list[Entry | None]:
        """What a piece's reply says of its users, in their order; None: a miss."""
        shards = self._shard_count
        usable: list[bytes | None] = [None] * shards
        for shard, value in zip(self._shards, values, strict=False):
            nonce = entries.nonce_of(value, connection.run_id)
            if nonce is not None:
                usable[shard] = entries.prefix(nonce)

        now_us = time.time_ns() // 1000
        of_users = values[len(self._shards) :]
        return entries.decode_all(of_users, [usable[user_id % shards] for user_id in user_ids], now_us)

    def _command(self, user_ids: Sequence[int]) -> list[bytes | str | int | float]:
        # One command reads all shards of its server. A Redis Cluster would need one command for each shard, still with
        # the shard's generation in it.
        shards, prefixes = self._shard_count, self._prefixes
        return ["MGET", *self._generations, *[prefixes[user_id % shards] + b"%d" % user_id for user_id in user_ids]]
