"""Workers as processes on a broker of their own, which tests stop, start and fill with values of other programs."""

from __future__ import annotations

import contextlib
import json
import os
import signal
import subprocess
import sys
from collections.abc import Callable, Iterator
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any
from uuid import uuid4

import pytest
import redis

from segsvc.bootstrap import installation_of
from segsvc.local.postgres import PostgresServer
from segsvc.local.processes import free_ports
from segsvc.local.redis import BROKER_CONFIG, RedisServer
from tests.broker_messages import task_message
from tests.eventually import eventually
from tests.installation import Installation, new_installation
from tests.local_servers import REPOSITORY

SHARDS = 2


@dataclass
class Workplace:
    """An installation with a broker of its own, and the processes that a test starts on it."""

    installation: Installation
    broker: RedisServer
    folder: Path
    processes: dict[str, subprocess.Popen[bytes]] = field(default_factory=dict)

    @property
    def prefix(self) -> str:
        return installation_of(self.installation.settings).broker_prefix

    @property
    def client(self) -> redis.Redis:
        return redis.Redis.from_url(self.broker.url)

    @property
    def environment(self) -> dict[str, str]:
        values = self.installation.settings.model_dump(mode="json", exclude_none=True)
        own = {
            f"SEGSVC_{name.upper()}": " ".join(value) if isinstance(value, list) else str(value)
            for name, value in values.items()
        }
        return {**os.environ, **own, "SEGSVC_ENV_FILE": "", "PYTHONPATH": str(REPOSITORY)}

    def start(self, name: str, *arguments: str, **variables: str) -> subprocess.Popen[bytes]:
        """Start a process of ours in a session of its own, with these variables beside the settings."""
        with (self.folder / f"{name}.log").open("ab") as log:
            process = subprocess.Popen(
                [sys.executable, *arguments],
                cwd=REPOSITORY,
                env=self.environment | variables,
                stdout=log,
                stderr=log,
                start_new_session=True,
            )
        self.processes[name] = process
        return process

    def worker(self, queue: str = "operations", *, code: str = "") -> subprocess.Popen[bytes]:
        """Start a worker of a queue. It takes messages when this returns.

        Args:
            code: what its process runs before it becomes a worker.
        """
        run = "from tasks.app import app; app.start(argv=__import__('sys').argv[1:])"
        arguments = ["worker", f"-Q{queue}", "-c2", f"-n{queue}@%h", "--without-gossip", "--without-mingle"]

        process = self.start(queue, "-c", code + run, *arguments)
        self.await_work()
        return process

    def await_work(self, within_s: float = 60) -> None:
        """Put in a task, and return once it is done."""
        task_id = self.put_task("segsvc.finalize", operation_id=str(uuid4()), title="nothing")
        result = f"{self.prefix}celery-task-meta-{task_id}"
        eventually(lambda: self.client.exists(result), within_s)

    def put_task(self, task: str, /, queue: str = "operations", **kwargs: object) -> str:
        """Put a task into a queue as a publisher does. Returns its id."""
        message = self.message(task, queue, **kwargs)
        self.client.lpush(f"{self.prefix}{queue}", json.dumps(message))
        return str(message["headers"]["id"])

    def message(self, task: str, /, queue: str = "operations", **kwargs: object) -> dict[str, Any]:
        """A message as Celery writes it."""
        return task_message(installation_of(self.installation.settings).name, task, queue, **kwargs)

    def run_inside(self, examination: Callable[..., object]) -> str:
        """The output of an examination of ``segsvc doctor`` in a process with this installation's settings."""
        code = (
            "from segsvc.config import load_settings\n"
            f"from {examination.__module__} import {examination.__name__} as examine\n"
            "for item in examine(load_settings()): print(item.text, '->', item.remedy)\n"
        )
        return self.run_script(code)

    def run_script(self, code: str) -> str:
        """Run Python code with this installation's settings. Returns what it prints."""
        command = [sys.executable, "-c", code]
        return subprocess.check_output(command, env=self.environment, cwd=REPOSITORY, text=True)

    def log(self, name: str = "operations") -> str:
        return (self.folder / f"{name}.log").read_text()

    def close(self) -> None:
        for process in self.processes.values():
            with contextlib.suppress(ProcessLookupError):
                os.killpg(process.pid, signal.SIGKILL)
            process.wait(10)


@pytest.fixture(scope="module")
def own_broker(servers_folder: Path) -> Iterator[RedisServer]:
    """A broker that may be stopped and started again, on the same port."""
    server = RedisServer(
        "broker", servers_folder / "own-broker", BROKER_CONFIG, mark=servers_folder, port=free_ports(1)[0]
    )

    server.start()
    try:
        yield server
    finally:
        server.purge()


@pytest.fixture
def workplace(
    pg_server: PostgresServer, cache_server: RedisServer, own_broker: RedisServer, tmp_path: Path
) -> Iterator[Workplace]:
    if not own_broker.running:
        own_broker.start()
    with redis.Redis.from_url(own_broker.url) as broker:
        broker.flushall()

    failpoints = tmp_path / "failpoints"
    failpoints.mkdir()

    with new_installation(
        pg_server,
        shards=SHARDS,
        broker_url=own_broker.url,
        cache_url=cache_server.url,
        failpoint_dir=failpoints,
        log_format="json",
    ) as installation:
        place = Workplace(installation, own_broker, tmp_path)
        try:
            yield place
        finally:
            place.close()
