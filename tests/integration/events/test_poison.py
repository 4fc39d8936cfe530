"""A message that cannot be read stops no other message: on a real Kafka, with batches made byte by byte."""

from __future__ import annotations

import itertools
from collections.abc import Iterator
from dataclasses import dataclass
from typing import Any

import psutil
import pytest
from kafka import TopicPartition
from kafka.consumer.fetcher import ConsumerRecord, Fetcher

from segsvc import metrics
from segsvc.bridge import dead_letters, fetcher, flows
from segsvc.local.kafka import KafkaServer
from segsvc.local.processes import wait_until
from tasks.outcomes import TryAgain
from tests import kafka_raw as raw
from tests.integration.events.bench import Bench, new_topics
from tests.integration.events.conftest import MakeShards, Shards
from tests.integration.events.kafka_helpers import InProcessBatches
from tests.unit.test_kafka_batches import bomb

MEGABYTE = 1 << 20


@pytest.fixture(scope="module")
def shards(make_shards: MakeShards) -> Shards:
    return make_shards(1)


@dataclass
class PoisonBench(Bench):
    """A bench with a producer that sends any bytes as a batch."""

    producer: raw.RawProducer

    def produce(self, data: bytes, topic: str = "create-user", partition: int = 0) -> None:
        self.producer.produce(self.prefix + topic, partition, data)

    def letters(self, count: int) -> list[ConsumerRecord]:
        found = self.topics.read("create-user.dlq", count)
        return sorted(found, key=lambda letter: int(header(letter, "offset")))


def header(letter: ConsumerRecord, name: str) -> str:
    return dict(letter.headers).get(f"segsvc-{name}", b"").decode()


@pytest.fixture
def bench(kafka_server: KafkaServer, shards: Shards, monkeypatch: pytest.MonkeyPatch) -> Iterator[PoisonBench]:
    if kafka_server.stand_in:
        pytest.skip("the stand-in looks at what it is given in its own way")
    monkeypatch.setattr(fetcher, "REST_S", 0.2)

    producer = raw.RawProducer(kafka_server.bootstrap_servers)
    with new_topics(kafka_server, shards) as topics:
        yield PoisonBench(shards, topics, InProcessBatches(shards.ingestion), producer)
    producer.close()


def event(user_id: int) -> bytes:
    return b'{"user_id": %d}' % user_id


def test_every_codec_and_every_header_is_read(bench: PoisonBench) -> None:
    ids = itertools.count(1)
    for codec in (0, raw.GZIP, raw.SNAPPY, raw.LZ4, raw.ZSTD):
        bench.produce(raw.event_batch([event(next(ids)) for _ in range(10)], codec=codec))
    bench.produce(raw.batch(raw.record(0, event(next(ids)), headers=[(b"\xff\xfe", b"\xff")]), 1))
    with bench.bridge():
        bench.wait(51)


def test_large_ones_and_bombs_are_let_go_in_bounded_memory(bench: PoisonBench) -> None:
    large = b"[" + b" " * 70_000_000 + b"]"
    records = raw.record(0, large, key=b"7") + raw.record(1, event(1))
    bench.produce(raw.batch(records, 2, codec=raw.GZIP))

    for codec, size in ((raw.GZIP, 300), (raw.ZSTD, 900)):
        bench.produce(raw.batch(b"", 1, codec=codec, body=bomb(codec, size * MEGABYTE)))

    bench.produce(raw.event_batch([event(2)]))
    for partition in (1, 2):
        bench.produce(raw.event_batch([event(2 + partition)]), partition=partition)
    bench.produce(raw.event_batch([b'{"user_id": 1, "version": 1, "attributes": {}}']), topic="update-user")
    del records

    before = psutil.Process().memory_info().rss
    with bench.bridge():
        bench.wait(4)
        assert psutil.Process().memory_info().rss - before < 200 * MEGABYTE

    first, *bombs = bench.letters(3)
    assert (header(first, "offset"), header(first, "bytes")) == ("0", str(len(large)))
    assert header(first, "reason") == f"event: must be at most 65536 bytes, is {len(large)}"
    assert (first.key, first.value) == (b"7", large[:65536])
    assert [len(letter.value) for letter in bombs] == [65536] * 2
    assert all("inflates to more than" in header(letter, "reason") for letter in bombs)


def test_a_flood_of_them_stops_no_other_partition(bench: PoisonBench) -> None:
    """Partition 0 is full of bombs; events of all other partitions and topics are not delayed."""
    data = raw.batch(b"", 1, codec=raw.ZSTD, body=bomb(raw.ZSTD, 300 * MEGABYTE))
    for _ in range(30):
        bench.produce(data)

    with bench.bridge():
        for partition in (1, 2):
            bench.produce(raw.event_batch([event(partition)]), partition=partition)
        assert wait_until(lambda: bench.users() == 2, timeout_s=30)
        assert bench.topics.lag() > 0
        bench.wait(2)

    assert len(bench.letters(30)) == 30


class Damaging:
    """Damages the data that the broker returns for one partition, as a network or a disk may."""

    def __init__(self, monkeypatch: pytest.MonkeyPatch, where: TopicPartition, damage: Any, times: int = 1000) -> None:
        self.times = times
        original = Fetcher._handle_fetch_response

        def handle(fetcher: Fetcher, node_id: int, offsets: Any, sent: float, response: Any) -> None:
            for topic in response.responses:
                for data in topic.partitions:
                    if (topic.topic, data.partition_index) == where and self.times and data.records:
                        self.times -= 1
                        damage(data)
            original(fetcher, node_id, offsets, sent, response)

        monkeypatch.setattr(Fetcher, "_handle_fetch_response", handle)


def flip(at: int) -> Any:
    def damage(data: Any) -> None:
        records = bytearray(data.records)
        records[at] ^= 0xFF
        data.records = bytes(records)

    return damage


def test_what_was_damaged_on_its_way_is_fetched_again(bench: PoisonBench, monkeypatch: pytest.MonkeyPatch) -> None:
    bench.produce(raw.event_batch([event(1), event(2)]))
    bench.produce(raw.event_batch([event(3)]), partition=1)
    Damaging(monkeypatch, TopicPartition(bench.topic, 0), flip(-1), times=fetcher.TRIES - 1)
    with bench.bridge():
        bench.wait(3)


@pytest.mark.parametrize("at", [8, 16, 40, 70])  # the length, the format's number, a number of the header, a record
def test_what_stays_damaged_is_let_go(bench: PoisonBench, monkeypatch: pytest.MonkeyPatch, at: int) -> None:
    bench.produce(raw.event_batch([event(1), event(2)]))
    bench.produce(raw.event_batch([event(3)]))
    bench.produce(raw.event_batch([event(4)]), partition=1)

    unreadable = metrics.events_unreadable.labels("create-user", "damaged")
    before = unreadable._value.get()

    def damage(data: Any) -> None:
        if data.records[7] == 0:  # the batch at offset 0, in any answer
            flip(at)(data)

    Damaging(monkeypatch, TopicPartition(bench.topic, 0), damage)
    with bench.bridge():
        bench.wait(2)

    letters = bench.letters(1)
    assert unreadable._value.get() - before == len(letters)
    assert header(letters[0], "offset") == "0"
    assert header(letters[0], "partition") == "0"
    assert header(letters[0], "content") == "batch"
    assert "damaged" in header(letters[0], "reason")


def test_an_error_of_one_partition_is_its_own(bench: PoisonBench, monkeypatch: pytest.MonkeyPatch) -> None:
    def refuse(data: Any) -> None:
        data.error_code = -1

    bench.produce(raw.event_batch([event(1)]))
    bench.produce(raw.event_batch([event(2)]), partition=1)
    damaging = Damaging(monkeypatch, TopicPartition(bench.topic, 0), refuse)

    with bench.bridge():
        assert wait_until(lambda: bench.users() == 1, timeout_s=30)
        assert wait_until(lambda: metrics.event_partitions_standing._value.get() == 1, timeout_s=30)

        damaging.times = 0
        bench.wait(2)


def test_a_fault_of_ours_costs_the_event_that_meets_it(bench: PoisonBench, monkeypatch: pytest.MonkeyPatch) -> None:
    from segsvc.bridge import bridge

    read = bridge.parse

    def parse(topic: str, value: bytes | None) -> Any:
        if value == b"unlucky":
            raise RecursionError
        return read(topic, value)

    monkeypatch.setattr(bridge, "parse", parse)

    bench.produce(raw.event_batch([event(1), b"unlucky", event(2)]))
    with bench.bridge():
        bench.wait(2)

    assert header(bench.letters(1)[0], "reason") == "event: reading it failed (RecursionError)"


def test_a_restart_in_the_midst_of_it(bench: PoisonBench) -> None:
    for number in range(3):
        bench.produce(raw.event_batch([b" " * 2 * MEGABYTE] * 2, codec=raw.ZSTD))
        bench.produce(raw.event_batch([event(number + 1)]))
        with bench.bridge():
            bench.wait(number + 1)
    assert [header(letter, "offset") for letter in bench.letters(6)] == ["0", "1", "3", "4", "6", "7"]


def test_a_letter_that_its_topic_never_takes_goes_in_part(bench: PoisonBench, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(dead_letters, "TOO_LARGE_AGAIN_S", 0.2)
    monkeypatch.setattr(dead_letters, "TOO_LARGE_TRIES", 3)
    bench.topics.allow("create-user.dlq", 2_000)

    large = b"[" + b"x" * 50_000
    bench.produce(raw.event_batch([large, event(1)]))

    with bench.bridge():
        bench.wait(1)

    [letter] = bench.letters(1)
    assert 500 < len(letter.value) < 2_000
    assert large.startswith(letter.value)
    assert header(letter, "bytes") == str(len(large))


def test_dead_letters_that_wait_pause_their_own_partition(bench: PoisonBench, monkeypatch: pytest.MonkeyPatch) -> None:
    from segsvc.bridge import bridge

    monkeypatch.setattr(bridge, "DEAD_EVENTS_MAX", 50)
    monkeypatch.setattr(dead_letters, "TOO_LARGE_AGAIN_S", 0.2)
    bench.topics.allow("create-user.dlq", 100)  # no letter fits, however short it is cut

    bench.produce(raw.event_batch([b"junk"] * 400))
    for partition in (1, 2):
        bench.produce(raw.event_batch([event(partition)]), partition=partition)

    with bench.bridge():
        assert wait_until(lambda: bench.users() == 2, timeout_s=30)

        bench.topics.allow("create-user.dlq", 100_000)
        bench.wait(2)

    assert len(bench.letters(400)) == 400


def test_an_event_that_makes_its_worker_fail_is_let_go_alone(
    bench: PoisonBench, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr(flows, "FAULT_S", 1.0)
    apply = bench.batches._apply

    def fail_on_user_5(topic: str, shard: int, events: Any) -> Any:
        return TryAgain("INTERNAL") if any(one.user_id == 5 for one in events) else apply(topic, shard, events)

    monkeypatch.setattr(bench.batches, "_apply", fail_on_user_5)

    bench.produce(raw.event_batch([event(number) for number in range(1, 21)]))
    with bench.bridge():
        bench.wait(19)

    [letter] = bench.letters(1)
    assert header(letter, "reason").startswith("INTERNAL")
    assert (header(letter, "offset"), letter.value) == ("4", event(5))
