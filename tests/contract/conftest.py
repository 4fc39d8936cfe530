"""The same tests against both fronts, each a process of its own on real PostgreSQL and a real cache."""

from __future__ import annotations

import os
import subprocess
import sys
import time
from collections.abc import Iterator
from contextlib import contextmanager
from dataclasses import dataclass
from pathlib import Path
from typing import Any
from uuid import uuid4

import grpc
import pytest
import redis
from google.longrunning import operations_pb2_grpc
from grpc_health.v1 import health_pb2, health_pb2_grpc
from segmentation.v1 import membership_pb2_grpc, segments_pb2, segments_pb2_grpc
from segmentation.v1 import operations_pb2_grpc as watch_pb2_grpc

from segsvc.local.postgres import PostgresServer
from segsvc.local.processes import free_ports
from segsvc.local.redis import RedisServer
from tests.contract.installation import Installation
from tests.eventually import eventually

REPOSITORY = Path(__file__).resolve().parents[2]
START_TIMEOUT_S = 30.0


@dataclass
class FrontUnderTest:
    """A running front and a plain client of it."""

    kind: str
    address: str
    installation: Installation
    control: Path
    failpoints: Path
    process: subprocess.Popen[bytes]
    channel: grpc.Channel

    def __post_init__(self) -> None:
        self.segments = segments_pb2_grpc.SegmentServiceStub(self.channel)
        self.memberships = membership_pb2_grpc.MembershipServiceStub(self.channel)
        self.watches = watch_pb2_grpc.OperationServiceStub(self.channel)
        self.operations = operations_pb2_grpc.OperationsStub(self.channel)
        self.health = health_pb2_grpc.HealthStub(self.channel)

    def create(self, slug: str = "", **fields: Any) -> segments_pb2.Segment:
        """A new segment, with a slug of its own unless one is given."""
        segment = segments_pb2.Segment(slug=slug or new_slug(), **fields)
        return self.segments.CreateSegment(segments_pb2.CreateSegmentRequest(segment=segment), timeout=20)

    def serving(self, service: str = "") -> bool:
        response = self.health.Check(health_pb2.HealthCheckRequest(service=service), timeout=5)
        return response.status == health_pb2.HealthCheckResponse.SERVING


def new_slug(prefix: str = "s") -> str:
    return f"{prefix}-{uuid4().hex[:12]}"


def await_ready(channel: grpc.Channel, process: subprocess.Popen[bytes], log: Path) -> None:
    """Fail with the log unless the front accepts connections soon."""
    ready = grpc.channel_ready_future(channel)
    deadline = time.monotonic() + START_TIMEOUT_S

    while True:
        try:
            ready.result(timeout=0.2)
        except grpc.FutureTimeoutError:
            if process.poll() is not None or time.monotonic() > deadline:
                ready.cancel()
                pytest.fail(f"the front did not start:\n{log.read_text()[-4000:]}")
        else:
            return


def environment_of(kind: str, installation: Installation, folder: Path, **settings: str) -> dict[str, str]:
    """The environment of a front's process; settings by their variables' names without the prefix, in any case."""
    (folder / "failpoints").mkdir(exist_ok=True)

    return {
        **{name: value for name, value in os.environ.items() if not name.startswith("SEGSVC_")},
        **installation.environment(),
        "SEGSVC_ENV_FILE": str(folder / "none.env"),
        "SEGSVC_GRPC_FRONT": kind,
        "SEGSVC_METRICS_ADDRESS": "",
        "SEGSVC_GRPC_REFLECTION": "true",
        "SEGSVC_FAILPOINT_DIR": str(folder / "failpoints"),
        "SEGSVC_OPERATION_DEADLINE_S": "10",
        "SEGSVC_LOG_FORMAT": "console",
        "PYTHONPATH": str(REPOSITORY),
        **{f"SEGSVC_{name.upper()}": value for name, value in settings.items()},
    }


@contextmanager
def running_front(
    kind: str,
    installation: Installation,
    folder: Path,
    *,
    credentials: grpc.ChannelCredentials | None = None,
    **settings: str,
) -> Iterator[FrontUnderTest]:
    """A front in a process of its own, which must exit with 0 and must not have logged a fault.

    Args:
        folder: for its log and for the files that control it.
        credentials: of a client that speaks TLS.
    """
    (port,) = free_ports(1)
    address = f"127.0.0.1:{port}"
    log = folder / "front.log"

    with log.open("wb") as output:
        process = subprocess.Popen(
            [sys.executable, str(Path(__file__).with_name("front_process.py")), str(folder)],
            env=environment_of(kind, installation, folder, grpc_address=address, **settings),
            stdout=output,
            stderr=subprocess.STDOUT,
        )

    channel = grpc.secure_channel(address, credentials) if credentials else grpc.insecure_channel(address)
    try:
        await_ready(channel, process, log)
        yield FrontUnderTest(kind, address, installation, folder, folder / "failpoints", process, channel)
    finally:
        channel.close()
        process.terminate()
        try:
            code = process.wait(timeout=20)
        finally:
            process.kill()

    text = log.read_text()
    assert code == 0, f"the front ended with {code}:\n{text[-4000:]}"
    assert "Traceback" not in text, f"the front logged a fault:\n{text[-8000:]}"


@pytest.fixture(scope="package", params=["native", "grpcio"])
def installation(
    request: pytest.FixtureRequest, pg_server: PostgresServer, cache_server: RedisServer
) -> Iterator[Installation]:
    """Databases of the front of one kind; their ``name`` ends with the kind."""
    made = Installation(f"contract-{request.param}", pg_server, cache_server)
    made.create()
    # The cache's keys name users and shards, not installations: the cache must not hold the other front's entries.
    redis.Redis.from_url(cache_server.url).flushall()
    yield made
    made.databases.close()


@pytest.fixture(scope="package")
def front(installation: Installation, tmp_path_factory: pytest.TempPathFactory) -> Iterator[FrontUnderTest]:
    """The front under test, one kind after the other."""
    kind = installation.name.removeprefix("contract-")
    with running_front(kind, installation, tmp_path_factory.mktemp(f"front-{kind}")) as tested:
        eventually(tested.serving)
        yield tested


@pytest.fixture
def broker_down(front: FrontUnderTest) -> Iterator[None]:
    flag = front.control / "broker-down"
    flag.touch()
    yield
    flag.unlink()
