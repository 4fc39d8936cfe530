"""A warming process that test_warming_processes.py starts, stops and kills::

    python -m tests.integration.cache.warming_process hold SHARD SILENCE_S
    python -m tests.integration.cache.warming_process sweep

``hold`` begins to sweep a shard, says so when users are leased and not filled, and goes on after a line of input.
``sweep`` sweeps all shards until each is warm. Both say how each run of theirs ended: a line of JSON.
"""

from __future__ import annotations

import json
import sys
import time
from collections.abc import Callable
from typing import Any

import segsvc.cache.client
import segsvc.cache.scripts
import segsvc.postgres.shard.memberships
from segsvc.bootstrap import WorkerServices
from segsvc.config import load_settings
from segsvc.domain.errors import ServiceError
from segsvc.log import configure_logging

LEASE_MS = 500
"""Short, so that no test waits for the leases of a dead process."""


def say(**what: Any) -> None:
    print(json.dumps(what), flush=True)


def run(services: WorkerServices, shard: int) -> int:
    """One run of the warmer on a shard. Returns the blocks that it visited."""
    begun = time.monotonic()
    try:
        report = services.warming.warm_shard(shard)
    except ServiceError as error:
        say(shard=shard, failed=error.reason.text)
        return -1
    if report.blocks:
        say(shard=shard, entries=report.entries, begun=begun, ended=time.monotonic())
    return report.blocks


def hold(services: WorkerServices, shard: int) -> None:
    cache = services.warming._cache
    acquire: Callable[..., Any] = cache.acquire

    def acquire_and_wait(*arguments: Any, **named: Any) -> Any:
        grant = acquire(*arguments, **named)
        cache.acquire = acquire  # type: ignore[method-assign]
        say(holds=shard)
        sys.stdin.readline()
        return grant

    cache.acquire = acquire_and_wait  # type: ignore[method-assign]
    run(services, shard)


def sweep(services: WorkerServices, shards: int) -> None:
    say(ready=True)
    sys.stdin.readline()
    cold = set(range(shards))
    while cold:
        for shard in sorted(cold):
            # A run that finds nothing to do: the shard is warm, or another process is at it. The note tells which.
            if run(services, shard) == 0 and services.warming._notes.last_sweep(shard) is not None:
                cold.discard(shard)


def main() -> None:
    configure_logging("ERROR", "console")
    segsvc.cache.client.scripts.LEASE_MS = LEASE_MS  # type: ignore[misc]
    settings = load_settings()
    services = WorkerServices(settings, sender=None)  # type: ignore[arg-type]
    if sys.argv[1] == "hold":
        segsvc.postgres.shard.memberships.WARM_SILENCE_S = float(sys.argv[3])  # type: ignore[misc]
        hold(services, int(sys.argv[2]))
    else:
        sweep(services, settings.shard_count)
    services.close()


if __name__ == "__main__":
    main()
