"""What ``segsvc doctor`` reports about user events: no alarm while all is well, otherwise what the events wait for."""

from __future__ import annotations

import itertools
import threading
import time
from collections.abc import Iterator
from dataclasses import dataclass

import pytest
from kafka import KafkaProducer, TopicPartition
from kafka.admin import KafkaAdminClient

from segsvc.bridge import dead_letters, event_watch
from segsvc.bridge.dead_letter_box import DeadLetterBox, LetterNotFound
from segsvc.cli.doctor import events, running
from segsvc.cli.doctor.items import Item
from segsvc.domain.event_records import WaitFor
from segsvc.local.kafka import KafkaServer
from segsvc.local.processes import wait_until
from segsvc.postgres.catalog.event_records import PostgresEventRecords
from tests.integration.events.bench import Bench, new_topics
from tests.integration.events.conftest import MakeShards, Shards
from tests.integration.events.kafka_helpers import InProcessBatches


@pytest.fixture(scope="module")
def shards(make_shards: MakeShards) -> Shards:
    return make_shards(2)


@dataclass
class DoctorBench(Bench):
    """A bench that the doctor looks at."""

    @property
    def records(self) -> PostgresEventRecords:
        return PostgresEventRecords(self.shards.databases)

    def doctor(self) -> tuple[list[Item], list[Item]]:
        """Items about the topic of creations: those that report a fault, and those that only inform."""
        found = [item for item in running.kafka(self.topics.settings) if self.topic in item.text]
        return [item for item in found if item.remedy], [item for item in found if not item.remedy]

    def transactional(self) -> KafkaProducer:
        producer = KafkaProducer(
            bootstrap_servers=self.topics.settings.kafka_bootstrap_servers, transactional_id=f"{self.topic}-producer"
        )
        producer.init_transactions()
        return producer


@pytest.fixture
def bench(kafka_server: KafkaServer, shards: Shards, monkeypatch: pytest.MonkeyPatch) -> Iterator[DoctorBench]:
    if kafka_server.stand_in:
        pytest.skip("the stand-in knows no transactions and no groups")
    monkeypatch.setattr(events, "WATCH_S", 1.5)
    monkeypatch.setattr(events, "WATCH_MAX_S", 3.0)
    monkeypatch.setattr(event_watch, "NOTE_EVERY_S", 0.5)

    with new_topics(kafka_server, shards) as topics:
        yield DoctorBench(shards, topics, InProcessBatches(shards.ingestion))


def test_a_quiet_topic_behind_a_marker_has_no_lag(bench: DoctorBench) -> None:
    producer = bench.transactional()
    for user_id, commits in ((1, True), (2, False)):
        producer.begin_transaction()
        producer.send(bench.topic, b'{"user_id": %d}' % user_id, partition=0)
        producer.flush()
        (producer.commit_transaction if commits else producer.abort_transaction)()

    # No consumer has read the topic: it has an event, a marker, an aborted event, and a marker.
    [stuck], _ = bench.doctor()
    assert f"{bench.topic}: 1 events wait in partition 0" in stuck.text
    assert f"the consumer group {bench.topics.settings.kafka_group} has no members" in stuck.text

    with bench.bridge():
        bench.wait(1)
        assert bench.doctor() == ([], [Item(f"{bench.topic}: 0 events wait")])

        # A marker that comes later, after no further event that a consumer would read.

        producer.begin_transaction()
        producer.send(bench.topic, b'{"user_id": 3}', partition=0)
        producer.flush()
        producer.abort_transaction()
        bench.wait(1)
    producer.begin_transaction()
    producer.send(bench.topic, b'{"user_id": 3}', partition=0)
    producer.flush()
    producer.abort_transaction()
    producer.close()

    assert bench.doctor() == ([], [Item(f"{bench.topic}: 0 events wait")])  # the same without a bridge


def test_an_open_transaction_is_called_so(bench: DoctorBench, monkeypatch: pytest.MonkeyPatch) -> None:
    producer = bench.transactional()
    with bench.bridge():
        producer.begin_transaction()
        producer.send(bench.topic, b'{"user_id": 1}', partition=0)
        producer.flush()
        bench.topics.send_raw("create-user", b'{"user_id": 2}', partition=0)
        bench.topics.producer.flush()

        wrong, told = bench.doctor()
        assert wrong == []
        assert "2 messages from offset 0 on are behind a producer's transaction, open for " in told[-1].text

        monkeypatch.setattr(events, "TRANSACTION_MAX_S", 0.5)
        time.sleep(0.6)
        [item], _ = bench.doctor()
        assert "abort the transaction" in item.remedy

        producer.commit_transaction()
        bench.wait(2)
    producer.close()


def test_nothing_is_alarming_under_steady_load(bench: DoctorBench) -> None:
    stop = threading.Event()

    def load() -> None:
        for user_id in itertools.count(1):
            bench.topics.send_raw("create-user", b'{"user_id": %d}' % user_id, partition=user_id % 3)
            if stop.wait(0.005):
                return

    sender = threading.Thread(target=load)
    with bench.bridge():
        sender.start()
        try:
            assert wait_until(lambda: bench.users() > 50, timeout_s=30)
            wrong, _ = bench.doctor()
            assert wrong == []
        finally:
            stop.set()
            sender.join()


def test_each_cause_has_its_own_words(bench: DoctorBench, monkeypatch: pytest.MonkeyPatch) -> None:
    with bench.bridge():
        bench.topics.create(range(1, 11))
        bench.wait(10)

        bench.batches.fault = lambda topic, shard: "SHARD_UNAVAILABLE" if shard == 1 else None
        bench.topics.create(range(11, 31))
        assert wait_until(lambda: bool(bench.records.waits()), timeout_s=30)

        [item], _ = bench.doctor()
        assert "the bridge waits for shard 1 (SHARD_UNAVAILABLE)" in item.text
        assert "bring that shard back" in item.remedy

        bench.batches.fault = lambda topic, shard: None
        bench.wait(30)
        assert wait_until(lambda: not bench.records.waits(), timeout_s=30)

        monkeypatch.setattr(dead_letters, "TOO_LARGE_AGAIN_S", 0.5)
        bench.topics.allow("create-user.dlq", 100)
        bench.topics.send_raw("create-user", b"junk", partition=0)
        assert wait_until(lambda: bool(bench.records.waits()), timeout_s=30)

        [item], _ = bench.doctor()
        assert f"a larger max.message.bytes of {bench.topic}.dlq, for {bench.topic}/0 offset" in item.text
        assert "fix the dead-letter topic" in item.remedy

        bench.topics.allow("create-user.dlq", 100_000)
        bench.wait(30)

        bench.batches.broker_down = True
        bench.topics.create([31])
        assert wait_until(lambda: any(wait.kind is WaitFor.BROKER for wait in bench.records.waits()), timeout_s=30)

        [item], _ = bench.doctor()
        assert item.remedy.startswith("see the broker above")

        bench.batches.broker_down = False
        bench.wait(31)


def test_what_retention_took_is_a_finding_until_it_is_acknowledged(bench: DoctorBench) -> None:
    for user_id in range(1, 11):
        bench.topics.send_raw("create-user", b'{"user_id": %d}' % user_id, partition=0)
    bench.topics.producer.flush()

    with bench.bridge():
        bench.wait(10)

    for user_id in range(11, 21):
        bench.topics.send_raw("create-user", b'{"user_id": %d}' % user_id, partition=0)
    bench.topics.producer.flush()

    admin = KafkaAdminClient(bootstrap_servers=bench.topics.settings.kafka_bootstrap_servers)
    admin.delete_records({TopicPartition(bench.topic, 0): 16})
    admin.close()

    wrong, _ = bench.doctor()
    assert [item.text for item in wrong if "retention" in item.text] == [
        f"{bench.topic}/0: Kafka's retention has dropped offsets 10 to 15 unread (6)"
    ]

    with bench.bridge():
        bench.wait(14)
        [item], _ = bench.doctor()
        assert f"{bench.topic}: lost at most 6 events, in partition 0: 10 to 15" in item.text

        [found] = [one for one in bench.records.losses() if one.loss.topic == bench.topic]
        bench.records.acknowledge([found.id])
        assert bench.doctor()[0] == []


def test_dead_letters_are_counted_sent_once_and_dismissed(bench: DoctorBench) -> None:
    for number in range(7):
        bench.topics.send_raw("create-user", b"junk %d" % number, partition=0)
    bench.topics.send_raw("create-user", b"[" + b" " * 900_000, partition=0)
    box = DeadLetterBox(bench.topics.settings, bench.records)

    def waiting(count: int) -> bool:
        return wait_until(lambda: len(list(box.letters(only_new=True))) == count, timeout_s=30)

    with bench.bridge():
        bench.wait(0)
        assert waiting(8)
        assert bench.doctor() == (
            [],
            [
                Item(f"{bench.topic}: 0 events wait"),
                Item(f"{bench.topic}.dlq: 8 dead letters wait; see `segsvc events dead list --new`"),
            ],
        )

        first = box.letter("create-user/0/0")
        assert box.retry(first)
        assert box.letter(first.id).done
        assert waiting(8)  # the event is still wrong: a new letter took the place of the old one
        assert len(list(box.letters())) == 9

        for _ in range(3):  # the number of letters does not grow
            *_, last = box.retry_all()
            assert last == (8, 0, 8)
            bench.wait(0)
            assert waiting(8)

    assert list(box.retry_all())[-1] == (8, 0, 8)
    assert list(box.retry_all()) == []  # letters that were sent again are not sent once more

    box.dismiss(box.letter("create-user/0/1"))
    assert box.dismiss_all() == 0

    with pytest.raises(LetterNotFound):
        box.letter("create-user/0/4711")
    box.close()


def test_a_letter_that_is_only_a_part_is_not_sent_again(bench: DoctorBench) -> None:
    bench.topics.allow("create-user", 4_000_000)
    bench.topics.send_raw("create-user", b"[" + b" " * 2_000_000, partition=0)
    bench.topics.send_raw("create-user", b"junk", partition=0)

    box = DeadLetterBox(bench.topics.settings, bench.records)
    with bench.bridge():
        bench.wait(0)

    letters = list(box.letters())
    assert [(letter.whole, letter.size) for letter in letters] == [(False, 2_000_001), (True, None)]

    assert list(box.retry_all()) == [(1, 1, 2)]
    assert list(box.retry_all()) == [(0, 1, 1)]

    assert box.dismiss_all() == 1
    assert list(box.letters(only_new=True)) == []
    box.close()
