"""Parts for benchmarks of bulk changes: the work of one shard alone, and the processes that a rollout uses."""

from __future__ import annotations

import contextlib
import datetime
import itertools
import time
import uuid
from collections.abc import Iterator
from concurrent.futures import ThreadPoolExecutor
from pathlib import Path
from typing import Self

import psutil
import sqlalchemy as sa
from celery import chord

from benchmarks.harness import Pids, Spent, cpu_of
from benchmarks.seed import Shape
from benchmarks.world import World
from segsvc.cli.front import is_serving
from segsvc.config import Settings
from segsvc.demo.client import Client
from segsvc.domain import bits
from segsvc.domain.operation import Gid, Operation, OperationKind, OperationPlan, OperationState, ShardCounts
from segsvc.domain.segment import Rule, ShardSegment
from segsvc.domain.sharding import BLOCK_SLOTS
from segsvc.failpoints import failpoints
from segsvc.local.postgres import PostgresServer
from segsvc.local.processes import free_ports
from segsvc.local.redis import BROKER_CONFIG, RedisServer
from segsvc.postgres import tables
from segsvc.postgres.copying import append_rows
from segsvc.postgres.engine import Databases, Pool
from segsvc.postgres.shard.operation_transaction import PostgresShardTransaction
from segsvc.postgres.shard.participant import PostgresParticipant
from segsvc.services.shard_work import OperationWork
from segsvc.twophase.ports import Finish
from tests.celery_client import celery_beside
from tests.installation import Installation

BARE_COUNT = (
    "SELECT count(*) FROM users WHERE attributes->>'country' = 'RU' "
    "AND attributes->>'platform' IN ('ios', 'android') AND (attributes->>'age')::int >= 18"
)
"""``seed.CONDITION`` in SQL, written with the knowledge that every user has these attributes, with these types."""

_PEER = sa.Table("memberships", sa.MetaData(), schema="peer")
_segment_ids = itertools.count(1000)


class ShardWork:
    """The work of an operation's task on its shard, and of the operation's end there, run in this process."""

    def __init__(self, settings: Settings) -> None:
        self._settings = settings
        self._databases = Databases(settings, "bench", Pool(2))
        points, work = failpoints(None), OperationWork()
        self._participants = [
            PostgresParticipant(self._databases, shard, work, points) for shard in range(settings.shard_count)
        ]

    def close(self) -> None:
        self._databases.close()

    def __enter__(self) -> Self:
        return self

    def __exit__(self, *_: object) -> None:
        self.close()

    def roll_out(self, shard: int, segment: ShardSegment, rule: Rule) -> ShardCounts:
        return self._run(shard, OperationKind.ROLL_OUT, segment, rule)

    def delete(self, shard: int, segment: ShardSegment) -> ShardCounts:
        return self._run(shard, OperationKind.DELETE, segment, None)

    def _run(self, shard: int, kind: OperationKind, segment: ShardSegment, rule: Rule | None) -> ShardCounts:
        """Lock, fence, work, PREPARE TRANSACTION, COMMIT PREPARED."""
        now = datetime.datetime.now(datetime.UTC)
        plan = OperationPlan(kind, segment.slug, segment.id, uuid.uuid4(), segment.salt, rule)
        operation = Operation(
            uuid.uuid4(), 1, plan, OperationState.PREPARING, now, now, None, None, None, None, (), None
        )

        participant = self._participants[shard]
        gid = Gid(self._settings.cluster, operation.id, shard)
        counts = participant.prepare(operation, gid, lambda _: None)
        assert counts is not None, "no other process runs this operation"

        finish = participant.commit_prepared(gid)
        assert finish is Finish.DONE, finish

        return counts


class Service:
    """A front, an operations worker and Celery's broker beside an installation. Nothing else takes CPU time."""

    def __init__(self, settings: Settings, broker: RedisServer, pids: Pids) -> None:
        self.settings = settings
        self.client = Client.of(settings)
        self.pids = pids
        self._celery = celery_beside(settings)

    def empty_chord(self) -> None:
        """Run a chord on the same workers: one header task per shard and a body, all of which return at once."""
        nothing = self._celery.signature("celery.accumulate", queue="operations")
        header = [nothing.clone(args=(shard,)) for shard in range(self.settings.shard_count)]
        chord(header, nothing.clone(), app=self._celery).apply_async().get(timeout=30)

    def worker_ready(self) -> bool:
        return bool(self._celery.control.ping(timeout=1))

    def worker_memory_mb(self) -> float:
        """Peak resident memory of the largest process of the operations worker, shared libraries included."""
        worker = self.pids["worker"]
        assert isinstance(worker, int)
        return max(_peak_mb(child.pid) for child in psutil.Process(worker).children(recursive=True))

    def close(self) -> None:
        self.client.close()
        self._celery.close()


@contextlib.contextmanager
def service(world: World, installation: Installation) -> Iterator[Service]:
    """The processes that a rollout passes through, on an installation of the bare servers."""
    folder = world.mark / "bulk-broker"
    broker = RedisServer("broker", folder, BROKER_CONFIG, mark=world.mark)
    broker.start()
    try:
        (port,) = free_ports(1)
        settings = installation.settings.model_copy(
            update={"broker_url": broker.url, "grpc_address": f"127.0.0.1:{port}", "metrics_address": ""}
        )

        with contextlib.ExitStack() as stack:
            pids: dict[str, int] = {}
            running = Service(settings, broker, pids)
            stack.callback(running.close)

            pids["worker"] = stack.enter_context(
                world.process(
                    *("worker", "-m", "segsvc", "worker", "--queue", "operations"),
                    ready=running.worker_ready,
                    settings=settings,
                )
            )
            pids["front"] = stack.enter_context(
                world.process("front", "-m", "segsvc", "serve", ready=lambda: is_serving(settings), settings=settings)
            )

            pids |= {"postgres": pid_of(world.postgres), "broker": pid_of(broker)}
            yield running
    finally:
        broker.stop()


class OnAllShards:
    """Runs one statement on all shards at once, on connections that stay open."""

    def __init__(self, settings: Settings) -> None:
        self._engines = [sa.create_engine(dsn, isolation_level="AUTOCOMMIT") for dsn in settings.shard_dsns]
        self._connections = [engine.connect() for engine in self._engines]
        self._threads = ThreadPoolExecutor(len(self._engines))

    def __enter__(self) -> Self:
        return self

    def __exit__(self, *_: object) -> None:
        self._threads.shutdown()
        for connection, engine in zip(self._connections, self._engines, strict=True):
            connection.close()
            engine.dispose()

    def numbers(self, statement: str, *parameters: object) -> list[int]:
        """The single number that the statement returns on each shard."""
        return list(
            self._threads.map(
                lambda connection: int(connection.exec_driver_sql(statement, parameters).scalar_one()),
                self._connections,
            )
        )


def new_segment(installation: Installation) -> ShardSegment:
    """A new segment without members, known to shard 0."""
    number = next(_segment_ids)
    segment = ShardSegment(number, f"new-{number}", salt=number, rule=None, rule_count=0)
    installation.execute(
        0,
        "INSERT INTO segments (id, slug, salt) VALUES (:id, :slug, :salt)",
        id=segment.id, slug=segment.slug, salt=tables.salt_to_db(segment.salt),
    )  # fmt: skip
    return segment


def load_peer_segment(engine: sa.Engine, segment_id: int, shape: Shape) -> int:
    """Add one row to the reference for each set bit of a segment of this shard. Returns the number of rows."""
    blocks = -(-shape.users // BLOCK_SLOTS)
    with engine.begin() as connection:
        tx = PostgresShardTransaction(connection, 0)
        user_ids = tx.directory(0, blocks)[bits.unpack(tx.segment_bits(segment_id, 0, blocks))]
        append_rows(connection, _PEER, user_id=user_ids, segment_id=segment_id)
    return int(user_ids.size)


def two_phase(connection: sa.Connection, gid: str) -> None:
    """Commit the connection's transaction in two phases."""
    connection.exec_driver_sql("PREPARE TRANSACTION %s", (gid,))
    connection.rollback()
    connection.execution_options(isolation_level="AUTOCOMMIT")
    connection.exec_driver_sql("COMMIT PREPARED %s", (gid,))


def pid_of(server: PostgresServer | RedisServer) -> int:
    """Process id of a running server."""
    assert server.pid is not None
    return server.pid


@contextlib.contextmanager
def here_and(pids: Pids) -> Iterator[Spent]:
    """``cpu_of`` these processes, and of this process alone as ``client``, because the servers are its children."""
    with cpu_of(pids) as spent:
        begun = time.process_time()  # inside the block: reading the figures of other processes takes CPU time, too
        yield spent
        own_s = time.process_time() - begun
    spent.cpu_s = {"client": own_s, **spent.cpu_s}


def elapsed(start: float) -> float:
    """Milliseconds since ``time.perf_counter()`` was ``start``."""
    return (time.perf_counter() - start) * 1000


def _peak_mb(pid: int) -> float:
    lines = Path(f"/proc/{pid}/status").read_text().splitlines()
    (line,) = [line for line in lines if line.startswith("VmHWM:")]
    return int(line.split()[1]) / 1024
