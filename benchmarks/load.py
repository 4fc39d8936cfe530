"""A gRPC client that is not the bottleneck: calls for many users, and the latency of each one.

h2load sends only one body per run, and ordinary clients cost more CPU time than the server that they measure. This
client sends requests that were encoded before. In the answers it reads only frames, lengths and the first field, which
names the user. That costs some microseconds per call. It implements the part of HTTP/2 that this needs (RFC 9113):
header blocks refer to a table that the first request fills (RFC 7541), and an unexpected frame is an error.

    load = Load("127.0.0.1:50051", GET_USER_SEGMENTS, [Body.single(user) for user in users], connections=4)
    report = load.run(seconds=3, in_flight=64)              # as fast as it goes, always 64 calls in flight
    report = load.run(seconds=3, rate=2000)                 # 2000 calls per second, late or not
"""

from __future__ import annotations

import gc
import selectors
import socket
import struct
import time
from collections.abc import Sequence
from dataclasses import dataclass, field
from typing import Final, Self

import numpy as np
import numpy.typing as npt

from grpc_api.hot.calls import BATCH_GET_USER_SEGMENTS, GET_USER_SEGMENTS
from grpc_api.hot.wire import varint

__all__ = ["BATCH_GET_USER_SEGMENTS", "GET_USER_SEGMENTS", "Body", "Load", "LoadError", "LoadReport"]

_DATA, _HEADERS, _RST_STREAM, _SETTINGS, _PING, _GOAWAY, _WINDOW_UPDATE = 0, 1, 3, 4, 6, 7, 8
_END_STREAM, _ACK, _END_HEADERS = 1, 1, 4
_FRAME: Final = struct.Struct(">IBI")
"""Length (24 bits) and type, flags, stream."""
_FRAME_BYTES: Final = 9
_WINDOW_MAX: Final = 2**31 - 1
_WINDOW_DEFAULT: Final = 65_535
_RECEIVE_BYTES: Final = 1 << 18
_STREAMS_MAX: Final = 2**30
TIMEOUT_S: Final = 10.0
"""A connection has failed if it receives nothing for this long while calls are in flight."""


class LoadError(Exception):
    """The server refused, or broke the rules of HTTP/2."""


@dataclass(frozen=True, slots=True)
class Body:
    """A request.

    Attributes:
        frame: the message with gRPC's prefix.
        answer_start: expected first bytes of the answer's message; empty: any answer is right.
    """

    frame: bytes
    answer_start: bytes

    @classmethod
    def single(cls, user_id: int, *, checked: bool = True) -> Self:
        """A GetUserSegments request. ``checked`` False: the answer may be about any user."""
        message = b"\x08" + varint(user_id)
        return cls(_framed(message), message if checked else b"")

    @classmethod
    def batch(cls, user_ids: Sequence[int]) -> Self:
        """A BatchGetUserSegments request."""
        packed = b"".join(varint(user_id) for user_id in user_ids)
        return cls(_framed(b"\x0a" + varint(len(packed)) + packed), b"")


def _framed(message: bytes) -> bytes:
    return b"\0" + len(message).to_bytes(4, "big") + message


@dataclass(slots=True)
class LoadReport:
    """The figures of a run.

    Attributes:
        latencies_s: latency of each call; with a rate, from the moment at which the call should have been sent.
        begun_s: start of each call by ``time.perf_counter``, in the order of ``latencies_s``.
        failed: calls that were refused, or whose answer was about another user.
        answer_bytes: total size of all messages.
    """

    seconds: float = 0.0
    latencies_s: npt.NDArray[np.float64] = field(default_factory=lambda: np.zeros(0))
    begun_s: npt.NDArray[np.float64] = field(default_factory=lambda: np.zeros(0))
    failed: int = 0
    answer_bytes: int = 0

    @property
    def calls(self) -> int:
        return self.latencies_s.size

    @property
    def per_second(self) -> float:
        return self.calls / self.seconds

    def percentile_ms(self, percent: float) -> float:
        return float(np.percentile(self.latencies_s, percent)) * 1000


class Load:
    """Connections to one server, and the requests to send in turn.

    Args:
        token: sent with each call; empty: none.

    Raises:
        OSError: the server cannot be reached.
    """

    def __init__(
        self, address: str, method: str, bodies: Sequence[Body], *, connections: int = 4, token: str = ""
    ) -> None:
        self._bodies = bodies
        self._next = 0
        self._connections = [_Connection(address, method, token) for _ in range(connections)]
        self._selector = selectors.DefaultSelector()
        for connection in self._connections:
            self._selector.register(connection.socket, selectors.EVENT_READ, connection)

    def close(self) -> None:
        self._selector.close()
        for connection in self._connections:
            connection.socket.close()

    def __enter__(self) -> Self:
        return self

    def __exit__(self, *_: object) -> None:
        self.close()

    def run(
        self, *, seconds: float = 0.0, calls: int = 0, in_flight: int = 64, rate: float | None = None
    ) -> LoadReport:
        """Send calls for ``seconds``, or ``calls`` calls, and wait for all answers.

        Args:
            in_flight: calls in flight over all connections; without effect if there is a ``rate``.
            rate: calls per second, evenly spaced.

        Raises:
            LoadError: a connection broke. Refused calls do not raise; they are counted.
        """
        gc.collect()
        gc.disable()  # its pauses would count as the server's
        try:
            for connection in self._connections:
                connection.reset()
            begun = time.perf_counter()
            end = begun + seconds if seconds else float("inf")
            if rate is None:
                self._run_full(end, calls or _STREAMS_MAX, in_flight)
            else:
                self._run_paced(begun, end, calls or _STREAMS_MAX, rate)
            took = time.perf_counter() - begun
        finally:
            gc.enable()

        return LoadReport(
            seconds=took,
            latencies_s=np.concatenate([np.array(c.latencies_s) for c in self._connections]),
            begun_s=np.concatenate([np.array(c.begun_s) for c in self._connections]),
            failed=sum(c.failed for c in self._connections),
            answer_bytes=sum(c.answer_bytes for c in self._connections),
        )

    def _run_full(self, end: float, calls: int, in_flight: int) -> None:
        share = max(1, in_flight // len(self._connections))
        left = calls
        now = time.perf_counter()
        for connection in self._connections:
            bodies = self._take(min(share, left))
            left -= len(bodies)
            connection.send(bodies, now)

        while any(connection.pending for connection in self._connections):
            for connection, ended, now in self._receive(TIMEOUT_S):
                if now >= end:
                    left = 0
                bodies = self._take(min(ended, left))
                left -= len(bodies)
                connection.send(bodies, now)

    def _run_paced(self, begun: float, end: float, calls: int, rate: float) -> None:
        sent = 0
        total = min(calls, int((end - begun) * rate)) if end != float("inf") else calls

        while sent < total or any(connection.pending for connection in self._connections):
            now = time.perf_counter()
            due = min(total, int((now - begun) * rate) + 1)
            while sent < due:
                # Count from the moment at which the call should have been sent: a server that stalls must not slow the
                # clock that measures it.
                self._connections[sent % len(self._connections)].send(self._take(1), begun + sent / rate)
                sent += 1

            wait = begun + sent / rate - time.perf_counter() if sent < total else TIMEOUT_S
            for _ in self._receive(max(0.0, wait), timeout_is_failure=sent >= total):
                pass

    def _take(self, count: int) -> list[Body]:
        bodies = self._bodies
        first, self._next = self._next, (self._next + count) % len(bodies)
        if first + count <= len(bodies):
            return list(bodies[first : first + count])
        return [bodies[index % len(bodies)] for index in range(first, first + count)]

    def _receive(self, timeout_s: float, *, timeout_is_failure: bool = True) -> list[tuple[_Connection, int, float]]:
        """Read what has arrived. Returns (connection, number of ended calls, time) for each readable connection."""
        ready = self._selector.select(timeout_s)
        if not ready and timeout_is_failure:
            raise LoadError(f"no answer within {TIMEOUT_S:g} s")

        found = []
        for key, _ in ready:
            connection: _Connection = key.data
            data = connection.socket.recv(_RECEIVE_BYTES)
            if not data:
                raise LoadError("the server has closed the connection")
            now = time.perf_counter()
            found.append((connection, connection.feed(data, now), now))
        return found


class _Connection:
    """One HTTP/2 connection."""

    def __init__(self, address: str, method: str, token: str) -> None:
        host, _, port = address.rpartition(":")
        self.socket = socket.create_connection((host, int(port)), timeout=TIMEOUT_S)
        self.socket.setsockopt(socket.IPPROTO_TCP, socket.TCP_NODELAY, 1)

        settings = struct.pack(">HIHI", 2, 0, 4, _WINDOW_MAX)  # no push; the window of each stream
        self.socket.sendall(
            b"PRI * HTTP/2.0\r\n\r\nSM\r\n\r\n"
            + _frame(_SETTINGS, 0, 0, settings)
            + _frame(_WINDOW_UPDATE, 0, 0, struct.pack(">I", _WINDOW_MAX - _WINDOW_DEFAULT))
        )

        # POST and http are in the static table. The other fields go into the dynamic table; the last one is entry 62.
        self._block = (
            b"\x83\x86"
             b"\x44" + _text(method)
            + b"\x41" + _text(address)
            + b"\x5f" + _text("application/grpc")
            + b"\x40" + _text("te") + _text("trailers")
        )  # fmt: skip
        self._later_block = b"\x83\x86\xc1\xc0\xbf\xbe"
        if token:
            # It becomes entry 62, and the fields before it move on by one.
            self._block += b"\x40" + _text("authorization") + _text(f"Bearer {token}")
            self._later_block = b"\x83\x86\xc2\xc1\xc0\xbf\xbe"

        self._stream = 1
        self._rest = b""
        self._window = _WINDOW_DEFAULT
        self._received = 0
        self._waiting: list[tuple[Body, float]] = []
        self.pending: dict[int, tuple[float, bytes | None]] = {}
        """Stream → time of sending, and expected first bytes of the answer; None: they arrived and were right."""
        self.reset()

    def reset(self) -> None:
        """Reset the figures of the last run."""
        self.latencies_s: list[float] = []
        self.begun_s: list[float] = []
        self.failed = 0
        self.answer_bytes = 0

    def send(self, bodies: Sequence[Body], now: float) -> None:
        """Send requests as far as the server's window allows. The rest is sent when the window opens."""
        if self._waiting:
            self._waiting += [(body, now) for body in bodies]
            return

        out = []
        for number, body in enumerate(bodies):
            frame = body.frame
            if len(frame) > self._window:
                self._waiting = [(later, now) for later in bodies[number:]]
                break
            self._window -= len(frame)
            stream = self._stream
            self._stream += 2
            self.pending[stream] = (now, body.answer_start)
            out.append(_FRAME.pack(len(self._block) << 8 | _HEADERS, _END_HEADERS, stream))
            out.append(self._block)
            self._block = self._later_block
            out.append(_FRAME.pack(len(frame) << 8 | _DATA, _END_STREAM, stream))
            out.append(frame)

        if out:
            self.socket.sendall(b"".join(out))

    def feed(self, data: bytes, now: float) -> int:
        """Process received data. Returns the number of calls that it ended."""
        if self._rest:
            data = self._rest + data

        position, end, ended = 0, len(data), 0
        pending, unpack = self.pending, _FRAME.unpack_from
        while end - position >= _FRAME_BYTES:
            head, flags, stream = unpack(data, position)
            start = position + _FRAME_BYTES
            following = start + (head >> 8)
            if following > end:
                break

            kind = head & 0xFF
            if kind == _DATA:
                length = head >> 8
                self._received += length
                self.answer_bytes += length
                begun, expected = pending[stream]
                if expected is not None and data.startswith(expected, start + 5, following):
                    pending[stream] = (begun, None)
            elif kind == _HEADERS:
                if flags & _END_STREAM:
                    ended += self._end(stream, now)
            else:
                ended += self._control(kind, flags, stream, data[start:following], now)
            position = following

        self._rest = data[position:]
        if self._received > _WINDOW_MAX // 4:
            self.socket.sendall(_frame(_WINDOW_UPDATE, 0, 0, struct.pack(">I", self._received)))
            self._received = 0
        return ended

    def _end(self, stream: int, now: float) -> int:
        begun, expected = self.pending.pop(stream)
        self.latencies_s.append(now - begun)
        self.begun_s.append(begun)
        # A refusal is a header block with no message before it.
        self.failed += expected is not None
        return 1

    def _control(self, kind: int, flags: int, stream: int, payload: bytes, now: float) -> int:
        if kind == _RST_STREAM:
            return self._end(stream, now)
        if kind == _SETTINGS and not flags & _ACK:
            self.socket.sendall(_frame(_SETTINGS, _ACK, 0, b""))
        elif kind == _PING and not flags & _ACK:
            self.socket.sendall(_frame(_PING, _ACK, 0, payload))
        elif kind == _WINDOW_UPDATE and not stream:
            self._window += struct.unpack(">I", payload)[0]
            waiting, self._waiting = self._waiting, []
            for body, since in waiting:
                self.send([body], since)
        elif kind == _GOAWAY:
            raise LoadError(f"the server goes away: {payload!r}")
        return 0


def _frame(kind: int, flags: int, stream: int, payload: bytes) -> bytes:
    return _FRAME.pack(len(payload) << 8 | kind, flags, stream) + payload


def _text(text: str) -> bytes:
    """A string in HPACK's encoding, not compressed; shorter than 127 bytes."""
    if len(text) >= 0x7F:
        raise ValueError(f"too long for this client: {text}")
    return bytes((len(text),)) + text.encode()
