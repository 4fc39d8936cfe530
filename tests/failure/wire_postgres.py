"""A wire to PostgreSQL, with its messages by statement, command tag and SQLSTATE.

The format is PostgreSQL's ("Frontend/Backend Protocol"): a byte for the type of the message, four bytes for its length,
and its contents. Only the first message of a connection has no type byte.
"""

from __future__ import annotations

import asyncio
import socket
import struct
from collections.abc import Iterator
from dataclasses import dataclass, field
from pathlib import Path

from tests.failure.wire import Session, Wire

_SOCKET_NAME = ".s.PGSQL.5432"
_CANCEL = 80877102


@dataclass(eq=False)
class PostgresSession(Session):
    """One connection to a database."""

    database: str = ""
    process: int = 0
    statement: str = ""
    """The last statement that was sent to the server."""
    transaction: list[str] = field(default_factory=list)
    """The statements since the transaction began, including the one that began it."""
    lost_answers: int = 0
    """Answers that the client must not see."""

    @property
    def pid(self) -> int:
        return self.process

    def requests(self, buffer: bytearray) -> Iterator[bytes]:
        for message in _messages(buffer):
            if message[:1] == b"Q":
                self.statement = message[5:-1].decode("utf-8", "replace")
                self.transaction.append(self.statement)
            yield message

    def replies(self, buffer: bytearray) -> Iterator[bytes]:
        for message in _messages(buffer):
            if self.lost_answers:
                self.lost_answers -= message[:1] == b"Z"
                continue
            yield message
            if message[:1] == b"Z" and message[5:6] == b"I":  # ready, and in no transaction
                self.transaction.clear()


def query(statement: str) -> bytes:
    """The message that requests a statement."""
    text = statement.encode() + b"\0"
    return b"Q" + struct.pack(">i", len(text) + 4) + text


def tag(message: bytes) -> str | None:
    """The command tag, if the message reports that a command is complete."""
    return message[5:-1].decode() if message[:1] == b"C" else None


def sqlstate(message: bytes) -> str | None:
    """The SQLSTATE, if the message is an error."""
    if message[:1] != b"E":
        return None
    fields = message[5:].split(b"\0")
    return next((text[1:].decode() for text in fields if text[:1] == b"C"), None)


def _messages(buffer: bytearray) -> Iterator[bytes]:
    while len(buffer) >= 5:
        length = 1 + int.from_bytes(buffer[1:5], "big")
        if len(buffer) < length:
            return
        message = bytes(buffer[:length])
        del buffer[:length]
        yield message


class PostgresWire(Wire):
    """Listens in ``folder`` for the server whose socket is in ``server_folder``."""

    def __init__(self, folder: Path, server_folder: Path) -> None:
        self._path = folder / _SOCKET_NAME
        self._server_path = server_folder / _SOCKET_NAME
        super().__init__()

    async def _listen(self) -> None:
        await asyncio.start_unix_server(self._accept, self._path)

    async def _connect(self) -> tuple[asyncio.StreamReader, asyncio.StreamWriter]:
        return await asyncio.open_unix_connection(self._server_path)

    async def _session(
        self, reader: asyncio.StreamReader, client: asyncio.StreamWriter, server: asyncio.StreamWriter
    ) -> PostgresSession:
        head = await reader.readexactly(8)
        length, code = struct.unpack(">ii", head)
        rest = await reader.readexactly(length - 8)
        server.write(head + rest)

        words = rest.split(b"\0") if code != _CANCEL else []
        given = {name.decode(): value.decode() for name, value in zip(words[::2], words[1::2], strict=False)}

        peer = client.get_extra_info("socket").getsockopt(socket.SOL_SOCKET, socket.SO_PEERCRED, 12)
        return PostgresSession(
            self, client, server, database=given.get("database", ""), process=struct.unpack("3i", peer)[0]
        )

    def _say_before(self, session: Session, message: bytes) -> None:
        assert isinstance(session, PostgresSession)
        session.lost_answers += 1
        session.server.write(message)
