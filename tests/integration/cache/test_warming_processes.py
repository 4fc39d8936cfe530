"""Several warming processes share the shards: never two on one, and the shard of one that is gone is taken over."""

from __future__ import annotations

import contextlib
import itertools
import json
import os
import signal
import subprocess
import sys
import threading
from collections import Counter
from collections.abc import Callable, Iterator
from concurrent.futures import ThreadPoolExecutor
from pathlib import Path
from typing import Any

import pytest

from segsvc.bootstrap import WorkerServices
from segsvc.domain.errors import ServiceError
from segsvc.local.stack_env import write_env
from segsvc.services.warming import WarmReport
from tests.eventually import eventually
from tests.integration.cache.conftest import SHARDS, World
from tests.integration.cache.lane_front import RefusedError, queued_lane
from tests.integration.cache.watched import SHARD, Watched, is_warm
from tests.local_servers import REPOSITORY

USERS = 6_000
"""Three blocks a shard."""


class Process:
    """A warming process, and the lines that it has said."""

    def __init__(self, env_file: Path, *arguments: str) -> None:
        self._process = subprocess.Popen(
            [sys.executable, "-m", "tests.integration.cache.warming_process", *arguments],
            cwd=REPOSITORY,
            env={**os.environ, "SEGSVC_ENV_FILE": str(env_file)},
            stdin=subprocess.PIPE,
            stdout=subprocess.PIPE,
            text=True,
        )

    def hear(self) -> dict[str, Any]:
        """The next line. An empty one: the process has ended."""
        assert self._process.stdout is not None
        said: dict[str, Any] = json.loads(self._process.stdout.readline() or "{}")
        return said

    def rest(self) -> list[dict[str, Any]]:
        """All that it says until it ends."""
        return list(itertools.takewhile(bool, iter(self.hear, None)))

    def go_on(self) -> None:
        assert self._process.stdin is not None
        self._process.stdin.write("\n")
        self._process.stdin.flush()

    def send(self, number: signal.Signals) -> None:
        self._process.send_signal(number)

    def close(self) -> None:
        self._process.kill()
        self._process.wait()
        for stream in (self._process.stdin, self._process.stdout):
            if stream is not None:
                with contextlib.suppress(BrokenPipeError):
                    stream.close()


Begin = Callable[..., Process]


@pytest.fixture
def begin(world: World, tmp_path: Path) -> Iterator[Begin]:
    """A function that starts a warming process for the world."""
    settings = world.settings.model_copy(update={"cache_url": world.server.url})
    write_env(tmp_path / "settings.env", settings)
    with contextlib.ExitStack() as started:

        def start(*arguments: str) -> Process:
            process = Process(tmp_path / "settings.env", *arguments)
            started.callback(process.close)
            return process

        yield start


def warm_again(watched: Watched) -> WarmReport:
    """As the next task, in whichever process: a run that could not be made is made again."""
    try:
        return watched.warmer().warm_shard(SHARD)
    except ServiceError:
        return WarmReport(SHARD)


def test_a_killed_process_leaves_its_shard_to_the_next(world: World, watched: Watched, begin: Begin) -> None:
    users = world.add_users(USERS)
    process = begin("hold", str(SHARD), "60")
    assert process.hear() == {"holds": SHARD}
    assert watched.warmer().warm_shard(SHARD) == WarmReport(SHARD), "two warmers on one shard"
    assert watched.warmer().warm_shard(1 - SHARD).entries == USERS // SHARDS

    process.send(signal.SIGKILL)
    eventually(lambda: warm_again(watched).blocks or is_warm(world, users))
    eventually(lambda: warm_again(watched) and is_warm(world, users))


def test_a_frozen_process_loses_its_shard_and_fills_nothing_afterwards(
    world: World, watched: Watched, begin: Begin
) -> None:
    users = world.add_users(USERS)
    process = begin("hold", str(SHARD), "1")
    assert process.hear() == {"holds": SHARD}
    process.send(signal.SIGSTOP)
    assert watched.warmer().warm_shard(SHARD) == WarmReport(SHARD), "it has not been silent for long"

    mine = [user for user in users if user % SHARDS == SHARD]
    eventually(lambda: warm_again(watched) and is_warm(world, mine))
    before = world.cached(*mine)

    process.send(signal.SIGCONT)
    process.go_on()
    assert process.rest() == [{"shard": SHARD, "failed": "SHARD_UNAVAILABLE"}]
    assert world.cached(*mine) == before


def test_two_processes_fill_an_empty_cache_together_and_reads_are_answered_or_refused(
    world: World, begin: Begin
) -> None:
    """The gate before the shards holds: a read waits in a bounded queue, or is told that it must come again."""
    users = world.add_users(USERS)
    world.add_segment("odd", [user for user in users if user % 3 == 0])
    processes = [begin("sweep") for _ in range(2)]
    few = {"cache_url": world.server.url, "cold_reads_max": 4, "cold_read_threads": 1}
    lane = queued_lane(world.settings.model_copy(update=few))
    for process in processes:
        assert process.hear() == {"ready": True}

    outcomes: Counter[str] = Counter()
    warm = threading.Event()

    def read(first: int) -> None:
        for user in itertools.cycle(users[first::8]):
            if warm.is_set():
                return
            try:
                assert lane.segments(user) == (["odd"] if user % 3 == 0 else [])
                outcomes["answered"] += 1
            except RefusedError as error:
                outcomes[error.reason if error.retry_s else "refused without a time"] += 1

    with ThreadPoolExecutor(8) as readers:
        reads = [readers.submit(read, first) for first in range(8)]
        try:
            for process in processes:
                process.go_on()
            runs = [run for process in processes for run in process.rest()]
            eventually(lambda: is_warm(world, users))
        finally:
            warm.set()
        for each in reads:
            each.result()
    lane.close()

    assert outcomes["answered"]
    assert outcomes.keys() <= {"answered", "OVERLOADED"}
    # One clock for all processes of the machine.
    for shard in range(SHARDS):
        of_shard = sorted((run["begun"], run["ended"]) for run in runs if run["shard"] == shard)
        assert of_shard
        assert all(ended <= begun for (_, ended), (begun, _) in itertools.pairwise(of_shard)), of_shard

    services = WorkerServices(world.settings.model_copy(update={"cache_url": world.server.url}), sender=None)  # type: ignore[arg-type]
    assert [services.warming.warm_shard(shard).entries for shard in range(SHARDS)] == [0] * SHARDS
    services.close()
