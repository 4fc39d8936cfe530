"""A wire between our processes and a server, on which a test can hold or lose messages and cut connections.

It understands only as much of the protocol as it needs to find where a message begins and ends. Everything runs in one
thread of its own; a test may call the public methods from any other thread.
"""

from __future__ import annotations

import asyncio
import contextlib
import threading
from abc import ABC, abstractmethod
from collections.abc import Awaitable, Callable, Iterable
from dataclasses import dataclass, field
from enum import Enum
from typing import Any

_READ_BYTES = 1 << 16
_LAST_ANSWER_S = 2.0
"""Time that a server has to answer a client that is gone; then the server's connection is closed, too."""


class Phase(Enum):
    """The direction of a message."""

    REQUEST = "request"
    REPLY = "reply"


@dataclass(eq=False)
class Session(ABC):
    """One connection of a process of ours."""

    wire: Wire
    client: asyncio.StreamWriter
    server: asyncio.StreamWriter
    holding: int = 0

    @property
    @abstractmethod
    def pid(self) -> int:
        """The process at the client's end."""

    @abstractmethod
    def requests(self, buffer: bytearray) -> Iterable[bytes]:
        """Take whole messages of the client off the buffer."""

    @abstractmethod
    def replies(self, buffer: bytearray) -> Iterable[bytes]:
        """Take whole messages of the server off the buffer."""


@dataclass(eq=False)
class _Held:
    session: Session
    pid: int
    decided: asyncio.Future[bool]


@dataclass(eq=False)
class Trap:
    """Holds messages that match, until it is opened.

    Args:
        matches: called in the wire's thread for each message.
        every: hold every match; otherwise only the first is held, and later matches pass.
        before: a message that the server gets first; the answer to it is lost. Such a trap holds nothing.
    """

    wire: Wire
    phase: Phase
    matches: Callable[[Any, bytes], bool]
    every: bool = False
    before: bytes | None = None
    armed: bool = True
    pids: list[int] = field(default_factory=list)
    """Processes whose messages it has caught, in order."""
    _held: list[_Held] = field(default_factory=list)

    def let_go(self, *, besides: int | None = None, deliver: bool = True) -> None:
        """Catch no more messages, and let go the held ones, except those of the process ``besides``.

        Args:
            deliver: if False, a held message never arrives, and its connection is cut.
        """
        self.armed = False

        def decide() -> None:
            for held in [held for held in self._held if held.pid != besides]:
                self._held.remove(held)
                if not held.decided.done():
                    held.decided.set_result(deliver)

        self.wire.call(decide)

    async def hold(self, session: Session) -> bool:
        """Wait until it is decided whether the message arrives. Runs in the wire's thread."""
        held = _Held(session, session.pid, asyncio.get_running_loop().create_future())
        self._held.append(held)
        session.holding += 1
        self.pids.append(held.pid)
        try:
            return await held.decided
        finally:
            session.holding -= 1


class Wire(ABC):
    """Listens at the address that our processes use for the server."""

    def __init__(self) -> None:
        self.sessions: set[Session] = set()
        self._traps: list[Trap] = []
        self._tasks: set[asyncio.Task[None]] = set()
        self._loop = asyncio.new_event_loop()
        self._thread = threading.Thread(target=self._loop.run_forever, name="wire", daemon=True)
        self._thread.start()
        self.call_and_wait(self._listen)

    # -- what a protocol brings -------------------------------------------------------------------------------------

    @abstractmethod
    async def _listen(self) -> None:
        """Start to listen; each connection goes to ``_accept``."""

    @abstractmethod
    async def _connect(self) -> tuple[asyncio.StreamReader, asyncio.StreamWriter]:
        """Connect to the server itself."""

    @abstractmethod
    async def _session(
        self, reader: asyncio.StreamReader, client: asyncio.StreamWriter, server: asyncio.StreamWriter
    ) -> Session:
        """Pass on the start of a connection, as far as its messages have another format."""

    # -- what a test calls ------------------------------------------------------------------------------------------

    def trap(
        self, phase: Phase, matches: Callable[[Any, bytes], bool], *, every: bool = False, before: bytes | None = None
    ) -> Trap:
        """Arm a trap, from now on."""
        made = Trap(self, phase, matches, every, before)
        self._traps = [trap for trap in self._traps if trap.armed] + [made]
        return made

    def open_all(self) -> None:
        """Disarm every trap and let everything go on."""
        for trap in self._traps:
            trap.let_go()

    def cut(self, pid: int) -> None:
        """Cut every connection of a process. Its messages that are held on the way to the server may still arrive."""

        def cut() -> None:
            for session in list(self.sessions):
                if session.pid == pid:
                    session.client.transport.abort()
                    if not session.holding:
                        session.server.transport.abort()

        self.call(cut)

    def call(self, what: Callable[[], None]) -> None:
        """Call ``what`` in the wire's thread, and return when it has ended."""

        async def do() -> None:
            what()

        self.call_and_wait(do)

    def call_and_wait(self, what: Callable[[], Awaitable[None]]) -> None:
        async def do() -> None:
            await what()

        asyncio.run_coroutine_threadsafe(do(), self._loop).result(10)

    def close(self) -> None:
        """End the thread and every connection with it."""

        async def end() -> None:
            for task in list(self._tasks):
                task.cancel()
            await asyncio.gather(*self._tasks, return_exceptions=True)

        self.call_and_wait(end)
        self._loop.call_soon_threadsafe(self._loop.stop)
        self._thread.join()
        self._loop.close()

    # -- passing on -------------------------------------------------------------------------------------------------

    async def _accept(self, reader: asyncio.StreamReader, client: asyncio.StreamWriter) -> None:
        task = asyncio.current_task()
        assert task is not None
        self._tasks.add(task)
        try:
            await self._serve(reader, client)
        except (OSError, EOFError, asyncio.CancelledError):
            pass  # an end is gone, or this wire is being closed: nothing more can be passed on
        finally:
            client.transport.abort()
            self._tasks.discard(task)

    async def _serve(self, reader: asyncio.StreamReader, client: asyncio.StreamWriter) -> None:
        answers, server = await self._connect()
        try:
            session = await self._session(reader, client, server)
            self.sessions.add(session)
            try:
                replies = asyncio.create_task(self._pass_replies(session, answers))
                try:
                    await self._pass_requests(session, reader)
                finally:
                    # The server may still work on a request; it is informed that the client is gone.
                    if not server.transport.is_closing():
                        server.write_eof()
                    await asyncio.wait([replies], timeout=_LAST_ANSWER_S)
                    replies.cancel()
                    await asyncio.gather(replies, return_exceptions=True)
            finally:
                self.sessions.discard(session)
        finally:
            server.close()

    async def _pass_requests(self, session: Session, reader: asyncio.StreamReader) -> None:
        buffer = bytearray()
        while data := await self._read(reader):
            buffer += data
            for message in session.requests(buffer):
                if await self._arrives(Phase.REQUEST, session, message, session.server):
                    session.server.write(message)
                else:
                    session.client.transport.abort()
                    return
            await session.server.drain()

    async def _pass_replies(self, session: Session, answers: asyncio.StreamReader) -> None:
        buffer = bytearray()
        while data := await self._read(answers):
            buffer += data
            for message in session.replies(buffer):
                if not await self._arrives(Phase.REPLY, session, message, session.client):
                    break
                session.client.write(message)
            else:
                with contextlib.suppress(OSError):  # a client that is gone does not keep the server from answering
                    await session.client.drain()
                continue
            break

        session.client.transport.abort()

    async def _arrives(self, phase: Phase, session: Session, message: bytes, to: asyncio.StreamWriter) -> bool:
        """Hold a message as long as a trap holds it. Returns whether it arrives then."""
        for trap in self._traps:
            if trap.armed and trap.phase is phase and trap.matches(session, message):
                trap.armed = trap.every
                if trap.before is not None:
                    trap.pids.append(session.pid)
                    self._say_before(session, trap.before)
                    continue
                return await trap.hold(session)
        return True

    def _say_before(self, session: Session, message: bytes) -> None:
        raise NotImplementedError("this protocol says nothing before")

    async def _read(self, reader: asyncio.StreamReader) -> bytes:
        try:
            return await reader.read(_READ_BYTES)
        except OSError:
            return b""
