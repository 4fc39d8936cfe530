"""An installation in which a shard moves, and readers that read its users during the move."""

from __future__ import annotations

import os
import subprocess
import sys
import threading
from collections.abc import Callable, Iterator
from contextlib import contextmanager
from dataclasses import dataclass, field

import grpc
import redis
import sqlalchemy as sa
from segmentation.v1 import membership_pb2, segments_pb2

from segsvc.bootstrap import installation_of, make_cache
from segsvc.cache.keys import Keys
from segsvc.config import Settings
from segsvc.domain.events import UserEvent
from segsvc.domain.sharding import shard_of
from segsvc.failpoints import NoFailpoints
from segsvc.local.postgres import PostgresServer
from segsvc.postgres import tables
from segsvc.postgres.engine import Databases, Pool
from segsvc.postgres.installation.migrate import migrate
from segsvc.postgres.shard.user_transaction import PostgresUserStore
from segsvc.services.ingestion import Ingestion
from tests.contract.conftest import FrontUnderTest
from tests.contract.installation import Installation
from tests.eventually import eventually
from tests.local_servers import REPOSITORY

SHARDS = 3
MOVED = 1
USERS = range(1, 6001)
Segments = frozenset[str]


@dataclass
class Moving(Installation):
    """An installation with shards on up to two servers; the migrator makes its databases.

    Attributes:
        dsns: DSNs of the shards, for the processes that start next.
    """

    dsns: list[str] = field(default_factory=list)

    def __post_init__(self) -> None:
        for name in self.database_names[: SHARDS + 1]:
            self.server.create_database(name)
        self.dsns = [self.server.dsn(name) for name in self.database_names[1 : SHARDS + 1]]
        migrate(self.settings)
        redis.Redis.from_url(self.cache.url).flushall()

    @property
    def settings(self) -> Settings:
        return Settings(
            _env_file=None,  # type: ignore[call-arg]
            cluster=self.name,
            catalog_dsn=self.server.dsn(self.database_names[0]),
            shard_dsns=tuple(self.dsns),
            cache_url=self.cache.url,
        )

    def environment(self) -> dict[str, str]:
        return {**super().environment(), "SEGSVC_SHARD_DSNS": " ".join(self.dsns)}

    @contextmanager
    def ingestion(self) -> Iterator[Ingestion]:
        """An ingestion of events on the present databases."""
        databases, cache = Databases(self.settings, "worker", Pool(2)), make_cache(self.settings)
        try:
            yield Ingestion(PostgresUserStore(databases), cache, NoFailpoints())
        finally:
            cache.close()
            databases.close()

    def salt_of(self, slug: str) -> int:
        [row] = self.execute(0, f"SELECT salt FROM segments WHERE slug = '{slug}'")
        return tables.salt_from_db(int(row.strip("(,)")))

    def execute(self, shard: int, statement: str) -> list[str]:
        engine = sa.create_engine(self.dsns[shard], poolclass=sa.NullPool, isolation_level="AUTOCOMMIT")
        with engine.connect() as connection:
            result = connection.execute(sa.text(statement))
            return [repr(row) for row in result.all()] if result.returns_rows else []


def apply(ingestion: Ingestion, events: list[UserEvent]) -> None:
    for shard in range(SHARDS):
        mine = [event for event in events if shard_of(event.user_id, SHARDS) == shard]
        assert not ingestion.apply_batch(shard, mine).dead


def new_database(server: PostgresServer, name: str) -> str:
    server.create_database(name)
    return server.dsn(name)


class Readers:
    """Threads that read users without a pause, many of them past the cache, and compare each answer with the truth.

    Attributes:
        fronts: the fronts that are read, in turn.
        failures: the shard and the status of each refused read.
        wrong: answers that are not true.
        reads: number of reads so far, by shard.

    Args:
        truth: the answers that are right for a user at this moment.
    """

    def __init__(self, installation: Moving, front: FrontUnderTest, truth: Callable[[int], set[Segments]]) -> None:
        self.fronts = [front]
        self.failures: list[tuple[int, str]] = []
        self.wrong: list[str] = []
        self.reads = [0] * SHARDS

        self._truth = truth
        self._cache = redis.Redis.from_url(installation.cache.url)
        self._keys = Keys(installation_of(installation.settings).tag.encode())

        self._stop = threading.Event()
        self._threads = [threading.Thread(target=self._read, args=(number,)) for number in range(3)]

        for thread in self._threads:
            thread.start()

    def stop(self) -> None:
        self._stop.set()
        for thread in self._threads:
            thread.join()
        self._cache.close()

    def _read(self, number: int) -> None:
        user_id = number + 1
        while not self._stop.is_set():
            user_id = user_id % 5000 + 7  # coprime with the number of shards, so that the shards come in turn

            shard = shard_of(user_id, SHARDS)
            if number == 0:
                self._cache.delete(self._keys.user(shard, user_id))

            allowed, fronts = self._truth(user_id), self.fronts

            try:
                found = segments_of(fronts[self.reads[shard] % len(fronts)], user_id)
            except grpc.RpcError as error:
                self.failures.append((shard, f"{error.code().name} {error.details()}"))
            else:
                if found not in allowed | self._truth(user_id):
                    self.wrong.append(f"user {user_id}: {sorted(found)}, not one of {allowed}")

            self.reads[shard] += 1

    def await_reads(self, more: int = 150) -> None:
        """Return when every shard was read ``more`` times again."""
        seen = list(self.reads)
        eventually(lambda: all(now >= before + more for now, before in zip(self.reads, seen, strict=True)), 20)


def segments_of(front: FrontUnderTest, user_id: int) -> Segments:
    answer = front.memberships.GetUserSegments(membership_pb2.GetUserSegmentsRequest(user_id=user_id), timeout=5)
    return frozenset(answer.slugs)


def roll_out(front: FrontUnderTest, slug: str, percent: float) -> None:
    request = segments_pb2.RollOutSegmentRequest(slug=slug, rule={"percent": percent})
    operation = front.segments.RollOutSegment(request, timeout=20)
    assert operation.done, operation
    assert not operation.HasField("error"), operation.error


def command(installation: Moving, *arguments: str) -> subprocess.CompletedProcess[str]:
    environ = {name: value for name, value in os.environ.items() if not name.startswith("SEGSVC_")}
    return subprocess.run(
        [sys.executable, "-m", "segsvc", *arguments],
        env={**environ, **installation.environment(), "SEGSVC_ENV_FILE": "/nowhere", "PYTHONPATH": str(REPOSITORY)},
        cwd=REPOSITORY,
        capture_output=True,
        text=True,
        check=False,
        timeout=60,
    )
