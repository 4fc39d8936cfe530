"""A batch that is too slow for the database is halved until it passes; none of its events becomes a dead letter."""

from __future__ import annotations

import itertools
from collections.abc import Iterator

import pytest

from segsvc.bridge import flows
from segsvc.bridge.flows import Flows
from segsvc.bridge.offsets import PartitionProgress
from segsvc.bridge.waiting import Waits
from segsvc.domain.events import CreateUser, UpdateUser, UserEvent
from segsvc.services import ingestion
from tests.eventually import eventually
from tests.integration.events.conftest import Shards
from tests.integration.events.kafka_helpers import InProcessBatches
from tests.integration.events.shard_view import view

USERS = 400
_SLOW = """
    CREATE FUNCTION be_slow() RETURNS trigger LANGUAGE plpgsql AS
    $$ BEGIN PERFORM pg_sleep(0.002); RETURN new; END $$;
    CREATE TRIGGER slow BEFORE INSERT OR UPDATE ON users FOR EACH ROW EXECUTE FUNCTION be_slow()
"""


@pytest.fixture
def slow_shard(one_shard: Shards) -> Iterator[Shards]:
    """A shard that takes 2 ms for each user who is created or changed."""
    with one_shard.databases.shard_tx(0) as connection:
        connection.exec_driver_sql(_SLOW)
    yield one_shard
    with one_shard.databases.shard_tx(0) as connection:
        connection.exec_driver_sql("DROP TRIGGER slow ON users; DROP FUNCTION be_slow")


class Bridge:
    """The bridge's flows, with events that a test adds itself."""

    def __init__(self, shards: Shards) -> None:
        self.progress = PartitionProgress("create-user", 0)
        self.offsets = itertools.count()
        self.dead: list[str] = []
        self.batches = InProcessBatches(shards.ingestion)
        self.flows = Flows(
            self.batches, lambda taken, reason: self.dead.append(reason), Waits(), batch_max=USERS, in_flight_max=1
        )

    def add(self, events: list[UserEvent]) -> None:
        for event in events:
            self.flows.add(self.progress.take(next(self.offsets), event, None, b"x"), 0)

    def is_done(self) -> bool:
        self.flows.step()
        return not self.flows.held_back and self.flows.in_flight == 0


def test_a_batch_that_takes_too_long_is_halved_until_it_passes(
    slow_shard: Shards, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr(ingestion, "BATCH_S", 0.5)
    monkeypatch.setattr(flows, "QUICK_S", 0.15)

    bridge = Bridge(slow_shard)
    bridge.add([CreateUser(number, "{}") for number in range(1, USERS + 1)])
    eventually(bridge.is_done, within_s=60)

    sizes = [size for _, _, size in bridge.batches.sent]
    assert sizes[:2] == [USERS, USERS // 2]

    bridge.add([UpdateUser(number, 1, '{"a": 1}') for number in range(1, USERS + 1)])
    eventually(bridge.is_done, within_s=60)

    assert bridge.dead == []
    assert bridge.progress.committable() == 2 * USERS
    users = view(slow_shard.databases, 0).users
    assert len(users) == USERS
    assert all(user.version == 1 for user in users.values())


def test_one_event_has_as_long_as_a_statement_may_take(slow_shard: Shards, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(ingestion, "BATCH_S", 0.001)
    bridge = Bridge(slow_shard)
    bridge.add([CreateUser(1, "{}")])
    eventually(bridge.is_done)
    assert bridge.dead == []
    assert len(view(slow_shard.databases, 0).users) == 1
