"""Filling an empty cache by several warming processes, beside one."""

from __future__ import annotations

import contextlib
import json
import os
import subprocess
import sys
from collections.abc import Iterator

import redis

from benchmarks.harness import Curve, Result, Sample, benchmark, cpu_of, measure_pair, ratio_at_least
from benchmarks.seed import Shape
from benchmarks.world import World
from segsvc.config import Settings
from segsvc.local.stack_env import write_env

SHAPE = Shape(users=250_000, segments=57, shards=4)
"""A million users with 20 segments each on average."""
MOST = 4
ROUNDS = 3
CORES_FOR_TWO = 4
"""One for each warming process, one for the cache, one for PostgreSQL."""


class Sweepers:
    """Warming processes that wait for their turn."""

    def __init__(self, world: World, settings: Settings, count: int) -> None:
        self._world = world
        self._settings = settings
        env_file = world.folder / "sweeping.env"
        write_env(env_file, settings)
        self._processes = [
            subprocess.Popen(
                [sys.executable, "-m", "benchmarks.sweeping"],
                env={**os.environ, "SEGSVC_ENV_FILE": str(env_file)},
                stdin=subprocess.PIPE,
                stdout=subprocess.PIPE,
                text=True,
            )
            for _ in range(count)
        ]
        for process in self._processes:
            assert process.stdout is not None
            assert process.stdout.readline() == "ready\n"

    def sweep(self, count: int) -> Sample:
        """Empty the cache, and let ``count`` processes fill it. The value is entries per second."""
        with redis.Redis.from_url(self._settings.cache_url) as client:
            client.flushall()
        servers = {"postgres": self._world.postgres.pid or 0, "cache": self._world.cache.pid or 0}
        used = self._processes[:count]

        with cpu_of(servers) as spent:
            for process in used:
                assert process.stdin is not None
                process.stdin.write("\n")
                process.stdin.flush()
            reports = [json.loads(process.stdout.readline()) for process in used if process.stdout is not None]

        entries = sum(report["entries"] for report in reports)
        assert entries == SHAPE.users * SHAPE.shards, reports
        spent.cpu_s["warmers"] = sum(report["cpu_s"] for report in reports)
        return Sample(
            entries / spent.seconds, entries, spent.cpu_s, {"cache_busy": spent.cpu_s["cache"] / spent.seconds}
        )

    def close(self) -> None:
        for process in self._processes:
            process.kill()
            process.wait()
            for stream in (process.stdin, process.stdout):
                if stream is not None:
                    with contextlib.suppress(BrokenPipeError):
                        stream.close()


@benchmark("warm_processes")
def warm_processes(world: World) -> Iterator[Result | Curve]:
    """Entries written per second by two warming processes from an empty cache, beside one: 1 million users."""
    with world.installation(SHAPE) as installation, contextlib.ExitStack() as stack:
        sweepers = Sweepers(world, installation.settings, MOST)
        stack.callback(sweepers.close)
        pair = measure_pair(lambda: sweepers.sweep(2), lambda: sweepers.sweep(1), rounds=ROUNDS)
        most = sweepers.sweep(MOST)

    cores = os.cpu_count() or 1
    busy = pair.of("cache_busy")
    note = (
        f"the cache's server is busy {busy.ours.median:.0%} of the time, with one process {busy.reference.median:.0%}"
    )
    if cores < CORES_FOR_TWO:
        note += f"; the goal of 1.5 × holds from {CORES_FOR_TWO} cores on"
    goal = ratio_at_least(1.5) if cores >= CORES_FOR_TWO else None
    yield pair.result("warm_processes", "entries/s", goal, note=note)

    points = [(1.0, pair.reference.median), (2.0, pair.ours.median), (float(MOST), most.value)]
    yield Curve(
        "warm_processes",
        "Filling an empty cache, 1 million users",
        "warming processes",
        "entries/s",
        {"4 shards": points},
    )
    yield Result(
        f"warm_processes.{MOST}", most.value, "entries/s", pair.reference.median, most.value / pair.reference.median,
        cpu_us_per_call={name: 1e6 * seconds / most.calls for name, seconds in most.cpu_s.items()},
        note=f"measured once; the cache's server is busy {most.more['cache_busy']:.0%} of the time",
    )  # fmt: skip
