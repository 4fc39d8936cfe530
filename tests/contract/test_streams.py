"""Streams beside all other calls: readers that stall, many exports, many watchers."""

from __future__ import annotations

import contextlib
import re
import time
import urllib.request
from collections.abc import Iterator
from pathlib import Path
from typing import Any

import grpc
import psutil
import pytest
from segmentation.v1 import operations_pb2, segments_pb2

from segsvc.local.postgres import PostgresServer
from segsvc.local.processes import free_ports
from segsvc.local.redis import RedisServer
from tests import installation as users
from tests.contract.conftest import FrontUnderTest, running_front
from tests.contract.installation import Installation
from tests.contract.refusals import refusal_of
from tests.eventually import eventually

MEMBERS = 200_000
EXPORT = "/segmentation.v1.SegmentService/ExportSegmentUsers"
STALLED = [("grpc.http2.bdp_probe", 0), ("grpc.http2.lookahead_bytes", 65_536)]
"""A client whose window does not grow while it does not read."""


@pytest.fixture(scope="module", params=["native", "grpcio"])
def streaming(
    request: pytest.FixtureRequest,
    pg_server: PostgresServer,
    cache_server: RedisServer,
    tmp_path_factory: pytest.TempPathFactory,
) -> Iterator[tuple[FrontUnderTest, str]]:
    """A front with a segment of 200,000 members, about 2 MB of export; and the segment's slug."""
    made = Installation(f"streams-{request.param}", pg_server, cache_server)
    made.create()
    users.Installation(made.settings(), pg_server).add_users(range(1, MEMBERS + 1))

    (port,) = free_ports(1)
    metrics = f"127.0.0.1:{port}"
    with running_front(request.param, made, tmp_path_factory.mktemp("streams"), metrics_address=metrics) as front:
        eventually(front.serving)
        slug = front.create().slug
        rollout = segments_pb2.RollOutSegmentRequest(slug=slug, rule={"percent": 100})
        assert front.segments.RollOutSegment(rollout, timeout=60).done
        yield front, slug
    made.databases.close()


def calls_of(front: FrontUnderTest, method: str, code: str) -> float:
    """``segsvc_rpcs_total`` of a method and code."""
    address = next(
        line
        for line in Path(f"/proc/{front.process.pid}/environ").read_text().split("\0")
        if line.startswith("SEGSVC_METRICS_ADDRESS=")
    ).partition("=")[2]
    with urllib.request.urlopen(f"http://{address}/metrics", timeout=5) as response:
        text = response.read().decode()
    found = re.search(rf'^segsvc_rpcs_total{{code="{code}",method="{method}"}} (.+)$', text, re.MULTILINE)
    return float(found[1]) if found else 0.0


def export(channel: grpc.Channel, slug: str) -> Any:
    method = channel.unary_stream(
        EXPORT,
        segments_pb2.ExportSegmentUsersRequest.SerializeToString,
        segments_pb2.ExportSegmentUsersResponse.FromString,
    )
    return method(segments_pb2.ExportSegmentUsersRequest(slug=slug), timeout=60)


def watch(front: FrontUnderTest, name: str) -> Any:
    return front.watches.WatchOperation(operations_pb2.WatchOperationRequest(name=name), timeout=60)


def code_of(stream: Any) -> grpc.StatusCode | None:
    """The code with which a stream ended in place of its first message; None: it goes on."""
    try:
        next(stream)
    except grpc.RpcError as error:
        refusal = refusal_of(error)
        assert refusal.reason == "OVERLOADED"
        assert refusal.retry_after_s
        return refusal.code
    return None


def get_segment_s(front: FrontUnderTest, slug: str) -> float:
    """How long the slowest of ten reads takes."""
    slowest = 0.0
    for _ in range(10):
        began = time.monotonic()
        front.segments.GetSegment(segments_pb2.GetSegmentRequest(slug=slug), timeout=10)
        slowest = max(slowest, time.monotonic() - began)
    return slowest


@contextlib.contextmanager
def left(streams: list[Any]) -> Iterator[None]:
    try:
        yield
    finally:
        for stream in streams:
            stream.cancel()


def test_exports_that_stall_cost_no_memory_and_no_places_of_others(streaming: tuple[FrontUnderTest, str]) -> None:
    front, slug = streaming
    list(export(front.channel, slug))  # what is loaded only once is loaded now
    process = psutil.Process(front.process.pid)
    before = process.memory_info().rss

    with grpc.insecure_channel(front.address, STALLED) as channel:
        streams = [export(channel, slug) for _ in range(300)]
        with left(streams):
            codes = [code_of(stream) for stream in streams]
            assert get_segment_s(front, slug) < 5
            assert process.memory_info().rss - before < 48 << 20

    assert codes.count(None) == 16
    assert codes.count(grpc.StatusCode.RESOURCE_EXHAUSTED) == 284
    # Places are free again after their clients have left.
    eventually(lambda: sum(len(page.user_ids) for page in export(front.channel, slug)) >= MEMBERS)


def test_many_watchers_are_one_look(streaming: tuple[FrontUnderTest, str]) -> None:
    front, slug = streaming
    hold = front.failpoints / "prepared-not-voted"
    hold.write_text("hold")
    request = segments_pb2.RollOutSegmentRequest(slug=slug, rule={"percent": 1}, return_immediately=True)
    name = front.segments.RollOutSegment(request, timeout=20).name
    eventually((front.failpoints / "prepared-not-voted.fired").exists)

    streams = [watch(front, name) for _ in range(500)]
    try:
        with left(streams):
            assert [next(stream).name for stream in streams] == [name] * 500

            process = psutil.Process(front.process.pid)
            used = sum(process.cpu_times()[:2])
            time.sleep(2)  # measured: what the watchers cost while nothing happens
            used = sum(process.cpu_times()[:2]) - used
            assert used < 1, f"{used:.2f} s of 2 s"
            assert get_segment_s(front, slug) < 5

            hold.unlink()
            for stream in streams:
                *_, last = stream
                assert operations_pb2.OperationMetadata.State.Name(last.metadata.state) in {"DONE", "ABORTED"}
    finally:
        hold.unlink(missing_ok=True)
        (front.failpoints / "prepared-not-voted.fired").unlink(missing_ok=True)


def test_a_client_that_leaves_has_cancelled(streaming: tuple[FrontUnderTest, str]) -> None:
    front, slug = streaming
    before = calls_of(front, EXPORT, "CANCELLED")
    with grpc.insecure_channel(front.address, STALLED) as channel:
        left_open, cancelled = export(channel, slug), export(channel, slug)
        next(left_open)
        next(cancelled)
        cancelled.cancel()
    eventually(lambda: calls_of(front, EXPORT, "CANCELLED") == before + 2)
    assert not calls_of(front, EXPORT, "UNKNOWN")
