"""The cache as the rest of the service uses it: the protocol's steps, on a small pool of connections.

Any error of the server or of a connection becomes ``CACHE_UNAVAILABLE``; whether the step took effect is then
unknown, and every caller is safe either way: reads go on without the cache, changes are not acknowledged.
"""

from __future__ import annotations

import random
import secrets
import threading
import time
from collections.abc import Callable, Iterator, Sequence
from contextlib import contextmanager
from itertools import repeat
from typing import Any, Final, TypeVar

from redis.exceptions import RedisError
from redis.exceptions import TimeoutError as RedisTimeoutError

from segsvc.cache import entry as entries
from segsvc.cache import scripts
from segsvc.cache.connection import CacheConnection, Command
from segsvc.cache.keys import Keys
from segsvc.domain.errors import ServiceError, cache_unavailable
from segsvc.domain.membership import NEVER_US, READ_TIME, VALID_UNTIL, Entry, EntryColumns, Grant
from segsvc.log import get_logger

log = get_logger(__name__)

KEYS_PER_CALL: Final = 128
"""Keys a script call touches at most: a call keeps the server from answering reads, here for about 0.5 ms."""

_TTL_JITTER: Final = 0.1
"""Entries filled together end spread over the last tenth of their life, not all at once."""

T = TypeVar("T")
Clock = Callable[[], int]


def _now_us() -> int:
    return time.time_ns() // 1000


class CacheClient:
    """The steps of the cache protocol. For any number of threads; made after the last fork of a process.

    Args:
        url: of the cache's server.
        find_keys: gives the names of this installation's keys. Asked until it does; while it raises a ServiceError,
            the cache counts as out of reach.
        timeout_s: bound of connecting and of each wait for the server.
        ttl_s: life of an entry.
        now_us: the wall clock, microseconds since 1970.
        rest: for whoever leases and fills many users while others wait for reads: how long to leave the server alone
            after each call, in times of what the call took. 0: calls go out together.
    """

    RETRY_S = 0.1
    """How long after a failure the next attempt is made; until then every step fails at once."""
    _IDLE_MAX = 16

    def __init__(
        self,
        url: str,
        *,
        find_keys: Callable[[], Keys],
        timeout_s: float,
        ttl_s: int,
        now_us: Clock = _now_us,
        rest: float = 0.0,
    ) -> None:
        self._url = url
        self._find_keys = find_keys
        self._keys: Keys | None = None
        self._timeout_s = timeout_s
        self._ttl_ms = ttl_s * 1000
        self._now_us = now_us
        self._rest = rest
        self._turn = threading.Lock()
        self._lock = threading.Lock()
        self._idle: list[CacheConnection] = []
        self._down = False
        self._retry_at = 0.0

    @property
    def keys(self) -> Keys:
        """Names of this installation's keys. Raises CACHE_UNAVAILABLE: they are not known yet."""
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
        with self.connection() as connection:
            connection.run("SET", self.keys.user(shard, user_id), b"B" + token, "PX", scripts.BAR_MS)
        return token

    def drop_entries(self, shard: int, user_ids: Sequence[int], token: bytes | None = None) -> None:
        """After the COMMIT of changes of users, before they are acknowledged: what later reads find is newer.

        Args:
            token: of the own ``bar``; None: the changes were made without one. Another writer's bar stays.

        Raises:
            ServiceError: CACHE_UNAVAILABLE: some may not be done, and the changes may not be acknowledged.
        """
        own = token or _token()
        calls = [
            _call(scripts.DROP_ENTRIES, self.keys.users(shard, chunk), [own])
            for chunk in _chunks(user_ids, KEYS_PER_CALL)
        ]
        if calls:
            with self.connection() as connection:
                connection.run_all(calls)

    @property
    def entries_gone_after_s(self) -> float:
        """How long after a change an entry that was read before it can still be there: a lease that was given before
        the change, then the life of what was filled under it.

        A hundredth more, because the cache's clock ends them and another clock measures this time.
        """
        return 1.01 * (scripts.LEASE_MS + self._ttl_ms) / 1000

    def drop_generations(self, shards: Sequence[int]) -> None:
        """After the COMMIT of a bulk change, before it is reported done: every entry of these shards is a miss.

        Idempotent, and harmless when late: the next miss draws a fresh nonce.

        Raises:
            ServiceError: CACHE_UNAVAILABLE: some shards may still have hits.
        """
        with self.connection() as connection:
            connection.run_all([("DEL", self.keys.generation(shard)) for shard in shards])

    # -- loads ------------------------------------------------------------------------------------------------------

    def acquire(self, shard: int, user_ids: Sequence[int]) -> Grant:
        """Ask to fill users of one shard. The shard is read only after this has returned.

        Not granted for users whose entry is in use, leased to another load or barred by a writer.

        Raises:
            ServiceError: CACHE_UNAVAILABLE.
        """
        token = _token()
        lease_ms, now_us = scripts.LEASE_MS, self._now_us()
        with self.connection() as connection:
            args = [token, b"%d" % lease_ms, b"%d" % now_us, entries.FORMAT]
            g = self.keys.generation(shard)
            chunks = _chunks(user_ids, KEYS_PER_CALL)
            replies = self._in_turn(
                connection,
                [
                    # A nonce of its own for each call: if the generation is dropped between two of them, the second
                    # must not bring it back, with entries that others have filled under it since.
                    _call(
                        scripts.ACQUIRE,
                        [g, *self.keys.users(shard, chunk)],
                        [connection.run_id, secrets.token_bytes(entries.NONCE_BYTES), *args],
                    )
                    for chunk in chunks
                ],
            )
            # The generation may change between two calls of a batch. Only what was granted under the last one is
            # kept: an entry with an older nonce would be a miss from the start. The other leases are given back.
            nonce: bytes = replies[-1][0] if replies else b""
            granted: list[int] = []
            outdated: list[int] = []
            busy = 0
            for chunk, (chunk_nonce, flags) in zip(chunks, replies, strict=True):
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
        return Grant(nonce, token, frozenset(granted), busy + len(outdated))

    def fill(self, shard: int, grant: Grant, rows: Sequence[tuple[int, Entry]]) -> int:
        """Store what was read under a grant; users not granted must not be among them. Returns how many were stored.

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
        """As ``fill``, for the warmer's many users at once."""
        values = entries.encode_columns(grant.nonce, columns)
        read_times_us = repeat(columns.read_time_us)
        users = zip(columns.user_ids.tolist(), values, columns.valid_until_us.tolist(), read_times_us, strict=False)
        return self._fill(shard, grant, list(users))

    def release(self, shard: int, grant: Grant, user_ids: Sequence[int]) -> None:
        """Give leases back without a fill (a user who does not exist is never cached). Raises CACHE_UNAVAILABLE."""
        calls = [
            _call(scripts.RELEASE, self.keys.users(shard, chunk), [grant.token])
            for chunk in _chunks(user_ids, KEYS_PER_CALL)
        ]
        if calls:
            with self.connection() as connection:
                connection.run_all(calls)

    def _fill(self, shard: int, grant: Grant, users: Sequence[tuple[int, bytes, int, int]]) -> int:
        """Fill users: id, value, valid_until_us and read_time_us of each. A call's users end together, so one whose
        end is set has a call of its own."""
        lasting = [user for user in users if user[2] == NEVER_US]
        ending = [user for user in users if user[2] != NEVER_US]
        calls = []
        for chunk in [*_chunks(lasting, KEYS_PER_CALL), *_chunks(ending, 1)]:
            user_ids, values, valid_until_us, read_time_us = zip(*chunk, strict=True)
            # Both times are the shard's, so no skew between machines can lengthen a life.
            left_ms = (valid_until_us[0] - read_time_us[0]) // 1000
            life_ms = max(1, min(int(self._ttl_ms * (1 - _TTL_JITTER * random.random())), left_ms))
            calls.append(_call(scripts.FILL, self.keys.users(shard, user_ids), [grant.token, b"%d" % life_ms, *values]))
        if not calls:
            return 0
        with self.connection() as connection:
            return sum(self._in_turn(connection, calls))

    def _in_turn(self, connection: CacheConnection, calls: Sequence[Command]) -> list[Any]:
        """Replies to the calls of one step, with the rests that this client owes to others."""
        if not self._rest:
            return connection.run_all(calls)
        replies = []
        for call in calls:
            # The lock is held through the rest: it is owed to other clients, whichever thread of ours is next.
            with self._turn:
                begun = time.monotonic()
                replies.append(connection.run(*call))
                time.sleep(self._rest * (time.monotonic() - begun))
        return replies

    # -- connections ------------------------------------------------------------------------------------------------

    def connect(self) -> CacheConnection:
        """A connection of the caller's own. Raises CACHE_UNAVAILABLE."""
        try:
            return CacheConnection(self._url, self._timeout_s)
        except (RedisError, OSError) as error:
            raise cache_unavailable() from error

    def close(self) -> None:
        """Close what is idle; a connection in use is closed when it comes back."""
        with self._lock:
            idle, self._idle = self._idle, []
        for connection in idle:
            connection.close()

    @contextmanager
    def connection(self) -> Iterator[CacheConnection]:
        """A connection of the pool, for one thread and one exchange. Errors inside become CACHE_UNAVAILABLE."""
        connection = self._take()
        try:
            yield connection
        except (RedisError, OSError) as error:
            # One failed, so the others are likely to be of the same dead server. They are not tried one by one.
            connection.close()
            self.close()
            if isinstance(error, RedisTimeoutError | TimeoutError):
                self._mark_down()  # it hangs: the next caller must not wait for it as well
            raise cache_unavailable() from error
        except BaseException:
            connection.close()
            raise
        with self._lock:
            if len(self._idle) < self._IDLE_MAX:
                self._idle.append(connection)
                return
        connection.close()

    def _take(self) -> CacheConnection:
        while True:
            with self._lock:
                connection = self._idle.pop() if self._idle else None
            if connection is None:
                return self._connect_again()
            if connection.idle_and_alive():
                return connection
            # Nothing was sent on it yet, so nothing is lost or doubled by going on with another one.
            connection.close()

    def _connect_again(self) -> CacheConnection:
        """Connect, but while the server is down only one caller at a time tries: the others fail at once.

        A server that does not answer costs each attempt the whole timeout; reads must not wait for it one by one.
        """
        with self._lock:
            if self._down:
                now = time.monotonic()
                if now < self._retry_at:
                    raise cache_unavailable()
                self._retry_at = now + self._timeout_s + self.RETRY_S
        try:
            connection = self.connect()
        except ServiceError:
            self._mark_down()
            raise
        with self._lock:
            if self._down:
                log.info("cache_back")
            self._down = False
        return connection

    def _mark_down(self) -> None:
        with self._lock:
            if not self._down:
                log.warning("cache_down")
            self._down, self._retry_at = True, time.monotonic() + self.RETRY_S


def _token() -> bytes:
    return secrets.token_hex(8).encode()


def _chunks(items: Sequence[T], size: int) -> list[Sequence[T]]:
    return [items[first : first + size] for first in range(0, len(items), size)]


def _call(script: scripts.Script, script_keys: Sequence[bytes], args: Sequence[bytes]) -> list[bytes | str | int]:
    return ["EVALSHA", script.sha, len(script_keys), *script_keys, *args]
