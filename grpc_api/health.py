"""Health of each service, kept up to date by probing the databases that it needs.

    segmentation.v1.SegmentService, .OperationService, google.longrunning.Operations    the catalog
    segmentation.v1.MembershipService                                                   at least one shard
    "" (the process as a whole)                                                         any of these

A shard that is down makes only its own users' calls fail. If a load balancer took all fronts out for that, an outage
of some users would become an outage of all. For the same reason the process is healthy as long as one part is.
"""

from __future__ import annotations

import asyncio
import time
from collections.abc import Callable, Mapping, Sequence
from concurrent.futures import ThreadPoolExecutor
from typing import Any

from grpc_health.v1 import health, health_pb2

from segsvc.domain.errors import Category, LockTimeout, Reason, ServiceError
from segsvc.log import get_logger

CATALOG_SERVICES = (
    "segmentation.v1.SegmentService",
    "segmentation.v1.OperationService",
    "google.longrunning.Operations",
)
SHARD_SERVICES = ("segmentation.v1.MembershipService",)
WHOLE = ""

PROBE_INTERVAL_S = 1.0
PROBE_TIMEOUT_S = 1.0
"""Longest time of a probe's statement; connecting has its own limit."""

_SERVING = health_pb2.HealthCheckResponse.SERVING
_NOT_SERVING = health_pb2.HealthCheckResponse.NOT_SERVING

_log = get_logger(__name__)

Probe = Callable[[float], None]
"""Checks that a database answers within this many seconds. Raises ServiceError if it does not."""


class HealthServicer(health.aio.HealthServicer):
    """grpc.health.v1.Health. grpcio's own servicer has no ``List``: a call of it would fail as an internal error."""

    async def List(self, request: Any, context: Any) -> Any:  # noqa: N802  # the method's name
        serving: Mapping[str, int] = self._server_status  # type: ignore[attr-defined]  # the stubs lag behind
        statuses = {service: health_pb2.HealthCheckResponse(status=status) for service, status in serving.items()}
        return health_pb2.HealthListResponse(statuses=statuses)  # type: ignore[attr-defined]


class HealthMonitor:
    """Probes the catalog and the shards, each on its own thread, so that a database that hangs delays no other probe.

    Args:
        servicer: publishes the results.
        catalog: probe of the catalog.
        shards: probes of the shards.
    """

    def __init__(self, servicer: health.aio.HealthServicer, catalog: Probe, shards: Sequence[Probe]) -> None:
        self._servicer = servicer
        self._probes = (catalog, *shards)
        self._alive = [False] * len(self._probes)
        self._watching: asyncio.Task[None] | None = None
        self._pool = ThreadPoolExecutor(max_workers=len(self._probes), thread_name_prefix="health")

    async def start(self) -> None:
        """Begin to watch. All services are NOT_SERVING until a probe has succeeded. Call this before the server starts,
        because a health servicer says SERVING by default."""
        await self._publish()
        self._watching = asyncio.create_task(self._run())

    async def stop(self) -> None:
        """NOT_SERVING from now on: the process is about to end."""
        if self._watching is not None:
            self._watching.cancel()
        await self._servicer.enter_graceful_shutdown()
        self._pool.shutdown(wait=False, cancel_futures=True)

    async def _run(self) -> None:
        async with asyncio.TaskGroup() as watchers:
            for number, probe in enumerate(self._probes):
                watchers.create_task(self._watch(number, probe))

    async def _watch(self, number: int, probe: Probe) -> None:
        loop = asyncio.get_running_loop()
        while True:
            begun = time.monotonic()
            alive = await loop.run_in_executor(self._pool, _answers, probe)
            if alive != self._alive[number]:
                self._alive[number] = alive
                name = "catalog" if number == 0 else f"shard {number - 1}"
                _log.info("dependency_is_back" if alive else "dependency_is_out_of_reach", dependency=name)
                await self._publish()
            await asyncio.sleep(max(0.0, begun + PROBE_INTERVAL_S - time.monotonic()))

    async def _publish(self) -> None:
        catalog, shards = self._alive[0], any(self._alive[1:])
        for service in CATALOG_SERVICES:
            await self._set(service, serving=catalog)
        for service in SHARD_SERVICES:
            await self._set(service, serving=shards)
        await self._set(WHOLE, serving=catalog or shards)

    async def _set(self, service: str, *, serving: bool) -> None:
        await self._servicer.set(service, _SERVING if serving else _NOT_SERVING)


def _answers(probe: Probe) -> bool:
    try:
        probe(PROBE_TIMEOUT_S)
    except LockTimeout:
        return True
    except ServiceError as error:
        # A busy database is alive; it is not alive in an outage, or without an answer in time.
        return error.reason.category is not Category.UNAVAILABLE and error.reason is not Reason.DEADLINE_EXCEEDED
    except Exception:  # noqa: BLE001  # the watch must go on
        _log.exception("probe_failed")
        return False
    return True
