"""Reads many users' entries in one round trip to their server: the part of the cache that the hot lane uses."""

from __future__ import annotations

import time
from collections import deque
from collections.abc import Generator, Sequence
from contextlib import closing
from typing import Final

from redis.exceptions import RedisError

from segsvc import metrics
from segsvc.cache import entry as entries
from segsvc.cache.client import CacheClient
from segsvc.cache.connection import CacheConnection, ConnectionClosedError
from segsvc.cache.patch_store import Fetch, OlderEntries, PatchStore
from segsvc.cache.server import CacheServer
from segsvc.domain.errors import cache_unavailable
from segsvc.domain.membership import EPOCH, Entry

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
        patches: what the thread knows of patches.
    """

    def __init__(
        self,
        client: CacheClient,
        shard_count: int,
        server: CacheServer | None = None,
        *,
        patches: PatchStore,
    ) -> None:
        self._client = client
        self._shard_count = shard_count
        self._patches = patches
        self._server = server or client.servers[0]
        self._shards = [shard for shard in range(shard_count) if client.server_of(shard) is self._server]
        self._gauge = metrics.cache_connected.labels(self._server.name)
        # Beginnings of the users' keys, by shard, and the generations' keys of the server's shards; set when it is
        # connected.
        self._prefixes: list[bytes] = []
        self._generations: list[bytes] = []
        self._connection: CacheConnection | None = None
        self._asked: CacheConnection | None = None
        """The connection on which the last piece was asked for. What follows is about this connection alone."""
        self._owed = 0
        """Replies to pieces that have been asked for and not received."""
        self._early: deque[Sequence[bytes | None]] = deque()
        """Replies to pieces that had to be received before their turn."""

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
        this server, its valid_until has not passed, and all patches that are later than the value can be laid over it.
        Generations and values come from one MGET, so all are of one moment. Patches that are not in memory are fetched
        by one more round trip.

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
        if connection is not self._asked:
            # The connection before was lost in the middle of a lookup, and another thread has opened this one since.
            self._asked, self._owed = connection, 0
            self._early.clear()
        self._owed += len(pieces)
        return connection

    def receive(self, connection: CacheConnection) -> Sequence[bytes | None]:
        """The next reply: values for ``entries``. Raises as ``ask``."""
        if connection is self._asked and self._early:
            return self._early.popleft()
        try:
            values: Sequence[bytes | None] = connection.receive()
        except (RedisError, OSError) as error:
            self.lose(connection)
            raise cache_unavailable() from error
        if connection is self._asked:
            self._owed -= 1
        return values

    def lose(self, connection: CacheConnection) -> None:
        """Close a connection whose replies are of no use, so that the next ``connect`` opens another one."""
        connection.close()
        if connection is self._asked:
            self._asked, self._owed = None, 0
            self._early.clear()
        if self._connection is connection:
            self._connection = None
            self._gauge.set(0)

    def entries(
        self, user_ids: Sequence[int], values: Sequence[bytes | None], connection: CacheConnection
    ) -> list[Entry | None]:
        """What a piece's reply says of its users, in their order; None: a miss. Fetches patches that are not in memory.
        Raises as ``ask``."""
        found, older = self._decode(user_ids, values, connection.run_id)
        if older and (fetches := self._lay_patches(found, older)):
            try:
                self._fetch(fetches, connection)
            except (RedisError, OSError) as error:
                self.lose(connection)
                raise cache_unavailable() from error
            self._lay_fetched(found, older)
        return found

    def _command(self, user_ids: Sequence[int]) -> list[bytes | str | int | float]:
        # One command reads all shards of its server. A Redis Cluster would need one command for each shard, still with
        # the shard's generation in it.
        shards, prefixes = self._shard_count, self._prefixes
        return ["MGET", *self._generations, *[prefixes[user_id % shards] + b"%d" % user_id for user_id in user_ids]]

    def _decode(
        self, user_ids: Sequence[int], values: Sequence[bytes | None], run_id: bytes
    ) -> tuple[list[Entry | None], list[OlderEntries]]:
        """The entries as they are stored, and for each shard those that are older than its newest patch."""
        shards = self._shard_count
        generations: dict[int, entries.Generation] = {}
        usable: list[bytes | None] = [None] * shards
        highest = 0
        for shard, value in zip(self._shards, values, strict=False):
            generation = entries.generation_of(value, run_id)
            if generation is not None:
                generations[shard] = generation
                usable[shard] = entries.prefix(generation.nonce)
                highest = max(highest, generation.newest)

        now_us = time.time_ns() // 1000
        of_users = values[len(self._shards) :]
        found = entries.decode_all(of_users, [usable[user_id % shards] for user_id in user_ids], now_us)

        # Without a patch, and for most entries with patches, this loop is all that patches cost.
        places = [place for place, entry in enumerate(found) if entry is not None and entry[EPOCH] < highest]
        by_shard: dict[int, list[int]] = {}
        for place in places:
            shard = user_ids[place] % shards
            if found[place][EPOCH] < generations[shard].newest:  # type: ignore[index]  # an entry, see above
                by_shard.setdefault(shard, []).append(place)
        return found, [OlderEntries(shard, generations[shard], now_us, places) for shard, places in by_shard.items()]

    def _fetch(self, fetches: Sequence[Fetch], connection: CacheConnection) -> None:
        """Get what patches need: one round trip."""
        if connection is not self._asked:
            # Lost, and replaced since; or nothing was asked for on it.
            raise ConnectionClosedError("the connection to the cache was replaced")
        connection.send([fetch.command for fetch in fetches])
        # Replies come in the order of the commands: first those to later pieces, which have been sent already.
        while self._owed:
            self._early.append(connection.receive())
            self._owed -= 1
        replies = [connection.receive() for _ in fetches]
        for fetch, reply in zip(fetches, replies, strict=True):
            fetch.take(reply)

    def _lay_patches(self, found: list[Entry | None], older: Sequence[OlderEntries]) -> list[Fetch]:
        """Bring older entries up to date with the patches in memory. Returns what must be fetched for the rest, and
        leaves the places of the rest in ``older``."""
        fetches = []
        for each in older:
            self._patches.lay_all(found, each)
            if each.places:
                rest = [entry for place in each.places if (entry := found[place]) is not None]
                fetches += self._patches.fetches(self._client.keys, each.shard, each.generation, rest)
        return fetches

    def _lay_fetched(self, found: list[Entry | None], older: Sequence[OlderEntries]) -> None:
        """Bring the rest up to date with what was fetched; an entry that still cannot be is a miss."""
        for each in older:
            if each.places:
                self._patches.lay_all(found, each)
            for place in each.places:
                found[place] = None
        metrics.patch_chunk_bytes.set(self._patches.bytes_used)
