"""The cache as the rest of the service uses it: the protocol's steps, each on the server that holds the shard.

Any error of the server or of a connection becomes ``CACHE_UNAVAILABLE``. The caller then does not know whether the
step took effect, and is safe either way: reads go on without the cache, changes are not acknowledged.
"""

from __future__ import annotations

import random
import secrets
import time
from collections.abc import Callable, Sequence
from contextlib import AbstractContextManager
from itertools import repeat
from typing import Any, Final, TypeVar

from segsvc import metrics
from segsvc.cache import entry as entries
from segsvc.cache import patches, scripts
from segsvc.cache.connection import CacheConnection, Command
from segsvc.cache.keys import Keys
from segsvc.cache.server import CacheServer, Connect
from segsvc.domain.errors import ServiceError, cache_unavailable
from segsvc.domain.membership import NEVER_US, READ_TIME, VALID_UNTIL, Entry, EntryColumns, Grant
from segsvc.domain.patch import Patch
from segsvc.twophase.ports import Published

KEYS_PER_CALL: Final = 128
"""Most keys that one script call touches: while a call runs, the server answers no reads; here for about 0.5 ms."""

PATCHES_MAX: Final = 64
"""Patches in a shard's list, unless the settings say otherwise."""

_PATCH_CHUNKS_AT_ONCE: Final = 64
"""Chunks of a patch that are sent together: some 0.5 MB, which the server takes in within a millisecond."""

_TTL_JITTER: Final = 0.1
"""Entries that are filled together expire at different times, within the last tenth of their life."""

T = TypeVar("T")
Clock = Callable[[], int]


def _now_us() -> int:
    return time.time_ns() // 1000


class CacheClient:
    """The steps of the cache protocol. Safe for any number of threads. Create it after the last fork of a process.

    Args:
        url: of the cache's server; several URLs: of each shard's server, by shard.
        find_keys: returns the names of this installation's keys. It is called again until it has returned them; while
            it raises a ServiceError, the cache counts as unreachable.
        timeout_s: longest time for connecting, and for each wait for the server.
        ttl_s: life of an entry.
        now_us: the wall clock, microseconds since 1970.
        rest: for a client that leases and fills many users while other clients wait for reads: how long it leaves a
            server alone after each call, as a multiple of the time that the call took. 0: no pauses, all calls are
            sent together.
        also: URLs of servers that changes must reach besides, by shard; empty: there are none.
        connect: opens a connection.
        patches_max: most patches in a shard's list; the oldest falls out, and entries that need it are misses.
    """

    RETRY_S = 0.1
    """Time between a server's failure and the next attempt; until then every step at that server fails at once."""

    def __init__(
        self,
        url: str | Sequence[str],
        *,
        find_keys: Callable[[], Keys],
        timeout_s: float,
        ttl_s: int,
        now_us: Clock = _now_us,
        rest: float = 0.0,
        also: Sequence[str] = (),
        connect: Connect = CacheConnection,
        patches_max: int = PATCHES_MAX,
    ) -> None:
        self._find_keys = find_keys
        self._keys: Keys | None = None
        self._ttl_ms = ttl_s * 1000
        self._now_us = now_us
        self._rest = rest
        self._patches_max = patches_max

        by_shard = () if isinstance(url, str) else url
        urls = [url] if isinstance(url, str) else by_shard
        made = {
            each: CacheServer(each, timeout_s=timeout_s, retry_s=self.RETRY_S, connect=connect)
            for each in dict.fromkeys([*urls, *also])
        }
        self._all = tuple(made.values())
        self._servers = tuple(made[each] for each in dict.fromkeys(urls))
        # Empty: one server holds every shard.
        self._by_shard = [made[each] for each in by_shard]
        self._also_by_shard = [made[each] for each in also]

    @property
    def keys(self) -> Keys:
        """Names of this installation's keys. Raises CACHE_UNAVAILABLE if they are not known yet."""
        if self._keys is None:
            try:
                self._keys = self._find_keys()
            except ServiceError as error:
                raise cache_unavailable() from error
        return self._keys

    # -- changes ----------------------------------------------------------------------------------------------------

    def bar(self, shard: int, user_id: int) -> bytes:
        """Before the COMMIT of a change of one user: make the entry a miss and keep it one. Returns the bar's token.

        Raises:
            ServiceError: CACHE_UNAVAILABLE.
        """
        token = _token()
        for server in self._holders(shard):
            with server.connection() as connection:
                connection.run("SET", self.keys.user(shard, user_id), b"B" + token, "PX", scripts.BAR_MS)
        return token

    def drop_entries(self, shard: int, user_ids: Sequence[int], token: bytes | None = None) -> None:
        """After the COMMIT of changes of users, before they are acknowledged: drop the users' entries, so that later
        reads find what is newer.

        Args:
            token: of this writer's ``bar``; None: the changes were made without one. Another writer's bar stays.

        Raises:
            ServiceError: CACHE_UNAVAILABLE: some entries may still be there, so the changes must not be acknowledged.
        """
        own = token or _token()
        calls = [
            _call(scripts.DROP_ENTRIES, self.keys.users(shard, chunk), [own])
            for chunk in _chunks(user_ids, KEYS_PER_CALL)
        ]
        for server in self._holders(shard) if calls else ():
            with server.connection() as connection:
                connection.run_all(calls)

    @property
    def entries_gone_after_s(self) -> float:
        """How long after a change the cache can still hold an entry that was read before the change: the life of a
        lease that was granted just before it, then the life of the entry that was filled under that lease.

        A hundredth is added, because the cache's clock ends entries and another clock measures this time.
        """
        return 1.01 * (scripts.LEASE_MS + self._ttl_ms) / 1000

    def write_patch(self, shard: int, patch: Patch) -> bytes:
        """After the COMMIT of a bulk change: write a patch's chunks. Readers know nothing of them until
        ``append_patch``. Returns the token of this publication, which is in their names.

        Raises:
            ServiceError: CACHE_UNAVAILABLE, also if the server has no memory for them; what was written expires.
        """
        token = patches.new_token()
        keys = self.keys
        # As long as any entry that needs it: an entry lives no longer, and is leased before this patch is appended.
        life_ms = scripts.LEASE_MS + self._ttl_ms
        chunks = list(patches.encode_chunks(patch))
        calls: list[Command] = [
            ("SET", keys.chunk(shard, token, number), chunk, "PX", life_ms) for number, chunk in enumerate(chunks)
        ]
        for server in self._holders(shard):
            with server.connection() as connection:
                for part in _chunks(calls, _PATCH_CHUNKS_AT_ONCE):
                    connection.run_all(part)
            metrics.patch_bytes.inc(sum(map(len, chunks)))
        return token

    def append_patch(self, shard: int, patch: Patch, token: bytes) -> Published:
        """After ``write_patch``, before the bulk change is reported done: make readers lay the patch over all entries
        of earlier epochs. It can be repeated, also by a twin with a token of its own, and does no harm when it is late.
        Returns how it ended at the server that reads are sent to.

        Raises:
            ServiceError: CACHE_UNAVAILABLE: whether it took effect is unknown.
        """
        item = patches.encode_note(patches.note_of(patch, token))
        g, p = self.keys.generation(shard), self.keys.patches(shard)
        ends = []
        for server in self._holders(shard):
            with server.connection() as connection:
                args = [connection.run_id, b"%d" % patch.epoch, item, b"%d" % self._patches_max]
                append = _call(scripts.APPEND_PATCH, [g, p], args)
                # MGET: a foreign value of another type is none, and no error.
                [before], reply, [after] = connection.run_all([("MGET", p), append, ("MGET", p)])
                ends.append(Published(reply.decode()))
                metrics.patches.labels(ends[-1].value).inc()

                # Chunks of what fell out of the list take memory, and nothing needs them: a reader that still has the
                # list of before takes a lost chunk for a miss.
                fallen = patches.tokens_of(before) - patches.tokens_of(after)
                if ends[-1] is Published.APPENDED and fallen:
                    numbers = range(patches.chunk_count(patch.slots))
                    connection.run("DEL", *(self.keys.chunk(shard, each, n) for each in fallen for n in numbers))
        return ends[0]

    def drop_generations(self, shards: Sequence[int]) -> None:
        """After the COMMIT of a bulk change, before it is reported done: make every entry of these shards a miss.

        It can be repeated, and does no harm when it is late: the next miss creates a new nonce. A server that is out of
        reach keeps no other server's shards from being dropped.

        Raises:
            ServiceError: CACHE_UNAVAILABLE: some shards may still have hits.
        """
        on_server: dict[CacheServer, list[int]] = {}
        for shard in shards:
            for server in self._holders(shard):
                on_server.setdefault(server, []).append(shard)

        keys = self.keys
        first_error: ServiceError | None = None
        for server, held in on_server.items():
            try:
                with server.connection() as connection:
                    connection.run_all([("DEL", keys.generation(shard), keys.patches(shard)) for shard in held])
            except ServiceError as error:
                first_error = first_error or error
        if first_error is not None:
            raise first_error

    # -- loads ------------------------------------------------------------------------------------------------------

    def acquire(self, shard: int, user_ids: Sequence[int], *, enough: int | None = None) -> Grant:
        """Ask to fill users of one shard. The shard is read only after this has returned.

        No lease is granted for a user whose key holds a usable value that is new enough, another load's lease or a
        writer's bar.

        Args:
            enough: from which epoch on a value is new enough for the caller. None: from that of the newest patch. This
                is for readers, who come after a miss: a value that is older may have missed for want of a patch.

        Raises:
            ServiceError: CACHE_UNAVAILABLE.
        """
        token = _token()
        lease_ms, now_us = scripts.LEASE_MS, self._now_us()

        with self.connection(shard) as connection:
            args = [token, b"%d" % lease_ms, b"%d" % now_us, entries.FORMAT, b"" if enough is None else b"%d" % enough]
            g = self.keys.generation(shard)
            chunks = _chunks(user_ids, KEYS_PER_CALL)
            replies = self._in_turn(
                shard,
                connection,
                [
                    # Each call offers its own new nonce: if the generation is dropped between two calls, the second
                    # call must not bring it back, with the entries that other loads have filled under it since.
                    _call(
                        scripts.ACQUIRE,
                        [g, *self.keys.users(shard, chunk)],
                        [connection.run_id, secrets.token_bytes(entries.NONCE_BYTES), *args],
                    )
                    for chunk in chunks
                ],
            )

            # The generation may change between two calls of a batch. Only leases under the last nonce are kept: an
            # entry with an older nonce would be a miss from the start. The older leases are given back.
            nonce: bytes = replies[-1][0] if replies else b""
            granted: list[int] = []
            outdated: list[int] = []
            busy = 0
            for chunk, (chunk_nonce, flags, _) in zip(chunks, replies, strict=True):
                given = [user_id for user_id, flag in zip(chunk, flags, strict=True) if flag == ord("1")]
                (granted if chunk_nonce == nonce else outdated).extend(given)
                busy += flags.count(b"2")

            if outdated:
                connection.run_all(
                    [
                        _call(scripts.RELEASE, self.keys.users(shard, chunk), [token])
                        for chunk in _chunks(outdated, KEYS_PER_CALL)
                    ]
                )

        newest = replies[-1][2] if replies else 0
        return Grant(nonce, token, frozenset(granted), busy + len(outdated), newest)

    def fill(self, shard: int, grant: Grant, rows: Sequence[tuple[int, Entry]]) -> int:
        """Store what was read under a grant. The rows hold granted users only. Returns how many entries were stored.

        Raises:
            ServiceError: CACHE_UNAVAILABLE.
        """
        return self._fill(
            shard,
            grant,
            [
                (user_id, entries.encode(grant.nonce, entry), entry[VALID_UNTIL], entry[READ_TIME])
                for user_id, entry in rows
            ],
        )

    def fill_columns(self, shard: int, grant: Grant, columns: EntryColumns) -> int:
        """As ``fill``, for many users at once, which the warmer needs."""
        values = entries.encode_columns(grant.nonce, columns)
        read_times_us = repeat(columns.read_time_us)
        users = zip(columns.user_ids.tolist(), values, columns.valid_until_us.tolist(), read_times_us, strict=False)
        return self._fill(shard, grant, list(users))

    def release(self, shard: int, grant: Grant, user_ids: Sequence[int]) -> None:
        """Give leases back without a fill: a user who does not exist is never cached. Raises CACHE_UNAVAILABLE."""
        calls = [
            _call(scripts.RELEASE, self.keys.users(shard, chunk), [grant.token])
            for chunk in _chunks(user_ids, KEYS_PER_CALL)
        ]
        if calls:
            with self.connection(shard) as connection:
                connection.run_all(calls)

    def _fill(self, shard: int, grant: Grant, users: Sequence[tuple[int, bytes, int, int]]) -> int:
        """Fill users: id, value, valid_until_us and read_time_us of each.

        All entries of one script call have the same life, so a user with a valid_until of its own gets its own call.
        """
        lasting = [user for user in users if user[2] == NEVER_US]
        ending = [user for user in users if user[2] != NEVER_US]
        calls = []

        for chunk in [*_chunks(lasting, KEYS_PER_CALL), *_chunks(ending, 1)]:
            user_ids, values, valid_until_us, read_time_us = zip(*chunk, strict=True)
            # Both times are by the shard's clock, so a difference between machines' clocks cannot lengthen a life.
            left_ms = (valid_until_us[0] - read_time_us[0]) // 1000
            life_ms = max(1, min(int(self._ttl_ms * (1 - _TTL_JITTER * random.random())), left_ms))
            calls.append(_call(scripts.FILL, self.keys.users(shard, user_ids), [grant.token, b"%d" % life_ms, *values]))

        if not calls:
            return 0
        with self.connection(shard) as connection:
            return sum(self._in_turn(shard, connection, calls))

    def _in_turn(self, shard: int, connection: CacheConnection, calls: Sequence[Command]) -> list[Any]:
        """Replies to the calls of one step, with the pauses that leave the shard's server to other clients."""
        if not self._rest:
            return connection.run_all(calls)

        replies = []
        turn = self.server_of(shard).turn
        for call in calls:
            # The lock is held during the pause: the pause is for other clients, so no thread of this one may use it.
            with turn:
                begun = time.monotonic()
                replies.append(connection.run(*call))
                time.sleep(self._rest * (time.monotonic() - begun))
        return replies

    # -- servers ----------------------------------------------------------------------------------------------------

    @property
    def servers(self) -> Sequence[CacheServer]:
        """Every server that holds shards, once, in the order of the first shard that each holds."""
        return self._servers

    def server_of(self, shard: int) -> CacheServer:
        """The server that holds a shard's keys."""
        return self._by_shard[shard] if self._by_shard else self._servers[0]

    def connection(self, shard: int) -> AbstractContextManager[CacheConnection]:
        """A connection to the shard's server, for one thread and one exchange. Errors inside become
        CACHE_UNAVAILABLE."""
        return self.server_of(shard).connection()

    def close(self) -> None:
        """Close the idle connections; a connection in use is closed when it is given back."""
        for server in self._all:
            server.close()

    def _holders(self, shard: int) -> Sequence[CacheServer]:
        """The servers in which a change of this shard must be dropped: the shard's own, and while the servers are being
        changed the one that another process may still read, or read already."""
        own = self.server_of(shard)
        also = self._also_by_shard[shard] if self._also_by_shard else own
        return (own,) if also is own else (own, also)


def _token() -> bytes:
    return secrets.token_hex(8).encode()


def _chunks(items: Sequence[T], size: int) -> list[Sequence[T]]:
    return [items[first : first + size] for first in range(0, len(items), size)]


def _call(script: scripts.Script, script_keys: Sequence[bytes], args: Sequence[bytes]) -> list[bytes | str | int]:
    return ["EVALSHA", script.sha, len(script_keys), *script_keys, *args]
