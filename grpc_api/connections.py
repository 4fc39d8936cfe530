"""Clients' connections as the kernel knows them: cut a connection, or find the ones that send most.

The native front receives a message whole, and inflates it, before it hands the call over. It has no limit for either,
and no way to end a connection. But its sockets belong to this process, and shutting a socket down ends the connection
together with everything that would still have been received and inflated for it.
"""

from __future__ import annotations

import contextlib
import os
import socket
import struct
from collections.abc import Iterator
from pathlib import Path
from typing import Final

_BYTES_RECEIVED_OFFSET: Final = 128
"""Offset of ``tcpi_bytes_received`` in Linux's ``struct tcp_info``; it has 8 bytes."""


@contextlib.contextmanager
def _socket_of(descriptor: int) -> Iterator[socket.socket | None]:
    """A second descriptor of a TCP socket, closed at the end. None: it is not a TCP socket, or is closed.

    Only the second descriptor is used: the front's threads may close the first at any time, and the kernel may then
    give its number to another file.
    """
    try:
        duplicate = os.dup(descriptor)
    except OSError:
        yield None
        return
    try:
        taken = socket.socket(fileno=duplicate)
    except OSError:
        os.close(duplicate)
        yield None
        return

    with taken:
        internet = taken.family in (socket.AF_INET, socket.AF_INET6) and taken.type == socket.SOCK_STREAM
        yield taken if internet else None


def _connections(port: int) -> Iterator[tuple[tuple[str, int], socket.socket]]:
    """This process's connections that were accepted on a port: the peer's address and port, and the socket."""
    for entry in Path("/proc/self/fd").iterdir():
        with _socket_of(int(entry.name)) as found:
            if found is None:
                continue
            try:
                if found.getsockname()[1] == port:
                    host, number = found.getpeername()[:2]
                    yield (_plain(host), number), found
            except OSError:  # it is a listening socket, or the peer has gone
                continue


def _plain(host: str) -> str:
    """An address without the prefix that a socket for IPv4 and IPv6 puts before an IPv4 address."""
    return host.removeprefix("::ffff:")


def cut(port: int, peer: str) -> bool:
    """End a client's connection.

    Args:
        port: that the front listens on.
        peer: as gRPC writes it, ``ipv4:127.0.0.1:5000`` or ``ipv6:[::1]:5000``.

    Returns:
        whether there was such a connection.
    """
    host, _, number = peer.partition(":")[2].rpartition(":")
    wanted = (_plain(host.strip("[]")), int(number)) if number.isdecimal() else None
    ended = False
    for address, connection in _connections(port):
        if address == wanted:
            ended = _shut(connection) or ended
    return ended


def cut_above(port: int, bytes_max: int, before: dict[tuple[str, int], int]) -> list[str]:
    """End the connections that have sent more than ``bytes_max`` since ``before``, an earlier result of ``received``.

    Returns:
        the peers, as ``address:port``.
    """
    ended: list[str] = []
    for address, connection in _connections(port):
        if _bytes_received(connection) - before.get(address, 0) > bytes_max and _shut(connection):
            ended.append(f"{address[0]}:{address[1]}")
    return ended


def cut_crowd(port: int, share: float) -> tuple[str, int]:
    """End a share of the connections of the address with the most connections, the newest first.

    Returns:
        the address, and how many were ended.
    """
    crowds: dict[str, list[tuple[str, int]]] = {}
    for address, _ in _connections(port):  # in the order of descriptors: usually the newest come last
        crowds.setdefault(address[0], []).append(address)
    if not crowds:
        return "", 0
    host, crowd = max(crowds.items(), key=lambda item: len(item[1]))
    victims = set(crowd[-max(1, int(share * len(crowd))) :])
    ended = [_shut(connection) for address, connection in _connections(port) if address in victims]
    return host, sum(ended)


def received(port: int) -> dict[tuple[str, int], int]:
    """Bytes that each client has sent since its connection began."""
    return {address: _bytes_received(connection) for address, connection in _connections(port)}


def _bytes_received(connection: socket.socket) -> int:
    info = connection.getsockopt(socket.IPPROTO_TCP, socket.TCP_INFO, _BYTES_RECEIVED_OFFSET + 8)
    if len(info) < _BYTES_RECEIVED_OFFSET + 8:  # a kernel older than 4.1
        return 0
    count: int = struct.unpack_from("=Q", info, _BYTES_RECEIVED_OFFSET)[0]
    return count


def _shut(connection: socket.socket) -> bool:
    try:
        connection.shutdown(socket.SHUT_RDWR)
    except OSError:  # it has just ended
        return False
    return True
