"""Reads users' entries from several cache servers at once: one round trip to each, all under way together."""

from __future__ import annotations

from collections import deque
from collections.abc import Generator, Sequence
from contextlib import closing

from segsvc.cache.client import CacheClient
from segsvc.cache.connection import CacheConnection
from segsvc.cache.patch_store import PatchStore
from segsvc.cache.reader import COMMANDS_AHEAD, CacheReader
from segsvc.domain.errors import ServiceError, cache_unavailable
from segsvc.domain.membership import Entry
from segsvc.log import get_logger

log = get_logger(__name__)


def make_reader(
    client: CacheClient, shard_count: int, *, partial: bool, patches: PatchStore
) -> CacheReader | CacheReaders:
    """The reader for a client's servers.

    Args:
        partial: with several servers, one that is out of reach makes its users misses; False: it is an error.
        patches: the reading thread's own.
    """
    if len(client.servers) == 1:
        return CacheReader(client, shard_count, patches=patches)
    return CacheReaders(client, shard_count, partial=partial, patches=patches)


class _Part:
    """The users of one piece that one server holds, and the connection by which their entries come; None: by none."""

    __slots__ = ("connection", "places", "user_ids")

    def __init__(self) -> None:
        self.places: list[int] = []
        self.user_ids: list[int] = []
        self.connection: CacheConnection | None = None


_Piece = dict[CacheReader, _Part]


class CacheReaders:
    """A ``CacheReader`` for each server, which one thread reads as if it were one.

    Args:
        partial, patches: see ``make_reader``.
    """

    def __init__(self, client: CacheClient, shard_count: int, *, partial: bool, patches: PatchStore) -> None:
        self._partial = partial
        made = {server: CacheReader(client, shard_count, server, patches=patches) for server in client.servers}
        self._readers = tuple(made.values())
        self._by_shard = [made[client.server_of(shard)] for shard in range(shard_count)]

    @property
    def connected(self) -> bool:
        """Whether a lookup can find something."""
        return any(reader.connected for reader in self._readers)

    @property
    def complete(self) -> bool:
        """Whether there is nothing left to connect to."""
        return all(reader.connected for reader in self._readers)

    def connect(self) -> None:
        """Connect to each server that is not connected. Raises CACHE_UNAVAILABLE after the last one, if any failed."""
        first_error: ServiceError | None = None
        for reader in self._readers:
            if reader.connected:
                continue
            try:
                reader.connect()
            except ServiceError as error:
                first_error = first_error or error
            else:
                log.info("reads_from_cache_server", server=reader.name)
        if first_error is not None:
            raise first_error

    def close(self) -> None:
        for reader in self._readers:
            reader.close()

    def lookup(self, user_ids: Sequence[int]) -> list[Entry | None]:
        """As ``CacheReader.lookup``; the entries of one server are of one moment. Raises as ``lookups``."""
        with closing(self.lookups(user_ids, max(1, len(user_ids)))) as found:
            return next(found, [])

    def lookups(self, user_ids: Sequence[int], users_per_command: int) -> Generator[list[Entry | None]]:
        """As ``CacheReader.lookups``; of each piece, every server is sent its part before the first reply is awaited.

        Raises:
            ServiceError: CACHE_UNAVAILABLE, at any piece: unless ``partial``, if a server is out of reach.
        """
        pieces = [user_ids[first : first + users_per_command] for first in range(0, len(user_ids), users_per_command)]
        asked: deque[_Piece] = deque()

        try:
            for piece in pieces[:COMMANDS_AHEAD]:
                asked.append(self._ask(piece))
            for number, piece in enumerate(pieces):
                replies = [(reader, part, self._receive(reader, part)) for reader, part in asked[0].items()]
                asked.popleft()
                if number + COMMANDS_AHEAD < len(pieces):
                    asked.append(self._ask(pieces[number + COMMANDS_AHEAD]))
                yield self._joined(len(piece), replies)
        finally:
            # Replies that are still to come would be taken for its own by the next lookup.
            for parts in asked:
                for reader, part in parts.items():
                    if part.connection is not None:
                        reader.lose(part.connection)

    def _ask(self, user_ids: Sequence[int]) -> _Piece:
        """Send every server its part of a piece."""
        piece = self._split(user_ids)
        for reader, part in piece.items():
            if self._partial and not reader.connected:
                continue
            try:
                part.connection = reader.ask([part.user_ids])
            except ServiceError:
                self._lost(reader)
        return piece

    def _split(self, user_ids: Sequence[int]) -> _Piece:
        by_shard = self._by_shard
        shards = len(by_shard)
        piece: _Piece = {}
        for place, user_id in enumerate(user_ids):
            reader = by_shard[user_id % shards]
            part = piece.get(reader)
            if part is None:
                part = piece[reader] = _Part()
            part.places.append(place)
            part.user_ids.append(user_id)
        return piece

    def _receive(self, reader: CacheReader, part: _Part) -> Sequence[bytes | None] | None:
        """A part's values; None: its server is out of reach."""
        if part.connection is None:
            return None
        try:
            return reader.receive(part.connection)
        except ServiceError:
            self._lost(reader)
            return None

    def _joined(
        self, users: int, replies: Sequence[tuple[CacheReader, _Part, Sequence[bytes | None] | None]]
    ) -> list[Entry | None]:
        """The entries of a piece in the order of its users."""
        found: list[Entry | None] = [None] * users
        for reader, part, values in replies:
            if values is not None and part.connection is not None:
                try:
                    of_part = reader.entries(part.user_ids, values, part.connection)
                except ServiceError:  # while it fetched patches
                    self._lost(reader)
                    continue
                for place, entry in zip(part.places, of_part, strict=True):
                    found[place] = entry
        return found

    def _lost(self, reader: CacheReader) -> None:
        """What a server's failure means. Raises CACHE_UNAVAILABLE unless ``partial``."""
        if not self._partial:
            raise cache_unavailable()
        log.warning("reads_without_cache_server", server=reader.name)
