"""The front as a process: several of them, stopping, TLS, metrics, and starting while everything is down."""

from __future__ import annotations

import contextlib
import os
import re
import signal
import socket
import subprocess
import sys
import time
import urllib.request
from concurrent.futures import ThreadPoolExecutor
from pathlib import Path

import grpc
import psutil
import pytest
from segmentation.v1 import membership_pb2, membership_pb2_grpc, operations_pb2, segments_pb2
from segmentation.v1 import segments_pb2 as pb

from segsvc.local.processes import free_ports
from segsvc.local.redis import CACHE_CONFIG, RedisServer
from tests.contract.conftest import FrontUnderTest, environment_of, new_slug, running_front
from tests.contract.installation import Installation
from tests.contract.refusals import refused
from tests.eventually import eventually

TLS = Path(__file__).with_name("tls")

YOUNG_S = 0.5
"""The front's own is longer."""


@pytest.fixture
def kind(installation: Installation) -> str:
    return installation.name.removeprefix("contract-")


def get(front: FrontUnderTest, slug: str) -> pb.Segment:
    return front.segments.GetSegment(pb.GetSegmentRequest(slug=slug), timeout=5, wait_for_ready=True)


def test_several_processes_share_the_port(kind: str, installation: Installation, tmp_path: Path) -> None:
    (tmp_path / "young-s").write_text(str(YOUNG_S))
    with running_front(kind, installation, tmp_path, front_processes="2") as front:
        eventually(front.serving)
        slug = front.create().slug
        parent = psutil.Process(front.process.pid)
        eventually(lambda: len(parent.children()) == 2)

        victim = parent.children()[0]
        # A child that fails sooner is not restarted.
        # On a busy machine its parent counts from some time after its creation.
        eventually(lambda: time.time() - victim.create_time() > YOUNG_S + 2)
        victim.kill()
        eventually(lambda: len(parent.children()) == 2 and victim not in parent.children())
        # The client's connection may have belonged to the victim; a new one goes to a living process.
        eventually(lambda: _answers(front, slug))
        children = parent.children()

    assert not any(child.is_running() for child in children)


@pytest.mark.parametrize("installation", ["native"], indirect=True)
def test_children_do_not_outlive_their_parent(kind: str, installation: Installation, tmp_path: Path) -> None:
    with contextlib.suppress(AssertionError), running_front(kind, installation, tmp_path, front_processes="2") as front:
        parent = psutil.Process(front.process.pid)
        eventually(lambda: len(parent.children()) == 2)
        children = parent.children()
        parent.kill()
        parent.wait(20)
    gone, alive = psutil.wait_procs(children, timeout=30)
    assert not alive
    assert len(gone) == 2


@pytest.mark.parametrize("processes", ["1", "2"])
def test_a_port_in_use_is_reported(kind: str, installation: Installation, tmp_path: Path, processes: str) -> None:
    with socket.create_server(("127.0.0.1", 0)) as taken:
        address = f"127.0.0.1:{taken.getsockname()[1]}"
        ended = subprocess.run(
            [sys.executable, str(Path(__file__).with_name("front_process.py")), str(tmp_path)],
            env=environment_of(kind, installation, tmp_path, grpc_address=address, front_processes=processes),
            capture_output=True,
            text=True,
            timeout=60,
            check=False,
        )

    assert ended.returncode == 1
    assert "cannot_listen" in ended.stderr
    assert address in ended.stderr
    assert "Traceback" not in ended.stderr


def test_calls_that_wait_are_answered_before_the_front_stops(
    kind: str, installation: Installation, tmp_path: Path
) -> None:
    with running_front(kind, installation, tmp_path) as front, ThreadPoolExecutor(3) as threads:
        eventually(front.serving)
        slug, late = front.create().slug, new_slug()
        hold = front.failpoints / "prepared-not-voted"
        hold.write_text("hold")
        rollout = pb.RollOutSegmentRequest(slug=slug, rule={"percent": 1})
        waiting = threads.submit(front.segments.RollOutSegment, rollout)
        eventually((front.failpoints / "prepared-not-voted.fired").exists)
        creation = threads.submit(
            refused, lambda: front.segments.CreateSegment(pb.CreateSegmentRequest(segment={"slug": late}))
        )

        def queued() -> bool:
            with installation.databases.catalog.connect() as connection:
                state = connection.exec_driver_sql("SELECT state FROM operations WHERE slug = %s", (late,)).scalar()
            return bool(state == "QUEUED")

        eventually(queued)
        os.kill(front.process.pid, signal.SIGTERM)
        # At once: when its deadline has passed, the operation is aborted and so done.
        operation = waiting.result(timeout=20)
        assert not operation.done
        assert creation.result(timeout=20).reason == "OPERATION_QUEUE_BUSY"
        hold.unlink()
        assert front.process.wait(timeout=20) == 0


@pytest.mark.parametrize("installation", ["grpcio"], indirect=True)  # the native front leaves TLS to a sidecar
def test_tls(installation: Installation, kind: str, tmp_path: Path) -> None:
    credentials = grpc.ssl_channel_credentials((TLS / "cert.pem").read_bytes())
    files = {"grpc_tls_cert": str(TLS / "cert.pem"), "grpc_tls_key": str(TLS / "key.pem")}
    with running_front(kind, installation, tmp_path, credentials=credentials, **files) as front:
        eventually(front.serving)
        assert front.create().slug
        with grpc.insecure_channel(front.address) as plain, pytest.raises(grpc.FutureTimeoutError):
            grpc.channel_ready_future(plain).result(timeout=1)


def test_metrics(kind: str, installation: Installation, tmp_path: Path) -> None:
    (port,) = free_ports(1)
    with running_front(kind, installation, tmp_path, metrics_address=f"127.0.0.1:{port}") as front:
        eventually(front.serving)
        slug = front.create().slug
        refused(lambda: get(front, "nothing"))
        get(front, slug)
        with pytest.raises(grpc.RpcError):
            front.channel.unary_unary("/made.up/Name")(b"")
        memberships = membership_pb2_grpc.MembershipServiceStub(front.channel)
        for user_id in (-1, 2**62):
            with pytest.raises(grpc.RpcError):
                memberships.GetUserSegments(membership_pb2.GetUserSegmentsRequest(user_id=user_id), timeout=5)
        text = ""

        def counted() -> bool:
            # A call is counted when its answer is under way.
            nonlocal text
            with urllib.request.urlopen(f"http://127.0.0.1:{port}/metrics", timeout=5) as response:
                text = response.read().decode()
            return 'method="unknown"} 1.0' in text and "GetUserSegments" in text.partition('code="NOT_FOUND"')[2]

        eventually(counted)

    method = 'method="/segmentation.v1.SegmentService/GetSegment"'
    assert f'segsvc_rpcs_total{{code="OK",{method}}} 1.0' in text
    assert f'segsvc_rpcs_total{{code="NOT_FOUND",{method}}} 1.0' in text
    assert 'segsvc_rpcs_total{code="UNIMPLEMENTED",method="unknown"} 1.0' in text
    assert f"segsvc_rpc_seconds_count{{{method}}} 2.0" in text
    assert "made.up" not in text

    # The hot methods are counted like all others, whichever part of the front counts them.
    hot = 'method="/segmentation.v1.MembershipService/GetUserSegments"'
    assert f'segsvc_rpcs_total{{code="INVALID_ARGUMENT",{hot}}} 1.0' in text
    assert f'segsvc_rpcs_total{{code="NOT_FOUND",{hot}}} 1.0' in text
    assert f"segsvc_rpc_seconds_count{{{hot}}} 2.0" in text
    assert f'segsvc_rpc_seconds_bucket{{le="10.0",{hot}}} 2.0' in text
    assert text.count(f'segsvc_rpcs_total{{code="OK",{hot}}}') == 1

    # Each method's first failure is a rise from 0, which alert rules can see.
    for file in (membership_pb2, segments_pb2, operations_pb2):
        for service in file.DESCRIPTOR.services_by_name.values():
            for method in service.methods:
                name = f"/{service.full_name}/{method.name}"
                assert f'segsvc_rpcs_total{{code="INTERNAL",method="{name}"}} 0.0' in text
    # Metrics of other processes are absent, not 0.
    assert "segsvc_events_total" not in text
    assert "segsvc_recovery_alarms_total" not in text
    assert re.search(r'segsvc_build_info\{commit="[^"]*",role="front",version="[^"]+"\} 1.0', text)


def test_it_starts_while_everything_is_down(
    kind: str, installation: Installation, servers_folder: Path, tmp_path: Path
) -> None:
    cache = RedisServer(f"cache-of-{kind}", servers_folder / f"cache-of-{kind}", CACHE_CONFIG, mark=servers_folder)
    cache.start()  # so that it has an address
    cache.stop()

    with contextlib.ExitStack() as stack:
        stack.callback(cache.stop)
        outages = stack.enter_context(contextlib.ExitStack())
        for name in installation.database_names:
            outages.enter_context(installation.outage(name))
        front = stack.enter_context(running_front(kind, installation, tmp_path, cache_url=cache.url))
        assert not front.serving()
        assert refused(lambda: get(front, "a")).reason == "CATALOG_UNAVAILABLE"

        outages.close()
        cache.start()
        eventually(front.serving)
        created = front.create(new_slug())
        assert get(front, created.slug) == created


def _answers(front: FrontUnderTest, slug: str) -> bool:
    try:
        return get(front, slug).slug == slug
    except grpc.RpcError as error:
        assert error.code() == grpc.StatusCode.UNAVAILABLE  # noqa: PT017  # a broken connection, which the front cannot refuse
        return False
