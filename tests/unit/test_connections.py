"""Connections as the kernel knows them: which are cut off, and which stay."""

from __future__ import annotations

import contextlib
import socket
from collections.abc import Iterator

import pytest

from grpc_api import connections
from tests.eventually import eventually

Pair = tuple[socket.socket, socket.socket]


@pytest.fixture
def listener() -> Iterator[socket.socket]:
    with socket.create_server(("127.0.0.1", 0)) as made:
        yield made


@pytest.fixture
def pairs(listener: socket.socket) -> Iterator[list[Pair]]:
    """Eight connections: the client's end, and the one that was accepted."""
    with contextlib.ExitStack() as opened:
        made: list[Pair] = []
        for _ in range(8):
            client = opened.enter_context(socket.create_connection(listener.getsockname(), timeout=5))
            made.append((client, opened.enter_context(listener.accept()[0])))
        yield made


def port_of(listener: socket.socket) -> int:
    port: int = listener.getsockname()[1]
    return port


def ended(client: socket.socket) -> bool:
    client.setblocking(False)
    try:
        return client.recv(1) == b""
    except BlockingIOError:
        return False


def test_one_connection_is_cut_by_the_name_of_its_peer(listener: socket.socket, pairs: list[Pair]) -> None:
    client, _ = pairs[3]
    assert connections.cut(port_of(listener), f"ipv4:127.0.0.1:{client.getsockname()[1]}")
    eventually(lambda: ended(client))
    assert not any(ended(other) for other, _ in pairs if other is not client)
    assert not connections.cut(port_of(listener), "ipv4:127.0.0.1:1")
    assert not connections.cut(port_of(listener), "unix:")


def test_those_that_sent_much_since_then_are_cut(listener: socket.socket, pairs: list[Pair]) -> None:
    port = port_of(listener)
    early, late = pairs[0][0], pairs[1][0]
    early.sendall(bytes(50_000))
    eventually(lambda: sum(connections.received(port).values()) == 50_000)
    before = connections.received(port)
    late.sendall(bytes(50_000))
    eventually(lambda: sum(connections.received(port).values()) == 100_000)
    assert connections.cut_above(port, 40_000, before) == [f"127.0.0.1:{late.getsockname()[1]}"]
    eventually(lambda: ended(late))
    assert not ended(early)


def test_a_share_of_the_largest_crowd_is_cut(listener: socket.socket, pairs: list[Pair]) -> None:
    assert connections.cut_crowd(port_of(listener), 0.25) == ("127.0.0.1", 2)
    eventually(lambda: sum(ended(client) for client, _ in pairs) == 2)
    assert connections.cut_crowd(1, 0.25) == ("", 0)
