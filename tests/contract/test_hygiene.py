"""What a client may do wrong without harm: no message, too many connections, pings; and what a front leaves behind."""

from __future__ import annotations

import contextlib
import os
import resource
import signal
import socket
import time
from pathlib import Path

import grpc
import psutil
import pytest
from segmentation.v1 import segments_pb2

from tests.contract.conftest import FrontUnderTest, running_front
from tests.contract.installation import Installation
from tests.contract.raw_http2 import connected
from tests.contract.test_protocol import COLD, HOT, HOT_BATCH, STREAM
from tests.eventually import eventually


@pytest.mark.parametrize("method", [HOT, HOT_BATCH, COLD, STREAM, "/google.longrunning.Operations/GetOperation"])
def test_a_call_without_a_message_is_answered(front: FrontUnderTest, method: str) -> None:
    with pytest.raises(grpc.RpcError) as caught:
        list(front.channel.stream_stream(method)(iter([]), timeout=10))
    assert caught.value.code() == grpc.StatusCode.INTERNAL


def test_frequent_pings_end_no_connection(front: FrontUnderTest) -> None:
    """grpcio's own default is three pings in five minutes."""
    slug = front.create().slug

    with connected(front.address) as client:
        client.read()
        for _ in range(50):
            client.ping()

        call = client.call(COLD)
        payload = segments_pb2.GetSegmentRequest(slug=slug).SerializeToString()
        client.send(call, b"\0" + len(payload).to_bytes(4, "big") + payload)
        client.await_end(call)
        assert call in client.answered


def test_more_connections_than_files(installation: Installation, tmp_path: Path) -> None:
    """One caller opens them to a front that may open few files: other callers and the front's own work go on."""
    kind = installation.name.removeprefix("contract-")
    with running_front(kind, installation, tmp_path) as front:
        eventually(front.serving)
        slug = front.create().slug
        process = psutil.Process(front.process.pid)
        limit = process.num_fds() + 60
        resource.prlimit(front.process.pid, resource.RLIMIT_NOFILE, (limit, limit))

        host, _, port = front.address.rpartition(":")
        with contextlib.ExitStack() as opened:
            for _ in range(200):
                client = opened.enter_context(socket.socket())
                client.setblocking(False)  # some wait for a place in the kernel's queue
                client.connect_ex((host, int(port)))
            eventually(lambda: "no more files can be opened" in (tmp_path / "front.log").read_text())
            used = sum(process.cpu_times()[:2])
            time.sleep(1)  # measured: nothing may spin meanwhile
            assert sum(process.cpu_times()[:2]) - used < 0.8
            eventually(lambda: _answers(front, slug))

        eventually(lambda: process.num_fds() < limit - 20)
        assert _answers(front, slug)


def _answers(front: FrontUnderTest, slug: str) -> bool:
    request = segments_pb2.GetSegmentRequest(slug=slug)
    try:
        return bool(front.segments.GetSegment(request, timeout=5, wait_for_ready=True).slug == slug)
    except grpc.RpcError:
        return False  # its connection may have been cut with the crowd's


def test_a_front_that_is_killed_leaves_no_file_behind(
    installation: Installation, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    # Longer than a socket's path may be.
    temporary = tmp_path / ("temporary" * 15)
    temporary.mkdir()
    monkeypatch.setenv("TMPDIR", str(temporary))

    kind = installation.name.removeprefix("contract-")
    with contextlib.suppress(AssertionError), running_front(kind, installation, tmp_path) as front:
        assert front.create().slug
        os.kill(front.process.pid, signal.SIGKILL)
        front.process.wait(10)

    assert not list(temporary.iterdir())


def test_a_front_may_open_as_many_files_as_the_machine_allows(front: FrontUnderTest) -> None:
    soft, hard = resource.prlimit(front.process.pid, resource.RLIMIT_NOFILE)
    assert soft == hard
