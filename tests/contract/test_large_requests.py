"""What a request may cost: compressed requests, requests that inflate, and requests without an end."""

from __future__ import annotations

import gzip
import threading
import time
from collections.abc import Callable, Iterator
from contextlib import contextmanager
from pathlib import Path

import grpc
import psutil
import pytest
from grpc import StatusCode
from segmentation.v1 import membership_pb2

from segsvc.config import Settings
from tests.contract.conftest import FrontUnderTest, running_front
from tests.contract.installation import Installation
from tests.contract.raw_http2 import Connection, connected, message
from tests.contract.test_protocol import COLD, HOT, HOT_BATCH, STREAM
from tests.eventually import eventually

BOMB = gzip.compress(bytes(60 << 20), 9)
"""60 KB."""


@contextmanager
def memory_of(front: FrontUnderTest) -> Iterator[Callable[[], int]]:
    """Gives a function that returns the most bytes by which the front's memory has grown since the block began."""
    process = psutil.Process(front.process.pid)
    before = most = process.memory_info().rss
    ended = threading.Event()

    def look() -> None:
        nonlocal most
        while not ended.wait(0.005):
            most = max(most, process.memory_info().rss)

    looking = threading.Thread(target=look)
    looking.start()
    try:
        yield lambda: most - before
    finally:
        ended.set()
        looking.join()


def reads_well(front: FrontUnderTest) -> bool:
    front.installation.create_users({1: {}})
    request = membership_pb2.GetUserSegmentsRequest(user_id=1)
    return front.memberships.GetUserSegments(request, timeout=10).user_id == 1


@pytest.mark.parametrize("compression", [grpc.Compression.Gzip, grpc.Compression.Deflate])
@pytest.mark.parametrize("method", [HOT, HOT_BATCH, COLD, STREAM, "/google.longrunning.Operations/GetOperation"])
def test_a_compressed_request_is_refused_by_every_method(
    front: FrontUnderTest, method: str, compression: grpc.Compression
) -> None:
    payload = b"\x08" * 1000  # large enough that compression pays: else the client would send it as it is
    # A client may call any method as a stream, even one that returns a single message.
    with pytest.raises(grpc.RpcError) as caught:
        list(front.channel.unary_stream(method)(payload, timeout=10, compression=compression))
    assert caught.value.code() == StatusCode.UNIMPLEMENTED


@pytest.mark.parametrize("method", [HOT, HOT_BATCH, COLD])
def test_bombs_are_not_inflated_all(front: FrontUnderTest, method: str) -> None:
    """Twenty at once would be 1.2 GB."""
    with memory_of(front) as grown:
        with connected(front.address) as client:
            calls = [client.call(method, grpc_encoding="gzip") for _ in range(20)]
            try:
                for call in calls:
                    client.send(call, message(BOMB, compressed=True))
                for call in calls:
                    client.await_end(call)
            except (OSError, EOFError):
                pass  # cut off

        assert reads_well(front)
        # What arrives between two checks of the memory is still inflated: more of it on a busy machine.
        assert grown() < 900 << 20, f"{grown() >> 20} MiB"


def test_a_message_without_an_end_is_not_taken_in_whole(front: FrontUnderTest) -> None:
    size = 1 << 30
    with memory_of(front) as grown:
        with connected(front.address) as client:
            call = client.call(HOT)
            client.send(call, message(b"")[:1] + size.to_bytes(4, "big"), end=False)
            with pytest.raises((OSError, EOFError)):
                client.send(call, bytes(size))
        assert reads_well(front)
        assert grown() < Settings.model_fields["front_memory_max_bytes"].default, f"{grown() >> 20} MiB"


def test_memory_is_given_back_after_a_storm(front: FrontUnderTest) -> None:
    process = psutil.Process(front.process.pid)
    before = process.memory_info().rss
    payload = b"\x0a\x80\x80\x40" + bytes(1 << 20)
    threads = [threading.Thread(target=_send_often, args=(front, payload)) for _ in range(8)]
    for thread in threads:
        thread.start()
    for thread in threads:
        thread.join()
    eventually(lambda: process.memory_info().rss - before < 64 << 20, within_s=30)


def _send_often(front: FrontUnderTest, payload: bytes) -> None:
    end = time.monotonic() + 1
    with grpc.insecure_channel(front.address, options=[("grpc.use_local_subchannel_pool", 1)]) as channel:
        while time.monotonic() < end:
            with pytest.raises(grpc.RpcError):
                channel.unary_unary(HOT)(payload, timeout=10)


CONTENT_TYPES = {
    "application/grpc": True,
    "application/grpc+proto": True,
    "application/grpc;charset=utf-8": True,
    "Application/GRPC": True,
    "application/grpc-web": False,
    "application/grpcx": False,
    "text/plain": False,
    "": False,
    None: False,
}
"""Content types, and whether they are gRPC's. A browser sends ``text/plain`` to other sites without asking them."""


def _send_bombs(client: Connection) -> None:
    """Send bombs and read answers until the connection is cut off."""
    for _ in range(20):
        client.send(client.call(HOT, grpc_encoding="gzip"), message(BOMB, compressed=True))
    while True:
        client.read()


def test_a_front_can_check_content_types_instead_of_encodings(installation: Installation, tmp_path: Path) -> None:
    kind = installation.name.removeprefix("contract-")
    if kind != "native":
        pytest.skip("grpcio shows no header of its own, and checks what it checks")
    with running_front(kind, installation, tmp_path, grpc_checked_header="content-type") as front:
        assert reads_well(front)
        payload = membership_pb2.GetUserSegmentsRequest(user_id=1).SerializeToString()
        for content_type, answered in CONTENT_TYPES.items():
            for method in (HOT, HOT_BATCH):
                with connected(front.address) as client:
                    call = client.call(method, content_type=content_type)
                    client.send(call, message(payload))
                    client.await_end(call)
                    assert (call in client.answered) == answered, content_type

        # A request that inflates is cut off all the same.
        with connected(front.address) as client, pytest.raises((OSError, EOFError)):
            _send_bombs(client)
        assert reads_well(front)
