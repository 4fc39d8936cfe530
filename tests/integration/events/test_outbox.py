"""The outbox of segment events: an event is not sent again once it is marked; in order; one publisher at a time."""

from __future__ import annotations

import json
from collections.abc import Sequence
from uuid import UUID

import pytest
import sqlalchemy as sa

from segsvc.postgres import tables
from segsvc.postgres.catalog.outbox import PostgresOutboxStore
from segsvc.services.outbox import BATCH_MAX, Outbox
from tests.integration.events.conftest import Shards


class FakePublisher:
    def __init__(self) -> None:
        self.published: list[tuple[str, bytes]] = []
        self.takes = 10**9
        self.meanwhile = lambda: None

    def publish(self, messages: Sequence[tuple[str, bytes]]) -> int:
        taken = list(messages)[: self.takes]
        self.published += taken
        self.meanwhile()
        return len(taken)

    @property
    def seqs(self) -> list[int]:
        return [json.loads(value)["seq"] for _, value in self.published]


@pytest.fixture
def publisher() -> FakePublisher:
    return FakePublisher()


@pytest.fixture
def outbox(one_shard: Shards, publisher: FakePublisher) -> Outbox:
    with one_shard.databases.catalog_tx() as connection:
        connection.execute(sa.delete(tables.audit))
    return Outbox(PostgresOutboxStore(one_shard.databases), publisher)


def record(shards: Shards, *seqs: int) -> None:
    with shards.databases.catalog_tx() as connection:
        connection.execute(
            sa.insert(tables.audit),
            [
                {
                    "seq": seq,
                    "action": "rolled_out",
                    "segment_id": 1,
                    "slug": f"s{seq % 2}",
                    "operation_id": UUID(int=seq),
                    "details": {"added": 5, "type": "not this one"},
                }
                for seq in seqs
            ],
        )


def test_the_message(one_shard: Shards, outbox: Outbox, publisher: FakePublisher) -> None:
    record(one_shard, 7)
    assert outbox.publish_pending() == (1, False)

    ((key, value),) = publisher.published
    message = json.loads(value)
    assert key == "s1"
    assert message.pop("time").endswith("+00:00")
    assert message == {
        "seq": 7,
        "type": "rolled_out",
        "slug": "s1",
        "operation": "operations/00000000-0000-0000-0000-000000000007",
        "added": 5,
    }

    assert outbox.publish_pending() == (0, False)


def test_in_order_over_many_batches(one_shard: Shards, outbox: Outbox, publisher: FakePublisher) -> None:
    record(one_shard, *range(BATCH_MAX + 50, 0, -1))
    assert outbox.publish_pending() == (BATCH_MAX, False)
    assert outbox.publish_pending() == (50, False)
    assert publisher.seqs == list(range(1, BATCH_MAX + 51))


def test_what_the_broker_did_not_take_comes_again(one_shard: Shards, outbox: Outbox, publisher: FakePublisher) -> None:
    record(one_shard, 1, 2, 3)
    publisher.takes = 2
    assert outbox.publish_pending() == (2, True)
    publisher.takes = 0
    assert outbox.publish_pending() == (0, True)
    publisher.takes = 10
    assert outbox.publish_pending() == (1, False)
    assert publisher.seqs == [1, 2, 3]


def test_a_publisher_that_dies_before_its_mark(one_shard: Shards, outbox: Outbox, publisher: FakePublisher) -> None:
    def die() -> None:
        raise KeyboardInterrupt

    record(one_shard, 1, 2)
    publisher.meanwhile = die
    with pytest.raises(KeyboardInterrupt):
        outbox.publish_pending()
    publisher.meanwhile = lambda: None
    outbox.publish_pending()
    assert publisher.seqs == [1, 2, 1, 2]


def test_one_publisher_at_a_time(one_shard: Shards, outbox: Outbox, publisher: FakePublisher) -> None:
    second = FakePublisher()
    other = Outbox(PostgresOutboxStore(one_shard.databases), second)
    record(one_shard, 1, 2)
    seen: list[tuple[int, bool]] = []
    publisher.meanwhile = lambda: seen.append(other.publish_pending())

    assert outbox.publish_pending() == (2, False)
    assert seen == [(0, False)]
    assert second.published == []
    assert other.publish_pending() == (0, False)
