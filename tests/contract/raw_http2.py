"""HTTP/2 written by hand, for input that no client library sends: raw frames, and headers without compression."""

from __future__ import annotations

import contextlib
import socket
import ssl
import struct
from collections.abc import Iterator

_PREFACE = b"PRI * HTTP/2.0\r\n\r\nSM\r\n\r\n"
_DATA, _HEADERS, _RESET, _SETTINGS, _PING, _GOAWAY, _WINDOW_UPDATE = 0, 1, 3, 4, 6, 7, 8
_END_STREAM, _END_HEADERS, _ACK = 1, 4, 1
_INITIAL_WINDOW = 4
_FRAME_BYTES_MAX = 16_384
_WINDOW_BYTES = 65_535

CALL_HEADERS = {
    ":method": "POST",
    ":scheme": "http",
    ":path": "",
    ":authority": "test",
    "te": "trailers",
    "content-type": "application/grpc",
}
"""The headers of each call; ``:path`` is still to be filled in."""


def message(payload: bytes, *, compressed: bool = False) -> bytes:
    """A message as gRPC puts it into DATA frames."""
    return struct.pack(">BI", compressed, len(payload)) + payload


class Connection:
    """One connection to a front.

    Attributes:
        ended: streams that the server has ended.
        answered: streams with DATA from the server.
        content: what the server has sent in DATA, by stream.

    Args:
        tls: None: in plain text.
    """

    def __init__(self, address: str, *, timeout_s: float = 20.0, tls: ssl.SSLContext | None = None) -> None:
        host, _, port = address.rpartition(":")
        self._socket = socket.create_connection((host, int(port)), timeout=timeout_s)
        if tls is not None:
            self._socket = tls.wrap_socket(self._socket, server_hostname=host)
        self._received = b""
        self._streams = 0
        self._initial_window = self._window = _WINDOW_BYTES
        self._windows: dict[int, int] = {}
        self.ended: set[int] = set()
        self.answered: set[int] = set()
        self.content: dict[int, bytes] = {}
        self._socket.sendall(_PREFACE + _frame(_SETTINGS, 0, 0, b""))

    def close(self) -> None:
        self._socket.close()

    def call(self, path: str, **headers: str | None) -> int:
        """Begin a call; headers replace those of CALL_HEADERS (None: left out), with ``_`` for ``-``."""
        given = {name.replace("_", "-"): value for name, value in headers.items()}
        if "method" in given:
            given[":method"] = given.pop("method")

        stream = 2 * self._streams + 1
        self._streams += 1
        self._windows[stream] = self._initial_window

        merged = CALL_HEADERS | {":path": path} | given
        block = b"".join(_header(name, value) for name, value in merged.items() if value is not None)
        self._socket.sendall(_frame(_HEADERS, _END_HEADERS, stream, block))
        return stream

    def send(self, stream: int, content: bytes, *, end: bool = True) -> None:
        """Send DATA as fast as the server's windows allow. Raises OSError, EOFError: the server has ended the call."""
        if not content:
            self._socket.sendall(_frame(_DATA, _END_STREAM, stream, b""))

        sent = 0
        while sent < len(content):
            while min(self._window, self._windows[stream]) <= 0:
                self.read()
                if stream in self.ended:
                    raise EOFError("the server has ended the call")

            part = content[sent : sent + min(_FRAME_BYTES_MAX, self._window, self._windows[stream])]
            sent += len(part)
            self._window -= len(part)
            self._windows[stream] -= len(part)
            last = end and sent == len(content)
            self._socket.sendall(_frame(_DATA, _END_STREAM if last else 0, stream, part))

    def read(self) -> None:
        """Read one frame. Raises EOFError, OSError (TimeoutError)."""
        length, kind, flags, stream = struct.unpack(">IBBI", b"\0" + self._take(9))
        content = self._take(length)

        if (kind in (_DATA, _HEADERS) and flags & _END_STREAM) or kind == _RESET:
            self.ended.add(stream)
        if kind == _DATA:
            self.answered.add(stream)
            self.content[stream] = self.content.get(stream, b"") + content
        elif kind == _WINDOW_UPDATE:
            increment = int.from_bytes(content, "big")
            if stream:
                self._windows[stream] = self._windows.get(stream, self._initial_window) + increment
            else:
                self._window += increment
        elif kind == _SETTINGS and not flags & _ACK:
            for number, value in struct.iter_unpack(">HI", content):
                if number == _INITIAL_WINDOW:
                    grown, self._initial_window = value - self._initial_window, value
                    self._windows = {open_: window + grown for open_, window in self._windows.items()}
            self._socket.sendall(_frame(_SETTINGS, _ACK, 0, b""))
        elif kind == _PING and not flags & _ACK:
            self._socket.sendall(_frame(_PING, _ACK, 0, content))

    def ping(self) -> None:
        self._socket.sendall(_frame(_PING, 0, 0, bytes(8)))

    def await_end(self, stream: int) -> None:
        """Return when the server has ended a stream. Raises as ``read``."""
        while stream not in self.ended:
            self.read()

    def _take(self, length: int) -> bytes:
        while len(self._received) < length:
            more = self._socket.recv(65_536)
            if not more:
                raise EOFError("the server has ended the connection")
            self._received += more
        taken, self._received = self._received[:length], self._received[length:]
        return taken


@contextlib.contextmanager
def connected(address: str, *, timeout_s: float = 20.0, tls: ssl.SSLContext | None = None) -> Iterator[Connection]:
    connection = Connection(address, timeout_s=timeout_s, tls=tls)
    try:
        yield connection
    finally:
        connection.close()


def _frame(kind: int, flags: int, stream: int, content: bytes) -> bytes:
    return struct.pack(">I", len(content))[1:] + struct.pack(">BBI", kind, flags, stream) + content


def _header(name: str, value: str) -> bytes:
    """A literal header field without indexing, in plain text."""
    return b"\x00" + _text(name) + _text(value)


def _text(text: str) -> bytes:
    encoded = text.encode()
    assert len(encoded) < 127, "longer texts need a longer length"
    return bytes((len(encoded),)) + encoded
