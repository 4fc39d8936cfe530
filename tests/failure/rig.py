"""The servers and processes of the matrix, which run for all of its cells.

Everything is real, with a wire wherever a cell cuts a connection. There are PostgreSQL with a catalog and three shards,
a broker and a cache; and two operations workers, two fronts and beat under supervisord, so that a process that dies is
started again as in production. Kafka has no part in an operation.
"""

from __future__ import annotations

import contextlib
import json
import os
import random
import signal
import sys
from collections.abc import Iterator
from concurrent.futures import ThreadPoolExecutor
from pathlib import Path
from typing import Any

import psutil
import redis
import sqlalchemy as sa
from google.longrunning import operations_pb2, operations_pb2_grpc

from segsvc.access.own_token import own_token
from segsvc.bootstrap import Check, installation_of
from segsvc.cache.keys import Keys
from segsvc.cli.front import is_serving
from segsvc.config import Settings
from segsvc.demo.client import Client
from segsvc.local.folders import make_private
from segsvc.local.postgres import PostgresServer
from segsvc.local.processes import free_ports, kill_marked, wait_until
from segsvc.local.redis import BROKER_CONFIG, CACHE_CONFIG, RedisServer
from segsvc.local.stack_env import write_env
from segsvc.local.supervision import ProcessSpec, Supervisord
from segsvc.postgres.installation.migrate import migrate
from segsvc.postgres.locks import SHARD_LOCK
from segsvc.services.check.check import Checker
from tests.celery_client import celery_beside
from tests.failure.wire_postgres import PostgresWire
from tests.failure.wire_redis import RedisWire
from tests.installation import Installation

SHARDS = 3
USERS = range(1, 3601)
"""1200 users on each shard, in two blocks."""
STEADY, SECOND = "steady", "second"
"""The segment that cells roll out, and the segment that proves that the next operation succeeds."""
_OPERATION_DEADLINE_S = 60.0
"""Longer than a worker takes to start on a busy machine, since fronts abort late operations, too. Cells that need a
passed deadline move it."""
_TRANSITIONS = """
CREATE TABLE test_transitions (n bigserial PRIMARY KEY, operation uuid NOT NULL, before text, after text NOT NULL);
CREATE FUNCTION test_note_transition() RETURNS trigger LANGUAGE plpgsql AS $$
BEGIN
    INSERT INTO test_transitions (operation, before, after)
    VALUES (NEW.id, CASE WHEN TG_OP = 'UPDATE' THEN OLD.state END, NEW.state);
    RETURN NULL;
END $$;
CREATE TRIGGER test_note_transition AFTER INSERT OR UPDATE OF state ON operations
FOR EACH ROW EXECUTE FUNCTION test_note_transition();
"""


class FrontClient(Client):
    """A client of one front; the front may be dead for a while."""

    def __init__(self, name: str, settings: Settings) -> None:
        super().__init__(settings.grpc_address, own_token(settings, lambda _: None))
        self.name = name
        self.settings = settings
        self.longrunning: Any = operations_pb2_grpc.OperationsStub(self.calls)  # type: ignore[no-untyped-call]

    def cancel(self, operation_id: str) -> None:
        self.longrunning.CancelOperation(
            operations_pb2.CancelOperationRequest(name=f"operations/{operation_id}"), timeout=20
        )


class Rig:
    """All servers and processes, running from ``start`` to ``stop``.

    Args:
        folder: a folder with a short path that PostgreSQL's user can enter; everything is in it.
    """

    def __init__(self, folder: Path) -> None:
        self.folder = folder
        self.failpoints = folder / "failpoints"
        self._undo = contextlib.ExitStack()
        self._server = PostgresServer(folder / "pg", mark=folder, fast=True)
        self._broker = RedisServer("broker", folder / "broker", BROKER_CONFIG, mark=folder)
        self._cache = RedisServer("cache", folder / "cache", CACHE_CONFIG, mark=folder)
        self._supervisor = Supervisord(folder / "run", logs=folder / "logs", mark=folder)
        self._random = random.Random(1)
        self._read_up_to: dict[str, int] = {}

    # -- life -------------------------------------------------------------------------------------------------------

    def start(self) -> None:
        """Start everything; the users and the two segments exist when it returns."""
        with contextlib.ExitStack() as undo:
            undo.callback(kill_marked, self.folder)
            self.failpoints.mkdir(parents=True)
            self._start_servers(undo)
            self._start_wires(undo)

            env_file = self.folder / "stack.env"
            write_env(env_file, self.wired)
            self._supervisor.start(self._processes(), env={"SEGSVC_ENV_FILE": str(env_file)})
            undo.callback(self._supervisor.stop)
            self._supervisor.await_running(timeout_s=90)

            undo.callback(self._close_clients)
            for client in self.clients:
                if not wait_until(lambda client=client: is_serving(client.settings), timeout_s=60):  # type: ignore[misc]
                    raise AssertionError(f"{client.name} does not serve")

            self.celery = celery_beside(self.settings)
            undo.callback(self.celery.close)
            self._checking = Check(self.settings)
            undo.callback(self._checking.close)

            for slug in (STEADY, SECOND):
                self.clients[0].create(slug, "")
                self.clients[0].roll_out(slug, 50)

            self._undo = undo.pop_all()

    def stop(self) -> None:
        self._undo.close()

    def _close_clients(self) -> None:
        for client in self.clients:
            client.close()

    def _start_servers(self, undo: contextlib.ExitStack) -> None:
        for server in (self._server, self._broker, self._cache):
            server.start()
            undo.callback(server.stop)

        # A session with synchronous_commit waits for a standby that does not exist: so a test can keep a
        # COMMIT PREPARED under way.
        for setting, value in (("synchronous_commit", "local"), ("synchronous_standby_names", "nobody")):
            self._server.psql(f"ALTER SYSTEM SET {setting} = '{value}'")
        self._server.psql("SELECT pg_reload_conf()")

        names = ["catalog", *(f"shard{shard}" for shard in range(SHARDS))]
        for name in names:
            self._server.create_database(name)

        self.settings = Settings(
            _env_file=None,
            cluster="matrix",
            catalog_dsn=self._server.dsn(names[0]),
            shard_dsns=tuple(map(self._server.dsn, names[1:])),
            cache_url=self._cache.url,
            broker_url=self._broker.url,
            failpoint_dir=self.failpoints,
            stack_dir=self.folder,
            metrics_address="",
            operation_deadline_s=_OPERATION_DEADLINE_S,
            recovery_interval_s=0.4,
            redispatch_quiet_s=0.7,
            lock_timeout_s=1,
            statement_timeout_s=10,
            operation_worker_processes=3,
            warm_interval_s=3600,
        )

        migrate(self.settings)
        self.installation = Installation(self.settings, self._server)
        self.installation.add_users(USERS)

        engine = sa.create_engine(self.settings.catalog_dsn, poolclass=sa.NullPool)
        with engine.begin() as connection:
            connection.exec_driver_sql(_TRANSITIONS)

        self.broker = redis.Redis.from_url(self.settings.broker_url)
        undo.callback(self.broker.close)
        self.cache = redis.Redis.from_url(self.settings.cache_url)
        undo.callback(self.cache.close)

    def _start_wires(self, undo: contextlib.ExitStack) -> None:
        folder = self.folder / "wire"
        make_private(folder)
        self.postgres_wire = PostgresWire(folder, self._server.socket_folder)
        undo.callback(self.postgres_wire.close)

        ports = free_ports(3)
        self.broker_wire = RedisWire(self.settings.broker_url, ports[2])
        undo.callback(self.broker_wire.close)

        there, here = str(self._server.socket_folder), str(folder)
        self.wired = self.settings.model_copy(
            update={
                "broker_url": self.broker_wire.url,
                "catalog_dsn": self.settings.catalog_dsn.replace(there, here),
                "shard_dsns": tuple(dsn.replace(there, here) for dsn in self.settings.shard_dsns),
            }
        )

        self.clients = [
            FrontClient(f"front-{n}", self.wired.model_copy(update={"grpc_address": f"127.0.0.1:{ports[n]}"}))
            for n in range(2)
        ]

    def _processes(self) -> list[ProcessSpec]:
        command = (sys.executable, "-m", "segsvc")
        fronts = [
            ProcessSpec(client.name, ("env", f"SEGSVC_GRPC_ADDRESS={client.settings.grpc_address}", *command, "serve"))
            for client in self.clients
        ]

        workers = [
            ProcessSpec(f"worker-{n}", (*command, "worker", "--queue", "operations"), stop_as_group=False)
            for n in range(2)
        ]

        # Two beats, so that two recoveries can run at the same time.
        beats = [ProcessSpec(f"beat-{n}", (*command, "beat")) for n in range(2)]

        return [*fronts, *workers, *beats]

    # -- processes --------------------------------------------------------------------------------------------------

    def serving(self, *, besides: FrontClient | None = None) -> FrontClient:
        """A random front that answers now, but not ``besides``."""
        candidates = [client for client in self.clients if client is not besides]
        self._random.shuffle(candidates)
        found: list[FrontClient] = []

        def one_serves() -> bool:
            found.extend(client for client in candidates if is_serving(client.settings))
            return bool(found)

        if not wait_until(one_serves, timeout_s=30):
            raise AssertionError("no front serves")
        return found[0]

    def hang_up(self, client: FrontClient) -> None:
        """Close a client's connection during its calls, and put a new client in its place."""
        client.close()
        self.clients[self.clients.index(client)] = FrontClient(client.name, client.settings)

    def pid_of(self, name: str) -> int:
        pid = self._supervisor.pid_of(name)
        assert pid is not None, f"{name} does not run"
        return pid

    @contextlib.contextmanager
    def workers_frozen(self) -> Iterator[None]:
        """Stop all operations workers and their child processes with SIGSTOP for as long as the block lasts."""
        mains = [psutil.Process(self.pid_of(f"worker-{n}")) for n in range(2)]
        processes = [each for main in mains for each in (main, *main.children(recursive=True))]
        try:
            for process in processes:
                process.suspend()
            yield
        finally:
            for process in processes:
                process.resume()

    # -- looking ----------------------------------------------------------------------------------------------------

    def rows(self, shard: int | None, statement: str, **parameters: object) -> list[Any]:
        """Rows of a statement. ``shard`` None: the catalog."""
        return list(self.installation.execute(shard, statement, **parameters))

    def check(self) -> list[str]:
        """The differences that ``segsvc check`` finds."""
        checker = Checker(
            self._checking.reads,
            self._checking.reader,
            cluster=self.settings.cluster,
            shard_count=SHARDS,
            fence_ttl_s=self.settings.fence_ttl_s,
            settle_s=0.3,
        )
        return [str(difference) for difference in checker.run().differences]

    def alarms(self) -> list[str]:
        """The alarms that recovery and finalizers have raised since the last call of this method."""
        found = []
        for log in sorted((self.folder / "logs").glob("*.log")):
            with log.open("rb") as file:
                file.seek(self._read_up_to.get(log.name, 0))
                *lines, _ = file.read().split(b"\n")  # the last line may be incomplete
                self._read_up_to[log.name] = self._read_up_to.get(log.name, 0) + sum(len(line) + 1 for line in lines)
            found += [json.loads(line)["what"] for line in lines if b'"event": "alarm"' in line]
        return found

    @property
    def prefix(self) -> str:
        """Prefix of every key on the broker."""
        return installation_of(self.settings).broker_prefix

    @property
    def keys(self) -> Keys:
        """The cache's keys."""
        return Keys(installation_of(self.settings).tag.encode())

    def chunks(self, shard: int) -> list[bytes]:
        """Keys of all chunks of patches of a shard."""
        return list(self.cache.scan_iter(self.keys.chunk_prefix(shard) + b"*", count=10_000))

    def chunk_tokens(self, shard: int) -> set[bytes]:
        """Tokens of the publications that have chunks in the cache and are not in the shard's list."""
        listed = bytes(self.cache.get(self.keys.patches(shard)) or b"")  # type: ignore[arg-type]
        tokens = {key.removeprefix(self.keys.chunk_prefix(shard)).partition(b":")[0] for key in self.chunks(shard)}
        return {token for token in tokens if token not in listed}

    def tasks_under_way(self) -> dict[str, str]:
        """Messages that a worker has received and not acknowledged, by delivery tag."""
        found: Any = self.broker.hgetall(f"{self.prefix}unacked")
        return {tag.decode(): text.decode("utf-8", "replace") for tag, text in found.items()}

    def finish_by_hand(self, shard: int, command: str, gid: str) -> None:
        """End a prepared transaction, as a superuser with a console can."""
        with self._console(shard) as connection:
            connection.exec_driver_sql(f"{command} %s", (gid,))

    @contextlib.contextmanager
    def commit_prepared_under_way(self, shard: int, gid: str) -> Iterator[None]:
        """Another program's COMMIT PREPARED of this gid, under way as long as the block lasts.

        It waits for the standby that does not exist, and holds the gid meanwhile.
        """
        waiting = "SELECT count(*) FROM pg_stat_activity WHERE pid = :pid AND wait_event = 'SyncRep'"
        with self._console(shard) as connection, ThreadPoolExecutor(1) as thread:
            pid = connection.exec_driver_sql("SELECT pg_backend_pid()").scalar_one()
            connection.exec_driver_sql("SET synchronous_commit = on")

            under_way = thread.submit(connection.exec_driver_sql, "COMMIT PREPARED %s", (gid,))
            try:
                if not wait_until(lambda: self.rows(shard, waiting, pid=pid)[0][0], timeout_s=10, poll_s=0.01):
                    raise AssertionError("COMMIT PREPARED does not wait")
                yield
            finally:
                # This ends only the wait: the commit on this server stays.
                self.rows(shard, "SELECT pg_cancel_backend(:pid)", pid=pid)
                under_way.result(10)

    def prepare_by_hand(self, shard: int, gid: str) -> None:
        """Prepare a transaction with this gid that holds the shard's lock, as a twin's transaction does."""
        with self._console(shard) as connection:
            connection.exec_driver_sql("BEGIN")
            connection.exec_driver_sql("SELECT pg_advisory_xact_lock(%s)", (SHARD_LOCK,))
            connection.exec_driver_sql("UPDATE shard_state SET next_slot = next_slot")
            connection.exec_driver_sql("PREPARE TRANSACTION %s", (gid,))

    @contextlib.contextmanager
    def _console(self, shard: int) -> Iterator[sa.Connection]:
        engine = sa.create_engine(self.settings.shard_dsns[shard], isolation_level="AUTOCOMMIT", poolclass=sa.NullPool)
        with engine.connect() as connection:
            yield connection


def kill_group(pid: int) -> None:
    """Kill a process and its process group with SIGKILL: a worker with its children."""
    os.killpg(os.getpgid(pid), signal.SIGKILL)


def is_stopped(pid: int) -> bool:
    return psutil.Process(pid).status() == psutil.STATUS_STOPPED


def gone(pid: int, within_s: float = 5.0) -> bool:
    """Whether a killed process is gone, even if its parent has not noticed."""

    def ended() -> bool:
        try:
            return psutil.Process(pid).status() == psutil.STATUS_ZOMBIE
        except psutil.NoSuchProcess:
            return True

    return wait_until(ended, timeout_s=within_s, poll_s=0.01)
