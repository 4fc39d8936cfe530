"""One connection to the cache's server that always knows which run of which server it talks to.

Entries are bound to the server's run_id. So INFO is the first command on every connection (after authentication),
and a connection never reconnects by itself: any error closes it for good and is raised, and the caller goes on with a
new connection, which asks for the run_id again. A silent reconnect could reach a server that came back with older
data, while its entries would still be compared with the old run_id. redis-py does URL, TLS, authentication and framing;
its retries are off.
"""

from __future__ import annotations

import os
from collections.abc import Sequence
from typing import Any

from hiredis import pack_command
from redis.connection import Connection as Transport
from redis.connection import SSLConnection, UnixDomainSocketConnection, parse_url

from segsvc.cache import scripts
from segsvc.cache.entry import RUN_ID_BYTES

Command = Sequence[bytes | str | int | float]


class ConnectionClosedError(OSError):
    """The connection was closed by an earlier error, or belongs to the parent process."""


class CacheConnection:
    """An open connection. One thread at a time may use it.

    Args:
        url: ``redis://``, ``rediss://`` or ``unix://``.
        timeout_s: longest time for connecting, and for each wait for the server.

    Raises:
        redis.RedisError, OSError: the server cannot be reached, or it refuses the connection.
    """

    def __init__(self, url: str, timeout_s: float) -> None:
        options: dict[str, Any] = parse_url(url)  # type: ignore[no-untyped-call]
        kind: type[Transport | UnixDomainSocketConnection] = options.pop(
            "connection_class", UnixDomainSocketConnection if "path" in options else Transport
        )
        if kind is not UnixDomainSocketConnection:
            options |= {"socket_keepalive": True}
            if issubclass(kind, SSLConnection):
                options.setdefault("ssl_cert_reqs", "required")

        # RESP2: the handshake of RESP3 takes more round trips, and the replies to our commands are the same.
        options |= {"protocol": 2, "socket_timeout": timeout_s, "socket_connect_timeout": timeout_s}
        options |= {"retry": None, "retry_on_error": [], "health_check_interval": 0, "driver_info": None}
        self._transport: Any = kind(**options)  # Any: redis-py leaves these methods without types
        self._owner_pid = os.getpid()
        self._open = True

        try:
            self._transport.connect()  # type: ignore[no-untyped-call]
            self.info = parse_info(self.run("INFO"))
            self.run_id = self.info["run_id"].encode()
            if len(self.run_id) != RUN_ID_BYTES:
                raise OSError(f"the cache's server has a run_id of {len(self.run_id)} bytes, not {RUN_ID_BYTES}")
            self.run_all([("SCRIPT", "LOAD", script.source) for script in scripts.ALL])
        except BaseException:
            # Nobody gets this connection, so nobody else would close its socket.
            self.close()
            raise

    @property
    def open(self) -> bool:
        return self._open

    def close(self) -> None:
        """Close for good. Safe to call twice."""
        self._open = False
        self._transport.disconnect()

    def run(self, *command: bytes | str | float) -> Any:
        """Send one command and return its reply, with texts as bytes.

        Raises:
            redis.RedisError, OSError: it failed, or whether it took effect is unknown. The connection is closed.
        """
        return self.run_all((command,))[0]

    def run_all(self, commands: Sequence[Command]) -> list[Any]:
        """Send commands together and return their replies in order. Raises as ``run``, also if one of them fails."""
        self.send(commands)
        return [self.receive() for _ in commands]

    def send(self, commands: Sequence[Command]) -> None:
        """Send commands without waiting; ``receive`` gives their replies, one by one, in this order. Raises as ``run``.

        A caller that does not fetch all replies must close the connection: the next command would read an old one.
        """
        if not self._open or self._owner_pid != os.getpid():
            # The transport itself would reconnect.
            raise ConnectionClosedError("the connection to the cache is closed")
        try:
            # hiredis declares a tuple of one
            packed = [pack_command(tuple(command)) for command in commands]  # type: ignore[arg-type]
            self._transport.send_packed_command(packed)
        except BaseException:
            self.close()
            raise

    def receive(self) -> Any:
        """The next reply to what was sent. Raises as ``run``, also if the server refused that command."""
        if not self._open:
            raise ConnectionClosedError("the connection to the cache is closed")
        try:
            return self._transport.read_response(disable_decoding=True)
        except BaseException:
            # Replies may still be on their way.
            self.close()
            raise

    def idle_and_alive(self) -> bool:
        """Whether it can be used: nothing has arrived since the last reply, not even the end of the stream."""
        try:
            return self._open and self._owner_pid == os.getpid() and not self._transport.can_read(0)
        except Exception:  # noqa: BLE001  (whatever the error is, the connection is unusable)
            return False


def parse_info(text: bytes) -> dict[str, str]:
    """The reply to INFO as names and values."""
    lines = text.decode("utf-8", errors="replace").splitlines()
    return dict(line.split(":", 1) for line in lines if ":" in line and not line.startswith("#"))
