"""A wire to a Redis server, with the requests of its clients one by one."""

from __future__ import annotations

import asyncio
from collections.abc import Iterator
from dataclasses import dataclass
from urllib.parse import urlsplit, urlunsplit

import psutil

from tests.failure.wire import Session, Wire


@dataclass(eq=False)
class RedisSession(Session):
    """One connection to the server."""

    port: int = 0
    _pid: int = 0

    @property
    def pid(self) -> int:
        self._pid = self._pid or process_at(self.port)
        return self._pid

    def requests(self, buffer: bytearray) -> Iterator[bytes]:
        while length := _command_length(buffer):
            message = bytes(buffer[:length])
            del buffer[:length]
            yield message

    def replies(self, buffer: bytearray) -> Iterator[bytes]:
        message = bytes(buffer)
        buffer.clear()
        yield message


def _command_length(buffer: bytearray) -> int:
    """Number of bytes of the first command, an array of strings; 0 if it is incomplete."""
    end = buffer.find(b"\r\n")
    if end < 0:
        return 0

    at = end + 2
    for _ in range(int(buffer[1:end])):
        end = buffer.find(b"\r\n", at)
        if end < 0:
            return 0
        at = end + 2 + int(buffer[at + 1 : end]) + 2

    return at if len(buffer) >= at else 0


def process_at(port: int) -> int:
    """The process that has a connection from this port; 0 if no such connection exists any more."""
    found = [
        connection.pid
        for connection in psutil.net_connections("tcp4")
        if connection.laddr and connection.laddr.port == port and connection.raddr
    ]
    return next((pid for pid in found if pid), 0)


class RedisWire(Wire):
    """Listens at ``url`` for the server at ``server_url``."""

    def __init__(self, server_url: str, port: int) -> None:
        at = urlsplit(server_url)
        assert at.port is not None
        self._server_port = at.port
        self._port = port
        self.url = urlunsplit(at._replace(netloc=at.netloc.replace(f":{at.port}", f":{port}")))
        super().__init__()

    def cut(self, pid: int) -> None:
        """Cut every connection of a process."""
        ports = {one.laddr.port for one in psutil.Process(pid).net_connections("tcp4") if one.laddr}

        def cut() -> None:
            for session in list(self.sessions):
                if isinstance(session, RedisSession) and session.port in ports:
                    session.client.transport.abort()
                    session.server.transport.abort()

        self.call(cut)

    async def _listen(self) -> None:
        await asyncio.start_server(self._accept, "127.0.0.1", self._port)

    async def _connect(self) -> tuple[asyncio.StreamReader, asyncio.StreamWriter]:
        return await asyncio.open_connection("127.0.0.1", self._server_port)

    async def _session(
        self, reader: asyncio.StreamReader, client: asyncio.StreamWriter, server: asyncio.StreamWriter
    ) -> RedisSession:
        return RedisSession(self, client, server, port=client.get_extra_info("peername")[1])
