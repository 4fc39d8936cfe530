"""Shards, topics of their own and a bridge in this process, for one test on the session's Kafka."""

from __future__ import annotations

from collections.abc import Iterator
from contextlib import contextmanager
from dataclasses import dataclass
from uuid import uuid4

import sqlalchemy as sa

from segsvc.local.kafka import KafkaServer
from segsvc.local.processes import wait_until
from segsvc.postgres import tables
from tests.integration.events.conftest import Shards
from tests.integration.events.kafka_helpers import InProcessBatches, RunningBridge, Topics


@dataclass
class Bench:
    """What a test works with."""

    shards: Shards
    topics: Topics
    batches: InProcessBatches

    @property
    def prefix(self) -> str:
        return self.topics.settings.kafka_topic_prefix

    @property
    def topic(self) -> str:
        """The topic of creations."""
        return f"{self.prefix}create-user"

    def bridge(self) -> RunningBridge:
        return RunningBridge(self.topics.settings, self.batches)

    def users(self) -> int:
        """Users of all shards."""
        total = 0
        for shard in range(self.shards.databases.shard_count):
            with self.shards.databases.shard_tx(shard) as connection:
                total += connection.execute(sa.select(tables.shard_state.c.user_count)).scalar_one()
        return total

    def wait_for_users(self, count: int) -> None:
        assert wait_until(lambda: self.users() == count, timeout_s=60), f"{self.users()} users, not {count}"

    def wait_for_lag(self, lag: int = 0) -> None:
        assert wait_until(lambda: self.topics.lag() == lag, timeout_s=60), f"lag {self.topics.lag()}, not {lag}"

    def wait(self, users: int) -> None:
        """Wait until there are this many users, and no event waits."""
        self.wait_for_users(users)
        self.wait_for_lag()


@contextmanager
def new_topics(server: KafkaServer, shards: Shards, **settings: object) -> Iterator[Topics]:
    """Empty the shards, and make topics under a prefix that no other test has, also on a broker that others use."""
    shards.reset()
    prefix = f"test-{uuid4().hex[:12]}."

    topics = Topics(
        server,
        shards.settings.model_copy(
            update={
                "kafka_bootstrap_servers": server.bootstrap_servers,
                "kafka_stand_in": server.stand_in,
                "kafka_topic_prefix": prefix,
                "kafka_group": f"{prefix}group",
                **settings,
            }
        ),
    )
    yield topics
    topics.close()
