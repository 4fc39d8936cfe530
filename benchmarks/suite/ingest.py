"""New users, from Kafka until they are readable, beside one row per membership and beside Kafka's client alone."""

from __future__ import annotations

import contextlib
import itertools
import statistics
import time
from collections.abc import Callable, Iterator, Sequence
from dataclasses import dataclass
from functools import partial
from pathlib import Path

import numpy as np
import psutil
import sqlalchemy as sa
from confluent_kafka import Message, Producer
from kafka import KafkaConsumer, TopicPartition

from benchmarks import rows
from benchmarks.harness import (
    Curve,
    Result,
    Sample,
    benchmark,
    cpu_of,
    measure_pair,
    ratio_at_least,
    spread_of,
    suspended,
)
from benchmarks.seed import Shape
from benchmarks.world import World
from segsvc.demo.client import Client
from segsvc.demo.people import event, people
from segsvc.domain.events import CREATE_TOPIC
from segsvc.domain.sharding import shard_of
from segsvc.kafka_options import connection_options
from segsvc.local.kafka import create_topics
from segsvc.local.processes import wait_until
from segsvc.local.stack import LocalStack

EVENTS, ROW_EVENTS = 100_000, 5_000
"""Events in one round of ours and of the rows: each is at least a second of work."""
ALONE_EVENTS = 200_000
"""Upper bound of the events that the client alone consumes in one round, which takes seconds."""
PARTITIONS = 8
ROWS_TOPIC = "benchmark-rows"
ROW_CONSUMERS = 2
"""One per core of the usual machine: a single consumer waits for PostgreSQL half of the time."""
POLL_S = 0.03
TIMEOUT_S = 120.0


def _conditions() -> tuple[str, ...]:
    """Fifty different conditions of one to three comparisons, over the attributes of the demonstration's users."""
    found = []
    for country in ("US", "IN", "BR", "DE", "RU"):
        found += [
            f'user.country == "{country}" && user.platform in ["ios", "android"] && user.age >= 18',
            f'user.country == "{country}" && user.age >= 21',
            f'user.country != "{country}"',
            f'"beta" in user.tags || user.country == "{country}"',
            f'has(user.age) && user.age < 30 && user.country in ["{country}", "FR", "JP"]',
        ]
    return (*found, *(f'user.signup_day >= {day} && user.platform == "android"' for day in range(100, 2600, 100)))


SHAPE = Shape(users=0, segments=200, shards=4, conditions=_conditions())


@dataclass(frozen=True, slots=True)
class Events:
    """Events that wait in a topic.

    Attributes:
        last: the user of the last event of each shard in each partition. Events of one shard and partition are applied
            in order: if all of these users exist, the users of all events exist.
    """

    count: int
    last: Sequence[int]


class Loader:
    """Sends the events of users to topics."""

    def __init__(self, bootstrap_servers: str) -> None:
        self._producer = Producer(
            {"bootstrap.servers": bootstrap_servers, "linger.ms": 20, "queue.buffering.max.messages": 1_000_000}
        )

    def put(self, topic: str, users: Sequence[tuple[int, bytes]]) -> Events:
        """Send events. Returns when all are acknowledged."""
        last: dict[tuple[int, int], int] = {}

        def acknowledged(error: object, message: Message) -> None:
            assert error is None, error
            user_id = int(message.key() or b"")
            last[message.partition() or 0, shard_of(user_id, SHAPE.shards)] = user_id

        for user_id, value in users:
            self._producer.produce(topic, value, str(user_id).encode(), on_delivery=acknowledged)
            self._producer.poll(0)
        self._producer.flush()
        return Events(len(users), list(last.values()))


class Ours:
    """The stack, whose bridge is suspended while events are sent to its topic."""

    def __init__(self, stack: LocalStack) -> None:
        self._client = Client.of(stack.settings)
        names = ("bridge", "worker-events", "serve", "postgres", "broker", "cache", "kafka", "kafka-stand-in")
        self.pids = {part.name: part.pid for part in stack.status() if part.name in names and part.pid}
        self._bridge = psutil.Process(self.pids["bridge"])

    def measure(self, loader: Loader, users: Sequence[tuple[int, bytes]]) -> Sample:
        with suspended([self._bridge]):
            events = loader.put(CREATE_TOPIC, users)
        with cpu_of(self.pids) as spent:
            _await_each(events.last, self._is_readable)
        return Sample(events.count / spent.seconds, events.count, spent.cpu_s)

    def _is_readable(self, user_id: int) -> bool:
        return next(self._client.many_user_segments([user_id]))[1] is not None

    def read_all(self, user_ids: Sequence[int]) -> int:
        """Number of these users that can be read."""
        return sum(slugs is not None for _, slugs in self._client.many_user_segments(user_ids))


class Rows:
    """The plain consumers and their tables. They, too, are suspended while events are sent."""

    def __init__(self, world: World, stack: LocalStack, pids: dict[str, int]) -> None:
        self._exit = contextlib.ExitStack()
        self.engines = [sa.create_engine(dsn) for dsn in stack.settings.shard_dsns]
        for engine in self.engines:
            with engine.begin() as connection:
                connection.exec_driver_sql(rows.SCHEMA)
                connection.exec_driver_sql(rows.INDEXES)
                connection.exec_driver_sql("INSERT INTO peer.segments SELECT id, slug FROM segments ORDER BY id")

        create_topics(connection_options(stack.settings), {ROWS_TOPIC: PARTITIONS})
        self._consumers = [self._start(world, stack, number) for number in range(ROW_CONSUMERS)]

        self.pids = {
            **{f"consumer {n + 1}": process.pid for n, process in enumerate(self._consumers)},
            **{name: pid for name, pid in pids.items() if name in ("postgres", "kafka", "kafka-stand-in")},
        }

    def _start(self, world: World, stack: LocalStack, number: int) -> psutil.Process:
        ready = Path(stack.home / f"row-consumer-{number}.ready")
        arguments = ("-m", "benchmarks.peers.row_consumer", ROWS_TOPIC, str(number), str(ROW_CONSUMERS), str(ready))
        pid = self._exit.enter_context(
            world.process(f"row-consumer-{number}", *arguments, ready=ready.exists, settings=stack.settings)
        )
        return psutil.Process(pid)

    def measure(self, loader: Loader, users: Sequence[tuple[int, bytes]]) -> Sample:
        with suspended(self._consumers):
            events = loader.put(ROWS_TOPIC, users)
        with cpu_of(self.pids) as spent:
            _await_each(events.last, self._is_stored)
        return Sample(events.count / spent.seconds, events.count, spent.cpu_s)

    def _is_stored(self, user_id: int) -> bool:
        with self.engines[shard_of(user_id, SHAPE.shards)].connect() as connection:
            found = connection.exec_driver_sql("SELECT 1 FROM peer.users WHERE id = %s", (user_id,))
            return found.first() is not None

    def prove_same(self) -> int:
        """Compare the memberships of all users that both sides have. Returns the number of memberships.

        Raises:
            AssertionError: they differ, or there are none.
        """
        total = 0
        for engine in self.engines:
            with engine.connect() as connection:
                ids = np.array(connection.exec_driver_sql("SELECT id FROM peer.users").scalars().all(), dtype=np.int64)
                slots = int(connection.exec_driver_sql("SELECT next_slot FROM shard_state").scalar_one())
                shape = Shape(users=slots, segments=SHAPE.segments)
                for segment_id, by_bits in rows.members_by_bits(connection, shape):
                    mine = np.sort(by_bits[np.isin(by_bits, ids)])
                    assert np.array_equal(mine, rows.members_by_rows(connection, segment_id)), segment_id
                    total += mine.size

        assert total
        return total

    def close(self) -> None:
        self._exit.close()
        for engine in self.engines:
            engine.dispose()


def _await_each(user_ids: Sequence[int], is_there: Callable[[int], bool]) -> None:
    """Wait for one user after another, so that polling costs almost nothing."""
    for user_id in user_ids:
        if not wait_until(partial(is_there, user_id), timeout_s=TIMEOUT_S, poll_s=POLL_S):
            raise TimeoutError(f"user {user_id} did not arrive in {TIMEOUT_S:g} s")


def _consume_alone(bootstrap_servers: str) -> float:
    """Events per second that kafka-python delivers, without any processing, from the last events of the topic."""
    consumer = KafkaConsumer(bootstrap_servers=bootstrap_servers.split(","), enable_auto_commit=False)
    numbers = sorted(consumer.partitions_for_topic(CREATE_TOPIC) or ())
    partitions = [TopicPartition(CREATE_TOPIC, number) for number in numbers]
    consumer.assign(partitions)
    ends = consumer.end_offsets(partitions)
    for partition in partitions:
        consumer.seek(partition, max(0, ends[partition] - ALONE_EVENTS // len(partitions)))
    left = sum(min(ends[partition], ALONE_EVENTS // len(partitions)) for partition in partitions)

    consumed = 0
    begun = time.perf_counter()
    for _ in itertools.islice(consumer, left):
        consumed += 1
    seconds = time.perf_counter() - begun

    consumer.close(autocommit=False)
    return consumed / seconds


@benchmark("ingest")
def ingest(world: World) -> Iterator[Result | Curve]:
    """create-user events from Kafka to readable over gRPC, 200 live segments (50 with conditions), 4 shards."""
    alone: list[float] = []
    # The warmer is off: it would fill the cache with the new users meanwhile. The benchmark ``warm`` measures it.
    with world.stack(SHAPE, cache_warm_budget_bytes=0) as stack, contextlib.ExitStack() as undo:
        servers = stack.settings.kafka_bootstrap_servers
        ours = Ours(stack)
        plain = Rows(world, stack, ours.pids)
        undo.callback(plain.close)
        loader = Loader(servers)
        source = ((user_id, event(user_id, attributes)) for user_id, attributes in people(20 * EVENTS))
        sent: list[list[tuple[int, bytes]]] = []

        shared = (users[n : n + ROW_EVENTS] for users in sent for n in range(0, EVENTS, ROW_EVENTS))

        def new_users() -> Sample:
            sent.append(list(itertools.islice(source, EVENTS)))
            sample = ours.measure(loader, sent[-1])
            alone.append(_consume_alone(servers))
            return sample

        def by_rows() -> Sample:
            # Users that ours has as well: their memberships are compared at the end.
            return plain.measure(loader, next(shared))

        pair = measure_pair(new_users, by_rows)
        user_ids = [user_id for users in sent for user_id, _ in users]
        assert ours.read_all(user_ids) == len(user_ids)
        same = plain.prove_same()
    del alone[0]  # the round that does not count
    yield pair.result(
        "ingest", "users/s", ratio_at_least(10),
        note=f"the reference: {ROW_CONSUMERS} plain consumers, many rows per statement; both found the "
        f"same {same:,} memberships for the users they share, and all {len(user_ids):,} users were read over gRPC",
    )  # fmt: skip
    reference = statistics.median(alone)
    yield Result(
        "ingest.kafka", pair.ours.median, "users/s", reference, pair.ours.median / reference, ratio_at_least(0.5),
        spread=pair.ours.spread, reference_spread=spread_of(alone), cpu_us_per_call=pair.ours.cpu_us_per_call,
        note="the reference: kafka-python iterates over the same events after each round, without processing them",
        more={"reference_rounds": alone},
    )  # fmt: skip
