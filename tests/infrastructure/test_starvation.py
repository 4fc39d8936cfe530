"""More events wait for prepared shards than event workers exist; nothing else waits because of them."""

from __future__ import annotations

import time

import pytest
import redis

from segsvc.config import Settings
from tests.e2e.events import producer
from tests.eventually import eventually
from tests.infrastructure.system import ALONE, SHARDS, System

NEWCOMERS = range(1_000_000, 1_004_000)
ENDS_WITHIN_S = 10.0
"""An operation over a few thousand users takes a fraction of a second, and recovery a second or two."""


def waiting_for_the_lock(system: System) -> int:
    statement = "SELECT FROM pg_stat_activity WHERE wait_event_type = 'Lock' AND wait_event = 'advisory'"
    return sum(
        len(system.installation.execute(shard, f"{statement} AND datname = current_database()"))
        for shard in range(SHARDS)
    )


@pytest.mark.infrastructure
def test_events_that_wait_keep_nothing_else_waiting(system: System, slug: str, bridged: Settings) -> None:
    system.new_segment(slug, 20)

    with (
        redis.Redis.from_url(system.broker.url) as broker,
        system.armed("prepared-not-voted", f"hold shard={ALONE}") as point,
    ):
        name = system.client.start_roll_out(slug, 60)
        point.await_fired()
        eventually(lambda: system.prepared_on(name) == set(range(SHARDS)))

        with producer(bridged) as send:
            send(
                f"{bridged.kafka_topic_prefix}create-user", ({"user_id": user, "attributes": {}} for user in NEWCOMERS)
            )

        # Every event worker waits for a shard, batches wait for a worker, and most events for their batch.
        workers = system.settings.event_worker_processes
        eventually(lambda: waiting_for_the_lock(system) == workers and broker.llen(f"{system.prefix}events"))

        # Reads, and calls that need only the catalog, go on as usual.
        assert system.read(slug) == system.members(slug, 20)
        assert slug in system.client.list_slugs()
        released = time.monotonic()

    eventually(lambda: system.state(name) == "DONE", ENDS_WITHIN_S)
    assert time.monotonic() - released < ENDS_WITHIN_S
    eventually(lambda: all_there(system), 60)
    system.users += NEWCOMERS
    system.expect_well(slug, 60)


def all_there(system: System) -> bool:
    return all(slugs is not None for _, slugs in system.client.many_user_segments(NEWCOMERS))
