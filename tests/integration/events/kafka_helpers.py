"""Topics for a single test on the session's Kafka, and the bridge run in this process."""

from __future__ import annotations

import json
import threading
from collections.abc import Callable, Collection, Iterable, Mapping, Sequence
from concurrent.futures import Future, ThreadPoolExecutor
from typing import Any, Self

from kafka import KafkaConsumer, KafkaProducer, TopicPartition
from kafka.admin import ConfigResource, ConfigResourceType, KafkaAdminClient
from kafka.consumer.fetcher import ConsumerRecord

from segsvc.bridge.bridge import Bridge
from segsvc.bridge.clients import make_producer
from segsvc.config import Settings
from segsvc.domain.errors import LockTimeout, ServiceError, broker_unavailable
from segsvc.domain.events import TOPICS, UserEvent
from segsvc.failpoints import CrashPoints, NoFailpoints
from segsvc.local.kafka import KafkaServer
from segsvc.services.ingestion import Ingestion
from tasks.outcomes import Outcome, TryAgain

PARTITIONS = 3


class Topics:
    """The three topics and their dead letters, under a prefix of their own."""

    def __init__(self, server: KafkaServer, settings: Settings, *, dead_letters: bool = True) -> None:
        self.settings = settings
        self.server = server
        self._prefix = settings.kafka_topic_prefix
        names = [self._prefix + topic for topic in TOPICS]
        server.create_topics({**dict.fromkeys(names, PARTITIONS), f"{self._prefix}segment-events": 1})
        if dead_letters:
            self.create_dead_letters()
        self.producer: KafkaProducer = make_producer(settings)

    def create_dead_letters(self) -> None:
        self.server.create_topics({f"{self._prefix}{topic}.dlq": 1 for topic in TOPICS})

    def allow(self, topic: str, bytes_max: int) -> None:
        """Set the largest message that a topic takes."""
        admin = KafkaAdminClient(bootstrap_servers=self.server.bootstrap_servers)
        options = {"max.message.bytes": str(bytes_max)}
        admin.alter_configs([ConfigResource(ConfigResourceType.TOPIC, self._prefix + topic, options)])
        admin.close()

    def send(self, topic: str, events: Iterable[Mapping[str, Any]]) -> None:
        """Send events as a producer of user events does: keyed by user."""
        for event in events:
            self.send_raw(topic, json.dumps(event).encode(), str(event["user_id"]).encode())
        self.producer.flush(timeout=30)

    def send_raw(self, topic: str, value: bytes | None, key: bytes | None = b"k", partition: int | None = None) -> None:
        self.producer.send(self._prefix + topic, value=value, key=key, partition=partition)

    def create(self, user_ids: Iterable[int]) -> None:
        self.send("create-user", ({"user_id": user_id, "attributes": {"n": user_id}} for user_id in user_ids))

    def _consumer(self, **options: Any) -> KafkaConsumer:
        version = (2, 0) if self.settings.kafka_stand_in else None
        return KafkaConsumer(bootstrap_servers=self.settings.kafka_bootstrap_servers, api_version=version, **options)

    def lag(self) -> int:
        """Events that are not committed yet."""
        consumer = self._consumer(group_id=self.settings.kafka_group, enable_auto_commit=False)
        try:
            where = [one for topic in TOPICS for one in _partitions(consumer, self._prefix + topic)]
            ends = consumer.end_offsets(where)
            return sum(ends[one] - (consumer.committed(one) or 0) for one in where)
        finally:
            consumer.close()

    def read(self, topic: str, count: int) -> list[ConsumerRecord]:
        """The first messages of a topic, at least ``count``; fails if they do not come."""
        consumer = self._consumer(auto_offset_reset="earliest")
        try:
            consumer.assign(_partitions(consumer, self._prefix + topic))
            records: list[ConsumerRecord] = []
            for _ in range(100):
                for batch in consumer.poll(timeout_ms=200).values():
                    records += batch
                if len(records) >= count:
                    return records
        finally:
            consumer.close()
        raise AssertionError(f"{len(records)} messages on {topic}, not {count}")

    def close(self) -> None:
        self.producer.close(timeout=5)


def _partitions(consumer: KafkaConsumer, topic: str) -> list[TopicPartition]:
    return [TopicPartition(topic, number) for number in sorted(consumer.partitions_for_topic(topic) or ())]


class InProcessBatches:
    """Workers as threads of this process, with the faults that a test sets. Implements ``flows.Batches``."""

    def __init__(self, ingestion: Ingestion) -> None:
        self._ingestion = ingestion
        self._pool = ThreadPoolExecutor(2)
        self._running: dict[str, Future[Outcome]] = {}
        self._count = 0
        self.sent: list[tuple[str, int, int]] = []
        self.fault: Callable[[str, int], str | None] = lambda topic, shard: None
        """Why a batch must come again; None: it is applied."""
        self.broker_down = False

    def send(self, topic: str, shard: int, events: Sequence[UserEvent], expire_s: float) -> str:
        if self.broker_down:
            raise broker_unavailable()
        self._count += 1
        self.sent.append((topic, shard, len(events)))
        self._running[str(self._count)] = self._pool.submit(self._apply, topic, shard, events)
        return str(self._count)

    def collect(self, batch_ids: Sequence[str]) -> Mapping[str, Outcome]:
        if self.broker_down:
            raise broker_unavailable()
        return {
            batch_id: self._running.pop(batch_id).result() for batch_id in batch_ids if self._running[batch_id].done()
        }

    def begun(self, batch_ids: Sequence[str]) -> Collection[str]:
        return {batch_id for batch_id in batch_ids if self._running[batch_id].running()}

    def _apply(self, topic: str, shard: int, events: Sequence[UserEvent]) -> Outcome:
        reason = self.fault(topic, shard)
        if reason:
            return TryAgain(reason)
        try:
            return self._ingestion.apply_batch(shard, events)
        except (ServiceError, LockTimeout) as error:
            return TryAgain(error.reason.text if isinstance(error, ServiceError) else "LOCK_TIMEOUT")


class RunningBridge:
    """A bridge in a thread."""

    def __init__(self, settings: Settings, batches: InProcessBatches, crash_points: CrashPoints | None = None) -> None:
        self._stop = threading.Event()
        self._bridge = Bridge(settings, batches, crash_points or NoFailpoints())
        self._thread = threading.Thread(target=self._bridge.run, args=(self._stop,), daemon=True)
        self._thread.start()

    def stop(self) -> None:
        self._stop.set()
        self._thread.join(30)
        assert not self._thread.is_alive()

    def __enter__(self) -> Self:
        return self

    def __exit__(self, *_: object) -> None:
        self.stop()
