"""Events that Kafka drops unread are noted, whatever the reason, and stay a finding until they are acknowledged."""

from __future__ import annotations

from collections.abc import Iterator
from dataclasses import dataclass

import pytest
import sqlalchemy as sa
from kafka import TopicPartition
from kafka.admin import KafkaAdminClient

from segsvc.bridge import event_watch
from segsvc.domain.event_records import EventLoss
from segsvc.local.kafka import KafkaServer
from segsvc.local.processes import wait_until
from segsvc.postgres.catalog.event_records import PostgresEventRecords
from tests.integration.events.bench import Bench, new_topics
from tests.integration.events.conftest import MakeShards, Shards
from tests.integration.events.kafka_helpers import InProcessBatches


@pytest.fixture(scope="module")
def shards(make_shards: MakeShards) -> Shards:
    return make_shards(1)


@dataclass
class LossBench(Bench):
    """A bench with an administrator of the broker."""

    admin: KafkaAdminClient
    records: PostgresEventRecords

    def send(self, *user_ids: int, partition: int = 0) -> None:
        for user_id in user_ids:
            self.topics.send_raw("create-user", b'{"user_id": %d}' % user_id, partition=partition)
        self.topics.producer.flush(timeout=30)

    def drop(self, before: int) -> None:
        """Delete the events before this offset, as retention does."""
        self.admin.delete_records({TopicPartition(self.topic, 0): before})

    def losses(self) -> list[EventLoss]:
        found = [found.loss for found in self.records.losses() if found.loss.topic == self.topic]
        return [loss for loss in found if loss.partition == 0]

    def remembered(self) -> int | None:
        found = self.records.positions([self.topic]).get((self.topic, 0))
        return found.next_offset if found else None

    def wait_until_remembered(self, offset: int) -> None:
        assert wait_until(lambda: self.remembered() == offset, timeout_s=30), self.remembered()

    def make_again(self) -> None:
        self.admin.delete_topics([self.topic])
        assert wait_until(lambda: self.topic not in self.admin.list_topics(), timeout_s=30)

        def made() -> bool:
            self.topics.server.create_topics({self.topic: 3})
            return True

        assert wait_until(made, timeout_s=30)


@pytest.fixture
def bench(kafka_server: KafkaServer, shards: Shards, monkeypatch: pytest.MonkeyPatch) -> Iterator[LossBench]:
    if kafka_server.stand_in:
        pytest.skip("the stand-in forgets nothing but itself")
    monkeypatch.setattr(event_watch, "NOTE_EVERY_S", 0.5)
    admin = KafkaAdminClient(bootstrap_servers=kafka_server.bootstrap_servers)
    records = PostgresEventRecords(shards.databases)
    with new_topics(kafka_server, shards) as topics:
        yield LossBench(shards, topics, InProcessBatches(shards.ingestion), admin, records)
    admin.close()


def test_retention_that_passes_a_stopped_bridge_by(bench: LossBench) -> None:
    bench.send(*range(1, 6))
    with bench.bridge():
        bench.wait(5)
    assert bench.losses() == []

    bench.send(*range(6, 21))
    bench.drop(12)

    for _ in range(2):  # once is enough
        with bench.bridge():
            bench.wait(13)
        [loss] = bench.losses()
        assert loss == EventLoss(bench.topic, 0, 5, 12, event_watch.RETENTION)
        assert loss.count_max == 7

    [found] = [found for found in bench.records.losses() if found.loss.topic == bench.topic]
    assert bench.records.acknowledge([found.id]) == 1
    assert bench.records.acknowledge([found.id]) == 0
    assert bench.losses() == []
    assert [one.id for one in bench.records.losses(acknowledged=True) if one.loss.topic == bench.topic] == [found.id]


def test_retention_that_passes_a_bridge_by_that_runs(bench: LossBench) -> None:
    bench.send(1)
    with bench.bridge():
        bench.wait(1)

        bench.batches.broker_down = True
        bench.send(2, 3)
        assert wait_until(lambda: bench.topics.lag() == 2, timeout_s=30)

        bench.batches.broker_down = False
        bench.wait(3)
    assert bench.losses() == []


def test_a_first_start_loses_nothing_and_one_without_offsets_may(bench: LossBench) -> None:
    bench.send(*range(1, 11))
    bench.drop(4)
    with bench.bridge():
        bench.wait(6)
        bench.wait_until_remembered(10)
    assert bench.losses() == []

    bench.admin.delete_groups([bench.topics.settings.kafka_group])

    with bench.bridge():  # the group's offsets have expired, but no unread event was dropped
        bench.wait(6)
    assert bench.losses() == []

    bench.admin.delete_groups([bench.topics.settings.kafka_group])
    bench.send(*range(11, 16))
    bench.drop(13)

    with bench.bridge():
        bench.wait(8)
    assert bench.losses() == [EventLoss(bench.topic, 0, 10, 13, event_watch.EXPIRED)]


@pytest.mark.parametrize("more", [1, 30])  # fewer events than before, and more events than before
def test_a_topic_that_is_made_again_while_the_bridge_is_away(bench: LossBench, more: int) -> None:
    bench.send(*range(1, 11))
    with bench.bridge():
        bench.wait(10)
        bench.wait_until_remembered(10)

    bench.make_again()
    bench.send(*range(101, 101 + more))

    with bench.bridge():
        bench.wait(10 + more)
    assert bench.losses()[0] == EventLoss(bench.topic, 0, 10, None, event_watch.RECREATED)


@pytest.mark.parametrize("more", [1, 30])
def test_a_topic_that_is_made_again_under_the_bridge(bench: LossBench, more: int) -> None:
    bench.send(*range(1, 11))
    with bench.bridge():
        bench.wait(10)
        bench.wait_until_remembered(10)

        bench.make_again()
        bench.send(*range(101, 101 + more))
        bench.wait(10 + more)
        assert wait_until(lambda: len(bench.losses()) > 0, timeout_s=30)

    assert bench.losses()[0] == EventLoss(bench.topic, 0, 10, None, event_watch.RECREATED)


def test_nothing_is_committed_past_a_loss_that_is_not_noted(bench: LossBench) -> None:
    bench.send(*range(1, 6))
    with bench.bridge():
        bench.wait(5)

    bench.send(*range(6, 11))
    bench.drop(8)
    lag = bench.topics.lag()

    with bench.shards.databases.catalog_tx() as connection:
        connection.execute(sa.text("ALTER TABLE event_losses RENAME TO away"))

    with bench.bridge():
        assert wait_until(lambda: bench.users() == 7, timeout_s=30)  # the events do not wait for the note
        assert bench.topics.lag() == lag

        with bench.shards.databases.catalog_tx() as connection:
            connection.execute(sa.text("ALTER TABLE away RENAME TO event_losses"))
        bench.wait(7)

    assert bench.losses() == [EventLoss(bench.topic, 0, 5, 8, event_watch.RETENTION)]
