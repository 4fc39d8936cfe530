"""Which services are healthy while a dependency is not."""

from __future__ import annotations

import asyncio

import pytest
from grpc_health.v1 import health, health_pb2

from grpc_api import health as monitor
from grpc_api.health import CATALOG_SERVICES, SHARD_SERVICES, WHOLE, HealthMonitor
from segsvc.domain.errors import LockTimeout, Reason, ServiceError, catalog_unavailable, shard_unavailable


class Probed:
    """A dependency whose probe raises the error that the test has set."""

    def __init__(self, error: Exception | None = None) -> None:
        self.error = error

    def __call__(self, timeout_s: float) -> None:
        if self.error is not None:
            raise self.error


async def statuses(servicer: health.aio.HealthServicer) -> dict[str, bool]:
    found = {}
    for service in (*CATALOG_SERVICES, *SHARD_SERVICES, WHOLE):
        response = await servicer.Check(health_pb2.HealthCheckRequest(service=service), None)
        found[service] = response.status == health_pb2.HealthCheckResponse.SERVING
    return found


async def settle(servicer: health.aio.HealthServicer, expected: tuple[bool, bool, bool]) -> None:
    """Wait until catalog services, shard services and the whole are as expected."""
    wanted = {
        **dict.fromkeys(CATALOG_SERVICES, expected[0]),
        **dict.fromkeys(SHARD_SERVICES, expected[1]),
        WHOLE: expected[2],
    }
    async with asyncio.timeout(30):
        while await statuses(servicer) != wanted:  # noqa: ASYNC110  # nothing reports the change
            await asyncio.sleep(0.005)


async def test_a_service_is_healthy_while_it_can_answer(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(monitor, "PROBE_INTERVAL_S", 0.01)
    servicer = health.aio.HealthServicer()
    catalog, one, two = Probed(catalog_unavailable()), Probed(shard_unavailable(0)), Probed(shard_unavailable(1))
    watched = HealthMonitor(servicer, catalog, [one, two])

    await watched.start()
    await settle(servicer, (False, False, False))
    one.error = None
    await settle(servicer, (False, True, True))
    catalog.error = None
    await settle(servicer, (True, True, True))
    one.error = ServiceError(Reason.DEADLINE_EXCEEDED, "hangs")
    await settle(servicer, (True, False, True))
    two.error = LockTimeout()
    await settle(servicer, (True, True, True))
    catalog.error = ServiceError(Reason.OVERLOADED, "busy is alive")
    await asyncio.sleep(0.05)
    await settle(servicer, (True, True, True))

    await watched.stop()
    await settle(servicer, (False, False, False))
