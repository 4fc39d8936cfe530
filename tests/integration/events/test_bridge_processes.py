"""The bridge and the workers as processes, on real Kafka, Redis and PostgreSQL, killed at the worst moments."""

from __future__ import annotations

import json
import os
import signal
import subprocess
import sys
from collections.abc import Iterator
from dataclasses import dataclass, field
from pathlib import Path
from uuid import uuid4

import pytest
import redis
import sqlalchemy as sa

from segsvc.bootstrap import installation_of
from segsvc.bridge.dead_letters import REASON_HEADER
from segsvc.bridge.flows import RESULT_WAIT_S
from segsvc.local.kafka import KafkaServer
from segsvc.local.processes import wait_until
from segsvc.local.redis import RedisServer
from segsvc.postgres import tables
from tasks.events import EVENTS_MARGIN_S
from tests.integration.events.conftest import MakeShards, Shards
from tests.integration.events.kafka_helpers import Topics
from tests.integration.events.shard_view import view

REPOSITORY = Path(__file__).resolve().parents[3]
BRIDGE = (
    "from segsvc.config import load_settings; from segsvc.bridge.bridge import run_bridge; run_bridge(load_settings())"
)
WORKER = [
    "-A",
    "tasks.app",
    "worker",
    "-Q",
    "events",
    "-c",
    "2",
    "--without-gossip",
    "--without-mingle",
]


@dataclass
class Stack:
    shards: Shards
    topics: Topics
    broker_url: str
    folder: Path
    env: dict[str, str]
    processes: list[subprocess.Popen[bytes]] = field(default_factory=list)

    def start(self, *arguments: str, name: str) -> subprocess.Popen[bytes]:
        with (self.folder / f"{name}.log").open("ab") as log:
            process = subprocess.Popen(
                [sys.executable, *arguments],
                cwd=REPOSITORY,
                env=self.env,
                stdout=log,
                stderr=log,
                start_new_session=True,
            )
        self.processes.append(process)
        return process

    def bridge(self, code: str = "") -> subprocess.Popen[bytes]:
        """Start a bridge. ``code`` runs before."""
        return self.start("-c", code + BRIDGE, name="bridge")

    def worker(self, code: str = "") -> subprocess.Popen[bytes]:
        """Start a worker of the events. ``code`` runs before it becomes one."""
        become = "import sys; from celery.__main__ import main; sys.argv[0] = 'celery'; main()"
        return self.start("-c", code + become, *WORKER, name="worker")

    @property
    def prefix(self) -> str:
        """The prefix of all names on the broker."""
        return installation_of(self.shards.settings).broker_prefix

    @property
    def failpoints(self) -> Path:
        return self.folder / "failpoints"

    def users(self) -> int:
        total = 0
        for shard in range(2):
            with self.shards.databases.shard_tx(shard) as connection:
                total += connection.execute(sa.select(tables.shard_state.c.user_count)).scalar_one()
        return total

    def wait_for_users(self, count: int) -> None:
        assert wait_until(lambda: self.users() == count, timeout_s=60), f"{self.users()} users, not {count}"

    def wait_for_commit(self) -> None:
        assert wait_until(lambda: self.topics.lag() == 0, timeout_s=60), f"lag {self.topics.lag()}"

    def close(self) -> None:
        for process in self.processes:
            if process.poll() is None:
                os.killpg(process.pid, signal.SIGKILL)
                process.wait(10)


@pytest.fixture
def stack(
    kafka_server: KafkaServer,
    broker_server: RedisServer,
    cache_server: RedisServer,
    make_shards: MakeShards,
    tmp_path: Path,
) -> Iterator[Stack]:
    prefix = f"test-{uuid4().hex[:12]}."
    shards = make_shards(
        2,
        kafka_bootstrap_servers=kafka_server.bootstrap_servers,
        kafka_stand_in=kafka_server.stand_in,
        kafka_topic_prefix=prefix,
        kafka_group=prefix,
        broker_url=broker_server.url,
        cache_url=cache_server.url,
        failpoint_dir=tmp_path / "failpoints",
        event_batch_max=200,
    )

    shards.add_segment(1, 40_000)
    (tmp_path / "failpoints").mkdir()

    values = shards.settings.model_dump(mode="json", exclude_none=True)
    env = {
        **os.environ,
        **{
            f"SEGSVC_{name.upper()}": " ".join(value) if isinstance(value, list) else str(value)
            for name, value in values.items()
        },
        "SEGSVC_ENV_FILE": "",
        "PYTHONPATH": str(REPOSITORY),
    }

    with redis.Redis.from_url(broker_server.url) as broker:
        broker.flushall()

    running = Stack(shards, Topics(kafka_server, shards.settings), broker_server.url, tmp_path, env)
    yield running
    running.close()
    running.topics.close()


def test_the_bridge_killed_between_effects_and_commit(stack: Stack) -> None:
    armed = stack.failpoints / "bridge-before-commit"
    stack.worker()
    armed.write_text("kill")
    bridge = stack.bridge()
    stack.topics.create(range(1, 501))

    assert bridge.wait(60) == -signal.SIGKILL
    assert stack.users() > 0, "it dies at its first commit, which follows effects"
    assert stack.topics.lag() == 500

    armed.unlink()
    bridge = stack.bridge()
    stack.wait_for_users(500)
    stack.wait_for_commit()

    armed.write_text("kill")
    stack.topics.send("update-user", [{"user_id": n, "version": 3, "attributes": {"x": 1.5}} for n in range(1, 51)])

    assert bridge.wait(60) == -signal.SIGKILL
    assert stack.topics.lag() == 50
    assert any(user.version == 3 for shard in range(2) for user in view(stack.shards.databases, shard).users.values())

    armed.unlink()
    stack.topics.send_raw("delete-user", b"nonsense")
    bridge = stack.bridge()
    stack.wait_for_commit()

    for shard in range(2):
        users = view(stack.shards.databases, shard).users
        assert {user_id: user.row_version for user_id, user in users.items() if user.version} == {
            n: 1 for n in range(1, 51) if n % 2 == shard
        }, "what came again had no effect"
    assert stack.topics.read("delete-user.dlq", 1)[0].value == b"nonsense"

    bridge.terminate()
    assert bridge.wait(30) == 0


def test_workers_killed_and_the_broker_flushed(stack: Stack) -> None:
    worker = stack.worker()
    stack.bridge()
    (stack.failpoints / "events-committed-not-reported").write_text("kill shard=1")
    stack.topics.create(range(1, 101))

    assert wait_until((stack.failpoints / "events-committed-not-reported.fired").exists, timeout_s=60)
    (stack.failpoints / "events-committed-not-reported").unlink()
    stack.wait_for_users(100)
    stack.wait_for_commit()  # a killed child's batch came again at once

    os.killpg(worker.pid, signal.SIGKILL)
    worker.wait(10)

    stack.topics.create(range(101, 201))
    with redis.Redis.from_url(stack.broker_url) as broker:
        assert wait_until(lambda: broker.llen(f"{stack.prefix}events") >= 2, timeout_s=30)
        broker.flushall()

    stack.worker()
    stack.wait_for_users(200)
    stack.wait_for_commit()
    for shard in range(2):
        assert len(view(stack.shards.databases, shard).users) == 100


POISON = 3
KILLED_BY_IT = f"""\
import os, signal
from segsvc.services.ingestion import Ingestion
apply = Ingestion.apply_batch
def apply_batch(self, shard, events):
    if any(event.user_id == {POISON} for event in events):
        os.kill(os.getpid(), signal.SIGKILL)
    return apply(self, shard, events)
Ingestion.apply_batch = apply_batch
"""
"""A worker whose processes are killed by an event, as by the machine when it has no more memory."""


def test_an_event_that_kills_each_process_becomes_a_dead_letter_alone(stack: Stack) -> None:
    worker = stack.worker(KILLED_BY_IT)
    stack.bridge("from segsvc.bridge import flows; flows.FAULT_S, flows.FAULT_TRIES = 0.0, 2\n")

    stack.topics.create(range(1, 5))
    stack.wait_for_users(3)
    stack.wait_for_commit()

    [letter] = stack.topics.read("create-user.dlq", 1)
    assert json.loads(letter.value)["user_id"] == POISON
    assert dict(letter.headers)[REASON_HEADER].startswith(b"WORKER_ENDED")
    assert worker.poll() is None


def test_a_task_without_its_events_sends_for_them_and_none_are_left_behind(stack: Stack) -> None:
    stack.bridge()
    stack.topics.create(range(1, 101))

    with redis.Redis.from_url(stack.broker_url) as broker:
        assert wait_until(lambda: broker.llen(f"{stack.prefix}events") >= 2, timeout_s=30)
        lost = broker.keys(f"{stack.prefix}events:*")
        assert len(lost) == broker.llen(f"{stack.prefix}events")
        assert all(0 < broker.ttl(key) <= RESULT_WAIT_S + EVENTS_MARGIN_S for key in lost)

        broker.delete(*lost)
        stack.worker()
        stack.wait_for_users(100)
        stack.wait_for_commit()
        assert wait_until(lambda: not broker.keys(f"{stack.prefix}events:*"), timeout_s=10)


def test_segment_events_are_published_in_order(stack: Stack) -> None:
    with stack.shards.databases.catalog_tx() as connection:
        for seq in (3, 1, 2):
            connection.execute(
                sa.insert(tables.audit).values(
                    seq=seq, action="edited", segment_id=9, slug="checkout", details={"display_name": f"n{seq}"}
                )
            )

    stack.bridge()
    records = stack.topics.read("segment-events", 3)

    assert [record.key for record in records] == [b"checkout"] * 3
    assert [record.value.split(b",")[0] for record in records] == [b'{"seq":1', b'{"seq":2', b'{"seq":3']

    with stack.shards.databases.catalog_tx() as connection:
        assert wait_until(
            lambda: connection.execute(sa.text("SELECT count(*) FROM audit WHERE NOT published")).scalar_one() == 0,
            timeout_s=10,
        )
