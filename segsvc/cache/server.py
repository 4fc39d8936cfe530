"""One cache server as its users see it: a small pool of connections, and whether the server is down.

Each server is judged by itself: one that is down or hangs delays only the steps of the shards that it holds.
"""

from __future__ import annotations

import threading
import time
from collections.abc import Callable, Iterator
from contextlib import contextmanager
from urllib.parse import urlsplit

from redis.exceptions import RedisError
from redis.exceptions import TimeoutError as RedisTimeoutError

from segsvc.cache.connection import CacheConnection
from segsvc.domain.errors import ServiceError, cache_unavailable
from segsvc.log import get_logger

log = get_logger(__name__)

Connect = Callable[[str, float], CacheConnection]
"""Opens a connection: URL, and the longest wait in seconds. Raises RedisError or OSError."""


def server_name(url: str) -> str:
    """How logs, metrics and findings name the server of a URL: without user, password and options."""
    parts = urlsplit(url)
    if parts.scheme == "unix":
        return parts.path
    host = parts.hostname or "localhost"
    database = "" if parts.path in ("", "/", "/0") else parts.path
    return f"{f'[{host}]' if ':' in host else host}:{parts.port or 6379}{database}"


class CacheServer:
    """Safe for any number of threads. Create it after the last fork of a process.

    Args:
        timeout_s: longest time for connecting, and for each wait for the server.
        retry_s: time between a failure and the next attempt; until then every step fails at once.

    Attributes:
        name: host and port, for people.
        turn: held by a client that leaves the server alone between its calls, for a call and the pause after it.
    """

    _IDLE_MAX = 16

    def __init__(self, url: str, *, timeout_s: float, retry_s: float, connect: Connect) -> None:
        self.name = server_name(url)
        self.turn = threading.Lock()
        self._url = url
        self._timeout_s = timeout_s
        self._retry_s = retry_s
        self._connect = connect
        self._lock = threading.Lock()
        self._idle: list[CacheConnection] = []
        self._down = False
        self._retry_at = 0.0

    def connect(self) -> CacheConnection:
        """A new connection that belongs to the caller. Raises CACHE_UNAVAILABLE."""
        try:
            return self._connect(self._url, self._timeout_s)
        except (RedisError, OSError) as error:
            raise cache_unavailable() from error

    def close(self) -> None:
        """Close the idle connections; a connection in use is closed when it is given back."""
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
            # The idle connections probably lead to the same dead server, so close them all instead of trying each.
            connection.close()
            self.close()
            if isinstance(error, RedisTimeoutError | TimeoutError):
                self._mark_down()  # it hangs: the next caller must not wait for it as well
            raise cache_unavailable() from error
        except BaseException:
            # Replies may still be on their way: the next caller would take them for its own.
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
            # Nothing was sent on it yet, so using another connection loses nothing and repeats nothing.
            connection.close()

    def _connect_again(self) -> CacheConnection:
        """Connect. While the server is down only one caller at a time tries; all other callers fail at once.

        With a server that does not answer, each attempt takes the whole timeout; reads must not wait one after another.
        """
        with self._lock:
            if self._down:
                now = time.monotonic()
                if now < self._retry_at:
                    raise cache_unavailable()
                self._retry_at = now + self._timeout_s + self._retry_s

        try:
            connection = self.connect()
        except ServiceError:
            self._mark_down()
            raise

        with self._lock:
            if self._down:
                log.info("cache_back", server=self.name)
            self._down = False
        return connection

    def _mark_down(self) -> None:
        with self._lock:
            if not self._down:
                log.warning("cache_down", server=self.name)
            self._down, self._retry_at = True, time.monotonic() + self._retry_s
