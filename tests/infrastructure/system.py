"""An installation whose servers die one by one.

It has the catalog and the shards on three PostgreSQL servers, a broker, a cache, and all our processes under their
supervisor.
"""

from __future__ import annotations

import os
import signal
import sys
from collections.abc import Iterator, Mapping, Sequence
from contextlib import ExitStack, contextmanager
from dataclasses import dataclass
from pathlib import Path
from uuid import UUID

import grpc
import redis
import sqlalchemy as sa
from segmentation.v1 import segments_pb2

from segsvc.bootstrap import Check, installation_of
from segsvc.cache.keys import Keys
from segsvc.cli.front import is_serving
from segsvc.config import Settings
from segsvc.demo.client import Client
from segsvc.domain.bucketing import bucket
from segsvc.local.postgres import PostgresServer
from segsvc.local.processes import Daemon, free_ports
from segsvc.local.redis import BROKER_CONFIG, CACHE_CONFIG, RedisServer
from segsvc.local.stack import service_processes
from segsvc.local.stack_env import write_env
from segsvc.local.supervision import Supervisord
from segsvc.postgres import tables
from segsvc.postgres.installation.migrate import migrate
from tests.eventually import eventually
from tests.installation import Installation

SHARDS = 3
USERS = range(1, 6001)
ALONE = 1
"""The shard that has a server of its own; the two remaining shards share one."""
DRAIN_S = 30.0
"""After a fault has healed, all work must be done within this time."""
DEADLINE_S = 60.0
"""Longer than any fault here lasts: an operation that this deadline aborts did not survive the fault."""
PROCESSES = ("serve", "worker-operations", "worker-events", "worker-warming", "beat")
WORKERS = PROCESSES[1:]
CARRIERS = ("worker-operations", "beat")
"""Processes that carry operations out: the worker runs the tasks, beat runs recovery."""
OUTAGE = (grpc.StatusCode.UNAVAILABLE, grpc.StatusCode.RESOURCE_EXHAUSTED, grpc.StatusCode.DEADLINE_EXCEEDED)


@dataclass(frozen=True)
class Point:
    """An armed failpoint."""

    file: Path

    def fired(self) -> list[dict[str, str]]:
        """Every time it fired, first to last: the ``pid``, and where the process reached it."""
        try:
            lines = self.file.with_suffix(".fired").read_text().splitlines()
        except FileNotFoundError:
            return []
        return [{"pid": pid, **dict(word.split("=", 1) for word in where)} for pid, *where in map(str.split, lines)]

    def await_fired(self, times: int = 1) -> None:
        eventually(lambda: len(self.fired()) >= times)

    def release(self) -> None:
        """Held processes go on; no further process is held."""
        self.file.unlink(missing_ok=True)

    def kill(self) -> None:
        """Held processes die there, and so does every process that reaches the point, until it is released."""
        unfinished = self.file.with_suffix(".new")
        unfinished.write_text("kill")
        unfinished.replace(self.file)


class System:
    """Starts everything; ``close`` leaves nothing behind.

    Args:
        folder_of_one: folder of the server of shard ``ALONE``; by default ``home``.
    """

    def __init__(self, home: Path, mark: Path, *, folder_of_one: Path | None = None) -> None:
        self.home = home
        self.mark = mark
        self.closing = ExitStack()
        self._calls: list[object] = []
        self._killed_at: object = None

        self.catalog = self._postgres(home / "catalog")
        self.together = self._postgres(home / "together")
        self.alone = self._postgres((folder_of_one or home) / "alone")

        self.broker = RedisServer("broker", home / "broker", BROKER_CONFIG, mark=mark)
        self.cache = RedisServer("cache", home / "cache", CACHE_CONFIG, mark=mark)
        for server in (self.broker, self.cache):
            server.start()
            self.closing.callback(server.purge)

        self.failpoints = home / "failpoints"
        self.failpoints.mkdir()

        self.settings = self._settings()
        migrate(self.settings)
        self.installation = Installation(self.settings, self.catalog)

        self.users = list(USERS)
        """All users that exist; a test that adds users adds them here."""
        self.installation.add_users(USERS)

        env_file = home / "stack.env"
        write_env(env_file, self.settings)

        self.supervisor = Supervisord(home / "run", logs=home / "logs", mark=mark)
        self.closing.callback(self.supervisor.stop)

        processes = [process for process in service_processes() if process.name in PROCESSES]
        self.supervisor.start(processes, env={"SEGSVC_ENV_FILE": str(env_file)})
        eventually(lambda: is_serving(self.settings), 60)

        self.client = Client.of(self.settings)
        self.closing.callback(self.client.close)
        eventually(self.workers_answer, 60)

    def _postgres(self, folder: Path) -> PostgresServer:
        server = PostgresServer(folder, mark=self.mark, fast=True)
        self.closing.callback(server.purge)
        server.start()
        return server

    def _settings(self) -> Settings:
        dsns = []
        for shard in range(SHARDS):
            self.server_of(shard).create_database(f"shard_{shard}")
            dsns.append(self.server_of(shard).dsn(f"shard_{shard}"))

        self.catalog.create_database("catalog")

        return Settings(
            _env_file=None,
            cluster="faults",
            catalog_dsn=self.catalog.dsn("catalog"),
            shard_dsns=tuple(dsns),
            cache_url=self.cache.url,
            broker_url=self.broker.url,
            grpc_address=f"127.0.0.1:{free_ports(1)[0]}",
            metrics_address="",
            failpoint_dir=self.failpoints,
            stack_dir=self.home,
            operation_deadline_s=DEADLINE_S,
            recovery_interval_s=1.0,
            redispatch_quiet_s=1.0,
        )

    def close(self) -> None:
        self.closing.close()

    # -- servers and processes --------------------------------------------------------------------------------------

    def server_of(self, shard: int) -> PostgresServer:
        return self.alone if shard == ALONE else self.together

    def kill_processes(self, names: Sequence[str] = WORKERS) -> None:
        """SIGKILL these processes and their children; the supervisor starts them again (``workers_answer``)."""
        for name in names:
            pid = self.supervisor.pid_of(name)
            if pid is not None:
                os.killpg(os.getpgid(pid), signal.SIGKILL)
        [row] = self.execute_catalog("SELECT clock_timestamp() AS now")
        self._killed_at = row.now

    @property
    def prefix(self) -> str:
        """Prefix of every key on the broker."""
        return installation_of(self.settings).broker_prefix

    @property
    def keys(self) -> Keys:
        """Keys of the cache."""
        return Keys(installation_of(self.settings).tag.encode())

    @contextmanager
    def frozen(self, process: str) -> Iterator[None]:
        """Stop a process and all its children as long as the block lasts."""
        pid = self.supervisor.pid_of(process)
        assert pid is not None
        os.killpg(os.getpgid(pid), signal.SIGSTOP)
        try:
            yield
        finally:
            os.killpg(os.getpgid(pid), signal.SIGCONT)

    @contextmanager
    def another(
        self, name: str, arguments: Sequence[str], *, code: str | None = None, **settings: object
    ) -> Iterator[Settings]:
        """Run one more process of ours, with its own settings, as long as the block lasts.

        Args:
            arguments: arguments of the command ``segsvc``.
            code: Python code to run instead of that command.
        """
        own = self.settings.model_copy(update=settings)
        env_file = self.home / f"{name}.env"
        write_env(env_file, own)
        daemon = Daemon(name, self.home / name, log=self.home / "logs" / f"{name}.log", mark=self.mark)
        program = ["-m", "segsvc"] if code is None else ["-c", code]

        daemon.spawn([sys.executable, *program, *arguments], env={"SEGSVC_ENV_FILE": str(env_file)})

        try:
            yield own
        finally:
            daemon.stop(signals=((signal.SIGTERM, 20.0), (signal.SIGKILL, 5.0)))

    def workers_answer(self) -> bool:
        """Whether all processes run, and recovery has run lately and since the last kill.

        Then beat, broker and worker are in service.
        """
        if any(state.state not in ("RUNNING", "STARTING") for state in self.supervisor.states()):
            return False
        [row] = self.execute_catalog(
            "SELECT recovery_time > greatest(now() - interval '5 s', :killed) AS looked FROM installation",
            killed=self._killed_at,
        )
        return bool(row.looked)

    def empty_broker(self) -> None:
        with redis.Redis.from_url(self.broker.url) as server:
            server.flushall()

    def log_ends(self) -> dict[str, int]:
        """Present length of the logs of the processes that carry operations out."""
        return {process: len(self._log_of(process)) for process in CARRIERS}

    def logged(self, since: Mapping[str, int]) -> str:
        """What these processes have logged since ``log_ends`` was called."""
        return "".join(self._log_of(process)[since[process] :] for process in CARRIERS)

    def _log_of(self, process: str) -> str:
        return self.supervisor.log_of(process).read_text(encoding="utf-8")

    def heal(self) -> None:
        """Start every server and release every held process."""
        for armed in self.failpoints.iterdir():
            armed.unlink(missing_ok=True)
        for server in (self.catalog, self.together, self.alone, self.broker, self.cache):
            server.start()

    @contextmanager
    def armed(self, point: str, action: str = "hold") -> Iterator[Point]:
        """Arm a failpoint as long as the block lasts."""
        made = Point(self.failpoints / point)
        made.file.with_suffix(".fired").unlink(missing_ok=True)
        made.file.write_text(action)
        try:
            yield made
        finally:
            made.release()

    # -- what is there ----------------------------------------------------------------------------------------------

    def execute_catalog(self, statement: str, **parameters: object) -> Sequence[sa.Row[tuple[object, ...]]]:
        return self.installation.execute(None, statement, **parameters)

    def state(self, name: str) -> str:
        """An operation's state, by the name that the API gives it."""
        [row] = self.execute_catalog("SELECT state FROM operations WHERE id = :id", id=id_of(name))
        return str(row.state)

    def votes(self, name: str) -> set[int]:
        rows = self.execute_catalog("SELECT shard FROM votes WHERE operation_id = :id", id=id_of(name))
        return {int(str(row.shard)) for row in rows}

    def prepared_on(self, name: str, shards: Sequence[int] = range(SHARDS)) -> set[int]:
        """The shards, out of ``shards``, on which an operation is prepared now."""
        return {shard for shard in shards if any(str(id_of(name)) in gid for gid in self.installation.prepared(shard))}

    def fenced_on(self, name: str, shards: Sequence[int] = range(SHARDS)) -> set[int]:
        """Shards on which an operation has taken effect."""
        statement = "SELECT FROM applied_operations WHERE operation_id = :id"
        return {shard for shard in shards if self.installation.execute(shard, statement, id=id_of(name))}

    def members(self, slug: str, percent: float, *, asked: int | None = None) -> set[int]:
        """Members by the published hash. ``asked``: the shard from which the salt is read; None: the catalog."""
        [row] = self.installation.execute(asked, "SELECT salt FROM segments WHERE slug = :slug", slug=slug)
        salt = tables.salt_from_db(int(str(row.salt)))
        return {user for user in self.users if bucket(user, salt) < round(percent * 1000)}

    def read(self, slug: str, client: Client | None = None) -> set[int]:
        """Members by every user's own read. ``client``: a client of another front."""
        return {user for user, slugs in (client or self.client).many_user_segments(self.users) if slug in (slugs or ())}

    def new_segment(self, slug: str, percent: float) -> None:
        self.client.create(slug, "")
        self.client.roll_out(slug, percent)

    def begin(self, slug: str, percent: float) -> str:
        """Start a rollout, whether or not the front answers. Returns the operation's name."""
        statement = "SELECT id FROM operations WHERE slug = :slug ORDER BY seq DESC LIMIT 1"
        before = self.execute_catalog(statement, slug=slug)
        request = segments_pb2.RollOutSegmentRequest(
            slug=slug, rule=segments_pb2.RollOutRule(percent=percent), return_immediately=True
        )

        # The call is kept, because a call without a reference to it is cancelled.
        self._calls.append(self.client.segments.RollOutSegment.future(request, timeout=DEADLINE_S))

        eventually(lambda: self.execute_catalog(statement, slug=slug) != before)
        return f"operations/{self.execute_catalog(statement, slug=slug)[0].id}"

    # -- what must hold after any fault -----------------------------------------------------------------------------

    def drained(self) -> bool:
        """Whether no operation is open and nothing is prepared."""
        try:
            pending = self.execute_catalog("SELECT FROM operations WHERE state NOT IN ('DONE', 'ABORTED')")
            return not pending and not any(self.installation.prepared(shard) for shard in range(SHARDS))
        except sa.exc.OperationalError:
            return False

    def expect_well(self, slug: str, percent: float) -> None:
        """Everything drains without help, reads and stored bits match the rule, and a second operation succeeds.

        Args:
            percent: the rule of ``slug`` that must be in force.
        """
        eventually(self.drained, DRAIN_S)
        self.client.wait_ready(DRAIN_S)
        self._expect_rule(slug, percent)

        second = percent / 2
        eventually(lambda: self._roll_out(slug, second), DRAIN_S)
        self._expect_rule(slug, second)

        checking = Check(self.settings)
        try:
            report = checking.checker.run()
        finally:
            checking.close()

        assert [difference.to_json() for difference in report.differences] == []

    def _expect_rule(self, slug: str, percent: float) -> None:
        [row] = self.execute_catalog("SELECT id FROM segments WHERE slug = :slug", slug=slug)
        expected = self.members(slug, percent)
        assert self.installation.members(int(str(row.id))) == expected
        assert self.read(slug) == expected

    def _roll_out(self, slug: str, percent: float) -> bool:
        """Roll out. Returns False if it is refused because a server has only just come back.

        An operation that was accepted must succeed.
        """
        try:
            self.client.roll_out(slug, percent)
        except grpc.RpcError as error:
            if isinstance(error, grpc.Call) and error.code() in OUTAGE:
                return False
            raise
        return True


def id_of(name: str) -> UUID:
    """The id in an operation's name."""
    return UUID(name.rpartition("/")[2])
