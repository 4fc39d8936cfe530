"""The fault of the client that the bridge's consumer makes up for when a partition is paused."""

from __future__ import annotations

from collections.abc import Iterator
from uuid import uuid4

import pytest
from kafka import TopicPartition

from segsvc.bridge.clients import make_consumer
from segsvc.config import Settings
from segsvc.local.kafka import KafkaServer
from tests.eventually import eventually
from tests.integration.events.kafka_helpers import Topics

EVENTS = 60
AT_ONCE = 10


@pytest.fixture
def topics(kafka_server: KafkaServer) -> Iterator[Topics]:
    prefix = f"test-{uuid4().hex[:12]}."
    made = Topics(
        kafka_server,
        Settings(
            _env_file=None,
            kafka_bootstrap_servers=kafka_server.bootstrap_servers,
            kafka_stand_in=kafka_server.stand_in,
            kafka_topic_prefix=prefix,
            kafka_group=prefix,
        ),
    )
    yield made
    made.close()


def test_what_was_paused_half_read_is_read_to_its_end(topics: Topics) -> None:
    for partition in (0, 1):
        for number in range(EVENTS):
            topics.send_raw("create-user", b"%d" % number, partition=partition)
    topics.producer.flush(timeout=30)

    name = f"{topics.settings.kafka_topic_prefix}create-user"
    consumer = make_consumer(topics.settings, AT_ONCE)
    read: dict[TopicPartition, int] = {TopicPartition(name, partition): 0 for partition in (0, 1)}

    def take() -> bool:
        for where, records in consumer.poll(timeout_ms=200).items():
            read[where] += len(records)
        return any(read.values())

    def took(where: TopicPartition, count: int) -> bool:
        take()
        return read[where] == count

    try:
        consumer.subscribe(topics=[name])
        eventually(take)  # a poll returns at most AT_ONCE records, those of one partition first

        [half_read] = [where for where, count in read.items() if count]
        [other] = set(read) - {half_read}

        consumer.pause(half_read)
        eventually(lambda: took(other, EVENTS))
        assert read[half_read] == AT_ONCE

        consumer.resume(half_read)
        eventually(lambda: took(half_read, EVENTS))
    finally:
        consumer.close(autocommit=False)
