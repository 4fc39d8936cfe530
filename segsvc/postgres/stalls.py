"""Servers that hang: they neither answer nor close the connection, so a client would wait for ever.

The server itself enforces the bounds of a session, and this driver cannot wait with a bound of its own. So a watch
checks whether the transactions of a database make progress. If none does for a while, the watch tries to connect, which
has a bound. If that attempt times out, the server is taken to hang, and the connections to it are cut. The threads that
wait then get the error that they would get from a server that died. Until an attempt of the watch succeeds, new calls
get that error at once. A statement that is merely slow is left alone: its server accepts connections.
"""

from __future__ import annotations

import os
import socket
import threading
import time
from collections.abc import Mapping
from contextlib import suppress
from typing import Any, Final

import psycopg2
import sqlalchemy as sa
from sqlalchemy import event, pool

from segsvc.log import get_logger
from segsvc.postgres.engine import Databases

log = get_logger(__name__)

LOOK_EVERY_S: Final = 0.25
SUSPECT_AFTER_S: Final = 1.0
"""How long no transaction may make progress before a connection is tried."""


class StallWatch:
    """Watches the databases of one process. To be made after the last fork.

    Args:
        connect_timeout_s: how long a server may take to let a connection in; 2 at least, or the driver makes it 2.
    """

    def __init__(self, databases: Databases, connect_timeout_s: int) -> None:
        engines = {"catalog": databases.catalog}
        engines |= {f"shard {shard}": engine for shard, engine in enumerate(databases.shards)}
        self._closing = threading.Event()
        timeout_s = max(2, connect_timeout_s)
        self._watched = [_Watched(name, engine, timeout_s, self._closing) for name, engine in engines.items()]
        self._thread = threading.Thread(target=self._run, name="stall-watch", daemon=True)
        self._thread.start()

    def close(self) -> None:
        """End the watch. To be called before the databases are closed."""
        self._closing.set()
        self._thread.join()

    def _run(self) -> None:
        while not self._closing.wait(LOOK_EVERY_S):
            for watched in self._watched:
                watched.look(time.monotonic())


class _Watched:
    """One database."""

    def __init__(self, name: str, engine: sa.Engine, connect_timeout_s: int, closing: threading.Event) -> None:
        self._name = name
        self._closing = closing
        self._pool = engine.pool
        self._connect_timeout_s = connect_timeout_s
        _, connect_args = engine.dialect.create_connect_args(engine.url)
        self._connect_args: Mapping[str, Any] = {**connect_args, "connect_timeout": connect_timeout_s}

        # A second handle of each connection's socket. It stays ours until we close it, and no other file gets its
        # number. With the driver's own handle we could shut down another file that was opened under the same number.
        self._sockets: dict[int, socket.socket] = {}
        self._lock = threading.Lock()
        self._steps = 0
        self._seen = (-1, 0.0)
        self._probing = False
        self._hangs = False

        event.listen(engine, "do_connect", self._connecting)
        event.listen(engine, "connect", self._connected)
        event.listen(engine, "close", self._closed)
        # Not "checkout": a checkout sends nothing to the server, so it shows no progress.
        event.listen(engine, "checkin", self._stepped)

    def look(self, now: float) -> None:
        """Start a probe if a connection has been in use for too long and no transaction has made progress meanwhile."""
        busy = isinstance(self._pool, pool.QueuePool) and self._pool.checkedout() > 0
        if not busy or self._steps != self._seen[0]:
            self._seen = (self._steps, now)
        elif now - self._seen[1] >= SUSPECT_AFTER_S and not self._probing:
            self._probing = True
            try:
                threading.Thread(target=self._probe, name="stall-probe", daemon=True).start()
            except RuntimeError:  # no room for another thread: the next look tries again, and the watch goes on
                self._probing = False
                log.warning("stall_not_looked_into", database=self._name)

    def _probe(self) -> None:
        """If the server hangs, cut its connections; then probe again until it answers."""
        try:
            while self._is_silent() and not self._closing.is_set():
                if not self._hangs:
                    self._hangs = True
                    self._cut()
        finally:
            self._hangs = False
            self._steps += 1  # the next look starts to count from here
            self._probing = False

    def _is_silent(self) -> bool:
        begun = time.monotonic()
        try:
            psycopg2.connect(**self._connect_args).close()
        except psycopg2.Error:
            # Refused at once: the server is down, and the broken connections tell the waiting threads. Only silence is
            # a stall.
            return time.monotonic() - begun >= self._connect_timeout_s * 0.9
        return False

    def _cut(self) -> None:
        with self._lock:
            sockets = list(self._sockets.values())
            for each in sockets:
                with suppress(OSError):  # the other end has closed it already
                    each.shutdown(socket.SHUT_RDWR)
        log.warning("database_hangs", database=self._name, connections=len(sockets))

    def _connecting(self, *_: object) -> None:
        """While the server hangs, refuse new connections at once: no thread needs an attempt of its own to know."""
        if self._hangs:
            raise psycopg2.OperationalError("the server hangs")

    def _stepped(self, *_: object) -> None:
        self._steps += 1

    def _connected(self, connection: Any, _: object) -> None:
        self._steps += 1
        with self._lock:
            self._sockets[id(connection)] = socket.socket(fileno=os.dup(connection.fileno()))

    def _closed(self, connection: Any, _: object) -> None:
        with self._lock:
            handle = self._sockets.pop(id(connection), None)
        if handle is not None:
            handle.close()
