"""Shared parts of the benchmarks of reads: a front with its users in the cache, and calls with their CPU time."""

from __future__ import annotations

import contextlib
import random
import time
from collections.abc import Iterator, Sequence
from dataclasses import dataclass

import grpc
from segmentation.v1 import membership_pb2 as pb
from segmentation.v1 import membership_pb2_grpc

from benchmarks.harness import Pids, Sample, cpu_of
from benchmarks.load import Load
from benchmarks.seed import Shape
from benchmarks.world import World
from segsvc.bootstrap import Inspection, WorkerServices
from segsvc.config import Settings
from segsvc.domain.operation import Operation
from segsvc.local.processes import free_ports, wait_until


class NoDispatcher:
    """Replaces Celery: warming dispatches nothing."""

    def dispatch(self, operation: Operation, shards: Sequence[int]) -> None:
        raise RuntimeError(f"a benchmark of reads dispatched {operation.id} to {shards}")

    def check(self) -> None:
        raise RuntimeError("a benchmark of reads accepted an operation")


@dataclass(frozen=True, slots=True)
class Server:
    """A running server, and the processes whose CPU time counts as a call's cost."""

    address: str
    pids: Pids
    settings: Settings


@contextlib.contextmanager
def front(world: World, settings: Settings, *, name: str = "front", processes: int = 1) -> Iterator[Server]:
    """``segsvc serve`` with these settings. No other process of the service runs."""
    address = free_address()
    own = settings.model_copy(
        update={
            "grpc_address": address,
            "front_processes": processes,
            "metrics_address": "",
        }
    )
    with world.process(name, "-m", "segsvc", "serve", settings=own, ready=lambda: answers(address)) as pid:
        yield Server(address, pids(world, pid), own)


@contextlib.contextmanager
def peer(world: World, module: str, *arguments: str, settings: Settings) -> Iterator[Server]:
    """A server of ``benchmarks.peers``."""
    address = free_address()
    argv = ("-m", f"benchmarks.peers.{module}", address, *arguments)
    with world.process(f"peer-{module}", *argv, ready=lambda: answers(address)) as pid:
        yield Server(address, pids(world, pid), settings)


def pids(world: World, front_pid: int) -> Pids:
    """All processes whose CPU time a read may use."""
    cache, postgres = world.cache.pid, world.postgres.pid
    assert cache is not None
    assert postgres is not None
    return {"front": front_pid, "cache": cache, "PostgreSQL": postgres}


def free_address() -> str:
    return f"127.0.0.1:{free_ports(1)[0]}"


def answers(address: str) -> bool:
    """Whether a server accepts calls at the address."""
    with grpc.insecure_channel(address) as channel:
        try:
            grpc.channel_ready_future(channel).result(timeout=0.5)
        except grpc.FutureTimeoutError:
            return False
        return True


def warm(settings: Settings) -> None:
    """Put every user into the cache, as the warming worker does.

    Raises:
        RuntimeError: a user is not a hit afterwards.
    """
    services = WorkerServices(settings, sender=NoDispatcher())
    try:
        for shard in range(settings.shard_count):
            services.warming.warm_shard(shard)
    finally:
        services.close()


def require_cached(settings: Settings, user_ids: Sequence[int]) -> None:
    """Raises RuntimeError unless the hot reader would answer all of these users from the cache."""
    if missing := _not_cached(settings, user_ids):
        raise RuntimeError(f"{missing} of {len(user_ids)} users are not in the cache")


def await_cached(settings: Settings, user_ids: Sequence[int], *, timeout_s: float = 30.0) -> None:
    """Wait until the running stack's warmer has put all these users into the cache. Raises RuntimeError on timeout."""
    if not wait_until(lambda: not _not_cached(settings, user_ids), timeout_s=timeout_s, poll_s=0.25):
        require_cached(settings, user_ids)


def _not_cached(settings: Settings, user_ids: Sequence[int]) -> int:
    """Number of these users whose read would be a miss."""
    inspection = Inspection(settings)
    try:
        pages = [user_ids[first : first + 1000] for first in range(0, len(user_ids), 1000)]
        return sum(inspection.cached(page).count(None) for page in pages)
    finally:
        inspection.close()


def shuffled_users(shape: Shape) -> list[int]:
    """All users of all shards in a random order that is the same in every run."""
    user_ids = [int(user_id) for shard in range(shape.shards) for user_id in shape.user_ids(shard)]
    random.Random(1).shuffle(user_ids)
    return user_ids


def stub(address: str) -> contextlib.AbstractContextManager[membership_pb2_grpc.MembershipServiceStub]:
    """An ordinary client, to inspect answers."""

    @contextlib.contextmanager
    def opened() -> Iterator[membership_pb2_grpc.MembershipServiceStub]:
        with grpc.insecure_channel(address) as channel:
            yield membership_pb2_grpc.MembershipServiceStub(channel)

    return opened()


def answers_of(address: str, user_ids: Sequence[int]) -> dict[int, list[str]]:
    """The slugs of each user, from one call per user."""
    with stub(address) as client:
        return {
            user_id: list(client.GetUserSegments(pb.GetUserSegmentsRequest(user_id=user_id), timeout=5).slugs)
            for user_id in user_ids
        }


def require_same_answers(one: str, other: str, user_ids: Sequence[int]) -> None:
    """Raises RuntimeError unless both servers return the same segments for each of these users."""
    mine, theirs = answers_of(one, user_ids), answers_of(other, user_ids)
    if mine != theirs:
        user_id = next(user for user in user_ids if mine[user] != theirs[user])
        only = sorted(set(mine[user_id]) ^ set(theirs[user_id]))
        raise RuntimeError(f"the answers for user {user_id} differ, in {len(only)} segments: {only[:5]} …")


def calls_per_second(
    load: Load, server: Server, *, seconds: float = 2.0, calls: int = 0, in_flight: int = 64
) -> Sample:
    """One round of calls at full speed. Raises RuntimeError if a call failed."""
    own = time.process_time()
    with cpu_of(server.pids) as spent:
        report = load.run(seconds=0.0 if calls else seconds, calls=calls, in_flight=in_flight)
    if report.failed:
        raise RuntimeError(f"{report.failed} of {report.calls} calls failed")

    cpu_s = {name: used for name, used in spent.cpu_s.items() if used}
    more = {
        "p50_ms": report.percentile_ms(50),
        "p99_ms": report.percentile_ms(99),
        "load_cpu_us": 1e6 * (time.process_time() - own) / report.calls,
    }
    return Sample(report.per_second, report.calls, cpu_s, more)


def users_per_second(load: Load, server: Server, users: int, *, seconds: float = 2.0, in_flight: int) -> Sample:
    """As ``calls_per_second``, for calls with ``users`` users each; CPU time is per user."""
    sample = calls_per_second(load, server, seconds=seconds, in_flight=in_flight)
    return Sample(sample.value * users, sample.calls * users, sample.cpu_s, sample.more)
