"""The broker dies, hangs or cuts connections, over and over, under workers that hold messages: none stays deaf.

After each fault every worker takes messages again, or it ends and its supervisor starts the next one; recovery and the
bridge go on meanwhile.
"""

from __future__ import annotations

import contextlib
import itertools
import json
import random
import socket
import time
import urllib.request
from collections.abc import Callable
from uuid import uuid4

import grpc
import pytest
import redis

from segsvc.bootstrap import installation_of
from segsvc.config import Settings
from segsvc.local.processes import wait_until
from segsvc.local.redis import RedisServer
from tasks.watchdog import END_WITHIN_S
from tests.broker_messages import task_message
from tests.e2e.events import producer
from tests.eventually import eventually
from tests.infrastructure.system import ALONE, System
from tests.infrastructure.test_broker import START_S

ROUNDS = 40
TASKS = 60
"""Messages in each queue when the fault begins: more than a worker takes at once, so that it always holds some."""
GOES_ON_WITHIN_S = END_WITHIN_S + START_S
"""A worker that ends has its bound for that, and then it starts again."""
NEWCOMERS = itertools.count(2_000_000)

Fault = Callable[[RedisServer, random.Random], None]


def killed(broker: RedisServer, chance: random.Random) -> None:
    broker.kill()
    time.sleep(chance.choice((0.0, 0.5, 3.0, 6.0)))  # down: workers meet a refusal at each step of their end
    broker.start()


def stopped(broker: RedisServer, chance: random.Random) -> None:
    broker.stop()
    time.sleep(chance.choice((0.0, 1.5)))
    broker.start()


def killed_twice(broker: RedisServer, chance: random.Random) -> None:
    killed(broker, chance)
    time.sleep(2 * chance.random())  # some workers have connected again, some have not
    killed(broker, chance)


def hung_and_killed(broker: RedisServer, chance: random.Random) -> None:
    """It answers nothing, for less or more than the clients' timeouts, and then it is gone."""
    broker.pause()
    time.sleep(chance.choice((1.0, 7.0)))
    killed(broker, chance)


def closes_connections(broker: RedisServer, chance: random.Random) -> None:
    """Something accepts connections at its address and closes them at once, as a proxy without its server does."""
    broker.kill()
    with socket.socket() as ear:
        ear.setsockopt(socket.SOL_SOCKET, socket.SO_REUSEADDR, 1)
        ear.settimeout(0.1)
        eventually(lambda: _listens(ear, broker.port))
        until = time.monotonic() + chance.choice((1.0, 4.0))
        while time.monotonic() < until:
            with contextlib.suppress(TimeoutError):
                ear.accept()[0].close()
    eventually(lambda: _starts(broker))


def cuts_connections(broker: RedisServer, chance: random.Random) -> None:
    """It cuts connections at random while it goes on, so that a worker loses some of its connections and keeps some."""
    with redis.Redis.from_url(broker.url) as client:
        for _ in range(20):
            for connection in client.client_list():
                if connection["cmd"] != "client|list" and chance.random() < 0.5:
                    client.client_kill_filter(_id=connection["id"])
            time.sleep(0.05)


FAULTS: tuple[Fault, ...] = (
    killed, cuts_connections, stopped, killed_twice, hung_and_killed, closes_connections,
)  # fmt: skip


def _listens(ear: socket.socket, port: int) -> bool:
    """Whether the port could be taken: a child of the killed server may still have it."""
    try:
        ear.bind(("127.0.0.1", port))
        ear.listen(50)
    except OSError:
        return False
    return True


def _starts(broker: RedisServer) -> bool:
    broker.start()
    return broker.running


class Queues:
    """Puts tasks into the workers' queues and sees whether they are done."""

    def __init__(self, system: System) -> None:
        self._system = system
        self._installation = installation_of(system.settings).name
        self._broker = redis.Redis.from_url(system.broker.url)

    def put(self, queue: str, count: int = 1) -> str:
        """Put tasks without an effect into a queue. Returns the id of the last."""
        task, arguments = {
            "operations": ("segsvc.finalize", {"operation_id": str(uuid4()), "title": "nothing"}),
            "events": ("segsvc.apply_events", {"shard": ALONE, "batch": str(uuid4())}),
            "warming": ("segsvc.warm_shard", {"shard": ALONE}),
        }[queue]
        messages = [task_message(self._installation, task, queue, **arguments) for _ in range(count)]
        self._broker.lpush(f"{self._system.prefix}{queue}", *map(json.dumps, messages))
        return str(messages[-1]["headers"]["id"])

    def done(self, queue: str, task_id: str) -> bool:
        """Whether a task has been done; a task of warming has no result, and is done when its queue is empty."""
        try:
            if queue == "warming":
                return not self._broker.llen(f"{self._system.prefix}{queue}")
            return bool(self._broker.exists(f"{self._system.prefix}celery-task-meta-{task_id}"))
        except redis.RedisError:
            return False


def a_round(system: System, slug: str, fault: Fault, chance: random.Random) -> None:
    """One fault while each queue is full and a rollout is prepared on two shards; then everything goes on."""
    queues = Queues(system)
    with system.armed("prepared-not-voted", f"hold shard={ALONE}") as point:
        name = system.begin(slug, chance.randrange(5, 95))
        point.await_fired()
        for queue in ("operations", "events", "warming"):
            queues.put(queue, TASKS)
        fault(system.broker, chance)

    probes = {queue: queues.put(queue) for queue in ("operations", "events", "warming")}
    for queue, task_id in probes.items():
        alive = wait_until(lambda queue=queue, task_id=task_id: queues.done(queue, task_id), timeout_s=GOES_ON_WITHIN_S)
        assert alive, f"the {queue} worker takes no messages after {fault.__name__}"

    eventually(lambda: system.state(name) in ("DONE", "ABORTED"), GOES_ON_WITHIN_S)
    eventually(system.workers_answer, GOES_ON_WITHIN_S)


def cut_and_killed(broker: RedisServer, chance: random.Random) -> None:
    cuts_connections(broker, chance)
    broker.kill()
    broker.start()


def test_workers_outlive_their_broker(system: System, slug: str) -> None:
    system.new_segment(slug, 20)
    a_round(system, slug, cut_and_killed, random.Random(1))


@pytest.mark.infrastructure
def test_workers_outlive_their_broker_many_times(
    system: System, slug: str, bridged: Settings, record_property: Callable[[str, object], None]
) -> None:
    system.new_segment(slug, 20)
    chance = random.Random()
    for number, fault in enumerate(itertools.islice(itertools.cycle(FAULTS), ROUNDS), 1):
        a_round(system, slug, fault, chance)

        # The bridge goes on too.
        user = next(NEWCOMERS)
        with producer(bridged) as send:
            send(f"{bridged.kafka_topic_prefix}create-user", [{"user_id": user, "attributes": {}}])
        eventually(lambda user=user: _exists(system, user), GOES_ON_WITHIN_S)  # type: ignore[misc]
        system.users.append(user)
        eventually(lambda: _well(bridged.bridge_metrics_address), GOES_ON_WITHIN_S)

        record_property("rounds", number)

    system.client.roll_out(slug, 60)
    system.expect_well(slug, 60)


def _exists(system: System, user: int) -> bool:
    with contextlib.suppress(grpc.RpcError):
        [(_, slugs)] = system.client.many_user_segments([user])
        return slugs is not None
    return False


def _well(address: str) -> bool:
    with contextlib.suppress(OSError), urllib.request.urlopen(f"http://{address}/health", timeout=5) as answer:
        return bool(answer.status == 200)
    return False
