"""The bridge on a real Kafka, with workers as threads: offsets follow effects, whatever fails in between."""

from __future__ import annotations

from collections.abc import Iterator

import pytest
import sqlalchemy as sa

from segsvc.bridge.clients import Sender
from segsvc.cli.doctor import running
from segsvc.domain.events import TOPICS
from segsvc.local.kafka import KafkaServer, RealKafka
from segsvc.local.processes import wait_until
from tests.integration.events.bench import Bench, new_topics
from tests.integration.events.conftest import MakeShards, Shards
from tests.integration.events.kafka_helpers import InProcessBatches, RunningBridge, Topics
from tests.integration.events.shard_view import view


@pytest.fixture(scope="module")
def two_shards(make_shards: MakeShards) -> Shards:
    return make_shards(2)


def check(bench: Bench) -> None:
    """Compare every bit of both shards with what the rules say of their users."""
    for shard in range(2):
        view(bench.shards.databases, shard)


@pytest.fixture
def bench(kafka_server: KafkaServer, two_shards: Shards) -> Iterator[Bench]:
    with new_topics(kafka_server, two_shards, event_batch_max=100) as topics:
        two_shards.add_segment(1, 30_000)
        yield Bench(two_shards, topics, InProcessBatches(two_shards.ingestion))


def test_events_become_users_and_offsets_follow(bench: Bench) -> None:
    bench.topics.create(range(1, 1001))

    with bench.bridge():
        bench.wait_for_users(1000)

        bench.topics.send(
            "update-user", [{"user_id": n, "version": 1, "attributes": {"plan": "pro"}} for n in range(1, 101)]
        )
        bench.topics.send("delete-user", [{"user_id": n} for n in range(500, 600)])
        bench.wait_for_users(900)
        bench.wait_for_lag()

    assert view(bench.shards.databases, 1).users[7].attributes == {"plan": "pro"}
    check(bench)

    # A group that was away begins at the offset where it stopped.
    sent = len(bench.batches.sent)

    with bench.bridge():
        bench.topics.create([2001])
        bench.wait_for_users(901)
        bench.wait_for_lag()
    assert len(bench.batches.sent) == sent + 1


def test_unreadable_events_are_dead_letters_with_their_bytes(bench: Bench) -> None:
    bad = [
        (b"not json", b"1"),
        (b'{"user_id": 1.0}', b"2"),
        (b"\xff\xfe\x00", None),
        (None, b"4"),
    ]

    bench.topics.create([1])
    for value, key in bad:
        bench.topics.send_raw("create-user", value, key, partition=1)
    bench.topics.send_raw("update-user", b'{"user_id": 3, "version": 0, "attributes": {}}', b"3", partition=2)
    bench.topics.create([2])

    with bench.bridge():
        bench.wait_for_users(2)
        bench.wait_for_lag()

    letters = sorted(
        bench.topics.read("create-user.dlq", len(bad)), key=lambda letter: dict(letter.headers)["segsvc-offset"]
    )
    assert [(letter.value, letter.key) for letter in letters] == bad

    first = dict(letters[0].headers)
    assert first["segsvc-topic"] == bench.topic.encode()
    assert first["segsvc-partition"] == b"1"
    assert first["segsvc-offset"] == b"0"
    assert first["segsvc-reason"] == b"event: is not JSON: Expecting value at character 0"
    assert dict(letters[1].headers)["segsvc-reason"].startswith(b"user_id: must be an integer")
    assert [dict(letter.headers)["segsvc-offset"] for letter in letters] == [b"0", b"1", b"2", b"3"]

    (update,) = bench.topics.read("update-user.dlq", 1)
    assert dict(update.headers)["segsvc-reason"] == (b"version: must be an integer from 1 to 9223372036854775807, is 0")


def test_a_dead_letter_topic_that_is_missing_holds_back_offsets_and_nothing_else(bench: Bench) -> None:
    if bench.topics.server.stand_in:
        pytest.skip("the stand-in makes topics by itself")

    prefix = f"{bench.prefix}without."
    settings = bench.topics.settings.model_copy(update={"kafka_topic_prefix": prefix, "kafka_group": prefix})
    topics = Topics(bench.topics.server, settings, dead_letters=False)

    complaints = [item.text for item in running.kafka(settings) if item.remedy]
    assert complaints == [f"{prefix}{name}.dlq does not exist: its messages wait" for name in TOPICS]

    topics.send_raw("create-user", b"nonsense", b"1")
    topics.create(range(1, 101))

    [missing] = running.bridge(settings)
    assert missing.text == f"the consumer group {prefix} has no members"

    with RunningBridge(settings, bench.batches):
        bench.wait_for_users(100)
        assert topics.lag() > 0
        assert running.bridge(settings) == []

        topics.create_dead_letters()
        assert wait_until(lambda: topics.lag() == 0, timeout_s=60)

    assert topics.read("create-user.dlq", 1)[0].value == b"nonsense"
    topics.close()


def test_the_largest_event_that_its_topic_takes_becomes_a_dead_letter(bench: Bench) -> None:
    if bench.topics.server.stand_in:
        pytest.skip("the stand-in has no limits")

    # A topic allows 1,048,588 bytes by default, including the head of the batch. A letter's headers do not fit as well.
    largest = b"x" * (1_048_588 - 80)
    bench.topics.send_raw("create-user", largest, b"1")
    bench.topics.create([1])

    with bench.bridge():
        bench.wait_for_users(1)
        bench.wait_for_lag()
    assert bench.topics.read("create-user.dlq", 1)[0].value == largest


def test_a_sender_whose_messages_are_not_taken_in_time_gives_them_up(
    bench: Bench, monkeypatch: pytest.MonkeyPatch
) -> None:
    sender = Sender(bench.topics.settings)
    topic = bench.topic
    assert sender.send(topic, [(b"1", b"first", [])]) == [True]

    monkeypatch.setattr("segsvc.bridge.clients.SEND_TIMEOUT_S", 0.0)
    # Ten megabytes cannot arrive at once, however the threads are scheduled.
    assert not all(sender.send(topic, [(b"1", bytes(100_000), [])] * 100))
    assert sender.failure == "KafkaTimeoutError"

    monkeypatch.undo()
    assert sender.send(topic, [(b"1", b"again", [])]) == [True]

    sender.close()


def test_a_dead_letter_too_large_for_its_topic_holds_back_nothing_else(
    bench: Bench, monkeypatch: pytest.MonkeyPatch
) -> None:
    if bench.topics.server.stand_in:
        pytest.skip("the stand-in has no limits")

    monkeypatch.setattr("segsvc.bridge.dead_letters.TOO_LARGE_AGAIN_S", 0.5)
    bench.topics.allow("create-user.dlq", 20_000)

    large = b"large" * 6_000
    for value in (b"small", large, b"small"):  # one request, as long as it is not refused
        bench.topics.send_raw("create-user", value, b"1", partition=1)
    bench.topics.create([1])

    with bench.bridge():
        bench.wait_for_users(1)
        bench.wait_for_lag(lag=2)  # the large event, and the event after it

        # Events beside it and after it, in its topic and in another topic.
        bench.topics.send_raw("create-user", b"small", b"2", partition=2)
        bench.topics.send_raw("update-user", b"small", b"2", partition=2)
        bench.wait_for_lag(lag=2)
        assert [letter.value for letter in bench.topics.read("create-user.dlq", 3)] == [b"small"] * 3

        bench.topics.allow("create-user.dlq", 60_000)
        bench.wait_for_lag()

    assert [letter.value for letter in bench.topics.read("create-user.dlq", 4)] == [*[b"small"] * 3, large]


def test_an_event_that_the_database_refuses_is_a_dead_letter(bench: Bench) -> None:
    with bench.shards.databases.shard_tx(1) as connection:
        connection.execute(sa.text("ALTER TABLE users ADD CONSTRAINT poison CHECK (id <> 13)"))

    try:
        bench.topics.create(range(1, 51))
        with bench.bridge():
            bench.wait_for_users(49)
            bench.wait_for_lag()
    finally:
        with bench.shards.databases.shard_tx(1) as connection:
            connection.execute(sa.text("ALTER TABLE users DROP CONSTRAINT poison"))

    (letter,) = bench.topics.read("create-user.dlq", 1)
    assert letter.value == b'{"user_id": 13, "attributes": {"n": 13}}'
    assert dict(letter.headers)["segsvc-reason"] == b"the database refused the event (SQLSTATE 23514)"


def test_a_shard_that_is_down_holds_up_only_itself(bench: Bench) -> None:
    bench.batches.fault = lambda topic, shard: "SHARD_UNAVAILABLE" if shard == 1 else None
    bench.topics.create(range(1, 501))

    with bench.bridge():
        bench.wait_for_users(250)
        assert bench.topics.lag() > 0

        bench.topics.create(range(502, 600, 2))
        bench.wait_for_users(299)

        bench.batches.fault = lambda topic, shard: None
        bench.wait_for_users(549)
        bench.wait_for_lag()

    check(bench)


def test_creations_go_on_while_the_cache_is_down(bench: Bench) -> None:
    bench.topics.create(range(1, 101))
    with bench.bridge():
        bench.wait_for_users(100)
        bench.wait_for_lag()

        bench.shards.cache.down = True
        bench.topics.send("delete-user", [{"user_id": n} for n in range(1, 11)])
        bench.wait_for_users(90)  # the effect is stored, and is not acknowledged

        bench.topics.create(range(101, 201))
        bench.wait_for_users(190)
        bench.wait_for_lag(lag=10)

        bench.shards.cache.down = False
        bench.wait_for_lag()

    assert bench.shards.cache.dropped_ids() == set(range(1, 11))


def test_a_task_broker_that_is_down_loses_nothing(bench: Bench) -> None:
    bench.batches.broker_down = True
    bench.topics.create(range(1, 301))
    with bench.bridge():
        bench.topics.create(range(301, 401))
        assert bench.topics.lag() == 400
        bench.batches.broker_down = False
        bench.wait_for_users(400)
        bench.wait_for_lag()


def test_bridges_come_and_go(bench: Bench) -> None:
    first = bench.bridge()
    bench.topics.create(range(1, 501))
    bench.wait_for_users(500)

    with bench.bridge():
        bench.topics.create(range(501, 1001))
        first.stop()

        bench.topics.create(range(1001, 1501))
        bench.wait_for_users(1500)
        bench.wait_for_lag()

    check(bench)


def test_topics_that_appear_after_the_bridge(bench: Bench) -> None:
    prefix = f"{bench.prefix}late."
    settings = bench.topics.settings.model_copy(update={"kafka_topic_prefix": prefix, "kafka_group": prefix})
    with RunningBridge(settings, bench.batches):
        topics = Topics(bench.topics.server, settings)
        topics.create(range(1, 101))
        bench.wait_for_users(100)
        topics.close()


def test_kafka_restarts(bench: Bench) -> None:
    kafka = bench.topics.server
    if not isinstance(kafka, RealKafka):
        pytest.skip("needs a Kafka of our own, which keeps its data")

    bench.topics.create(range(1, 301))

    with bench.bridge():
        bench.wait_for_users(300)

        kafka.kill()
        kafka.start()

        bench.topics.create(range(301, 601))
        bench.wait_for_users(600)
        bench.wait_for_lag()

    check(bench)
