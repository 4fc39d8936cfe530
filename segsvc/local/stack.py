"""The whole of segsvc on this machine: servers, migrations, and our own processes, started and stopped as one.

Order of life: PostgreSQL, broker, cache, Kafka and its topics; ``stack.env`` with all settings; migrations; then our
processes under supervisord. ``down`` goes the other way. Whatever goes wrong on the way up, or whoever interrupts it,
leaves no process behind; data folders appear whole or not at all.
"""

from __future__ import annotations

import contextlib
import dataclasses
import fcntl
import os
import secrets
import shutil
import signal
import sys
from collections.abc import Callable, Iterator, Mapping, Sequence
from pathlib import Path
from types import TracebackType
from typing import Any, Self

from segsvc.config import Settings
from segsvc.local import preflight
from segsvc.local.kafka import TOPICS, KafkaServer, start_kafka
from segsvc.local.postgres import PostgresServer
from segsvc.local.processes import (
    MARKER,
    Daemon,
    LocalStackError,
    ended_as_interrupted,
    find_marked,
    kill_marked,
    start,
    tail,
    uninterrupted,
    wait_until,
)
from segsvc.local.redis import BROKER_CONFIG, CACHE_CONFIG, RedisServer
from segsvc.local.stack_env import choose_ports, read_env, write_env
from segsvc.local.supervision import ProcessSpec, Supervisor

RUNNING_TIMEOUT_S = 90.0
READY_TIMEOUT_S = 60.0
MIGRATE_TIMEOUT_S = 300.0
SHARDS = 4

Say = Callable[[str], object]


@dataclasses.dataclass(frozen=True)
class Part:
    """One server or process in ``LocalStack.status``. ``state``: RUNNING, STOPPED, or supervisord's other words."""

    name: str
    state: str
    pid: int | None
    log: Path


def service_processes() -> tuple[ProcessSpec, ...]:
    """Our own processes, one ``segsvc`` command each. Every queue has a worker of its own, so that none starves."""

    def segsvc(name: str, *arguments: str, stop_as_group: bool = True) -> ProcessSpec:
        return ProcessSpec(name, (sys.executable, "-m", "segsvc", *arguments), stop_as_group=stop_as_group)

    queues = ("operations", "events", "warming")
    return (
        segsvc("serve", "serve"),
        *(segsvc(f"worker-{queue}", "worker", "--queue", queue, stop_as_group=False) for queue in queues),
        segsvc("beat", "beat"),
        segsvc("bridge", "bridge"),
        segsvc("flower", "flower"),
    )


class LocalStack:
    """Starts, stops and describes the stack of one folder.

    Args:
        settings_overrides: settings by field name, stronger than the environment and than what is chosen here.
        home: the stack's folder; the setting ``stack_dir`` unless given.
        processes: our own processes.
        shards: number of shard databases. Fixed by the first ``up`` of a folder: other data, other folder.
        jars: where Kafka's jars are kept for all stacks; ``kafka-jars`` beside ``home`` unless given.
        fast: for tests: PostgreSQL survives a killed process, not a power cut.
        say: told, a sentence at a time, what happens.
        ready: asked with the settings, repeatedly, once all processes run; ``up`` returns when it answers True.
        migrate: command that migrates catalog and shards; None: nothing is migrated.

    As a context manager it is up inside the block, and down (data kept) after it, SIGTERM and Ctrl-C included.
    """

    def __init__(
        self,
        settings_overrides: Mapping[str, Any] | None = None,
        *,
        home: Path | None = None,
        processes: Sequence[ProcessSpec] | None = None,
        shards: int = SHARDS,
        jars: Path | None = None,
        fast: bool = False,
        say: Say = print,
        ready: Callable[[Settings], bool] | None = None,
        migrate: Sequence[str] | None = (sys.executable, "-m", "segsvc", "migrate"),
    ) -> None:
        self._overrides = dict(settings_overrides or {})
        self.home = (home or self._base_settings().stack_dir).resolve()
        self.env_file = self.home / "stack.env"
        self.logs = self.home / "logs"
        self._processes = service_processes() if processes is None else tuple(processes)
        self._shards = shards
        self._fast = fast
        self._jars = jars or self.home.parent / "kafka-jars"
        self._say = say
        self._ready = ready
        self._migrate = migrate
        self._settings: Settings | None = None
        self._stack = contextlib.ExitStack()
        self.supervisor = Supervisor(self.home / "run", logs=self.logs, mark=self.home)

    # -- what people call -------------------------------------------------------------------------------------------

    @property
    def settings(self) -> Settings:
        """Settings of the running stack (also those that another command started).

        Raises:
            LocalStackError: it is not up.
        """
        if self._settings is None:
            if not self.env_file.exists():
                raise LocalStackError(f"the stack of {self.home} is not up (make up)")
            self._settings = Settings(_env_file=None, **read_env(self.env_file))
        return self._settings

    def up(self) -> Settings:
        """Start everything and return its settings. Already up: says so and changes nothing. Left over from a crash:
        cleaned up first, data kept.

        Raises:
            LocalStackError: something did not start: what, why, and the last lines of the log that matters. All that
                had been started is stopped again; the logs stay.
            KeyboardInterrupt, SystemExit: interrupted; likewise. A folder that this call made is removed.
        """
        with ended_as_interrupted(), self._locked() as fresh:
            if self._is_up():
                self._say(f"already up ({self.home})")
                return self.settings
            try:
                if find_marked(self.home):
                    self._say("cleaning up what an earlier run left")
                    self._stop_all()
                self._start_all()
            except BaseException as error:
                with uninterrupted():
                    self._say("stopping what was started")
                    self._stop_all()
                    if fresh and not isinstance(error, Exception):
                        self._remove()
                raise
            return self.settings

    def down(self, *, purge: bool = False) -> None:
        """Stop everything, and see that nothing is left. Fine if it is not up.

        Args:
            purge: delete the data and the folder as well.

        Raises:
            LocalStackError: a process does not end.
        """
        if not self.home.exists() and not find_marked(self.home):
            return
        with uninterrupted(), self._locked():
            self._stop_all()
            if purge:
                self._remove()

    def status(self) -> list[Part]:
        """Every server and process with its state, in the order of starting."""
        parts = [
            Part(daemon.name, "RUNNING" if daemon.running else "STOPPED", daemon.pid, daemon.log)
            for daemon in self._server_daemons()
        ]
        if self.supervisor.running:
            parts += [
                Part(state.name, state.state, state.pid, self.supervisor.log_of(state.name))
                for state in self.supervisor.states()
            ]
        else:
            parts += [Part(spec.name, "STOPPED", None, self.supervisor.log_of(spec.name)) for spec in self._processes]
        return parts

    def __enter__(self) -> Self:
        with contextlib.ExitStack() as undo:
            undo.enter_context(ended_as_interrupted())
            self.up()
            undo.callback(self.down)
            self._stack = undo.pop_all()
        return self

    def __exit__(
        self, kind: type[BaseException] | None, error: BaseException | None, trace: TracebackType | None
    ) -> None:
        self._stack.close()

    # -- up ---------------------------------------------------------------------------------------------------------

    def _start_all(self) -> None:
        for finding in preflight.require(self.home):
            self._say(f"ATTENTION: {finding}")
        self.logs.mkdir(parents=True, exist_ok=True)

        self._say("starting PostgreSQL")
        postgres = self._postgres()
        if not postgres.location.is_relative_to(self.home):
            self._say(f"PostgreSQL does not run as root and its user cannot enter {self.home}: {postgres.location}")
        postgres.start()
        databases = ["segsvc_catalog", *(f"segsvc_shard_{shard}" for shard in range(self._shards))]
        for database in databases:
            postgres.create_database(database)

        self._say("starting Redis (broker, cache)")
        broker, cache = self._redis("broker"), self._redis("cache")
        broker.start()
        cache.start()

        self._say("starting Kafka")
        kafka = start_kafka(self.home / "kafka", jars=self._jars, mark=self.home, say=self._say)
        kafka.create_topics(TOPICS)

        with contextlib.ExitStack() as reserved:
            ports = choose_ports(reserved)
            self._settings = self._choose_settings(postgres, databases, broker, cache, kafka, ports)
            write_env(self.env_file, self._settings)
            self._run_migrations()

            self._say(f"starting {', '.join(spec.name for spec in self._processes)}")
            self.supervisor.start(self._processes, env=self._child_env())
            self.supervisor.await_running(timeout_s=RUNNING_TIMEOUT_S)
            self._await_ready(self._settings)
        self._say("the stack is up")

    def _choose_settings(
        self,
        postgres: PostgresServer,
        databases: Sequence[str],
        broker: RedisServer,
        cache: RedisServer,
        kafka: KafkaServer,
        ports: Mapping[str, int],
    ) -> Settings:
        """All settings: ours for the servers, the environment's where people may choose, the overrides above all."""
        catalog, *shards = databases
        servers: dict[str, Any] = {
            "catalog_dsn": postgres.dsn(catalog),
            "shard_dsns": tuple(postgres.dsn(shard) for shard in shards),
            "broker_url": broker.url,
            "cache_url": cache.url,
            "kafka_bootstrap_servers": kafka.bootstrap_servers,
            "kafka_stand_in": kafka.stand_in,
            "stack_dir": self.home,
        }
        choices: dict[str, Any] = {
            **{name: f"127.0.0.1:{port}" for name, port in ports.items()},
            "grpc_reflection": True,
            "flower_password": secrets.token_urlsafe(12),
            "flower_db": self.home / "flower.db",
            # Below the cache's maxmemory: the warmer must not make it evict.
            "cache_warm_budget_bytes": 3 << 29,
        }
        given = self._base_settings().model_fields_set
        free = {name: value for name, value in choices.items() if name not in given}
        base = self._base_settings().model_dump(include=given)
        return Settings(_env_file=None, **{**base, **free, **servers, **self._overrides})

    def _base_settings(self) -> Settings:
        """The environment (and a file named by SEGSVC_ENV_FILE, unless that is this stack's own), without defaults."""
        named = os.environ.get("SEGSVC_ENV_FILE")
        own = named and getattr(self, "env_file", None) == Path(named).resolve()
        return Settings(_env_file=None if own else named)

    def _run_migrations(self) -> None:
        if self._migrate is None:
            return
        self._say("migrating catalog and shards")
        log = self.logs / "migrate.log"
        with log.open("wb") as output:
            child = start(self._migrate, env={**self._child_env(), MARKER: str(self.home)}, output=output)
            try:
                code = child.wait(timeout=MIGRATE_TIMEOUT_S)
            finally:
                if child.poll() is None:
                    os.killpg(child.pid, signal.SIGKILL)
                    child.wait()
        if code != 0:
            raise LocalStackError(f"migrating failed (exit code {code}). The last lines of {log}:\n{tail(log)}")

    def _await_ready(self, settings: Settings) -> None:
        ready = self._ready
        if ready is not None and not wait_until(lambda: ready(settings), timeout_s=READY_TIMEOUT_S, poll_s=0.1):
            log = self.supervisor.log_of(self._processes[0].name)
            raise LocalStackError(
                f"{self._processes[0].name} runs but did not become ready within {READY_TIMEOUT_S:g} s. "
                f"The last lines of {log}:\n{tail(log)}"
            )

    def _child_env(self) -> dict[str, str]:
        return {"SEGSVC_ENV_FILE": str(self.env_file)}

    # -- down -------------------------------------------------------------------------------------------------------

    def _stop_all(self) -> None:
        """Stop in order, each as gently as it allows; then kill whatever still carries this stack's mark."""
        if self.supervisor.running:
            self._say("stopping our processes")
        failures: list[str] = []
        stops: list[Callable[[], None]] = [self.supervisor.stop]
        for daemon in reversed(self._server_daemons()):
            gentle = signal.SIGINT if daemon.name == "postgres" else signal.SIGTERM  # fast, not smart, shutdown
            stops.append(lambda d=daemon, g=gentle: d.stop(signals=((g, 30.0), (signal.SIGKILL, 5.0))))  # type: ignore[misc]
        for stop in stops:
            try:
                stop()
            except LocalStackError as error:  # go on: the others must not stay up because of this one
                failures.append(str(error))
        if killed := kill_marked(self.home):
            self._say(f"killed what did not belong to a running stack: {', '.join(killed)}")
        if self._settings is not None or self.env_file.exists():
            # Without it, commands say that nothing is there instead of failing at dead addresses.
            self.env_file.unlink(missing_ok=True)
            self._settings = None
        if failures and find_marked(self.home):
            raise LocalStackError("; ".join(failures))

    def _remove(self) -> None:
        """Delete the folder and what lies elsewhere because of it."""
        self._postgres().purge()
        shutil.rmtree(self.home, ignore_errors=True)
        if self.supervisor.socket.parent != self.supervisor.folder:
            shutil.rmtree(self.supervisor.socket.parent, ignore_errors=True)

    # -- parts ------------------------------------------------------------------------------------------------------

    def _postgres(self) -> PostgresServer:
        return PostgresServer(self.home / "postgres", mark=self.home, fast=self._fast)

    def _redis(self, name: str) -> RedisServer:
        config = BROKER_CONFIG if name == "broker" else CACHE_CONFIG
        return RedisServer(name, self.home / name, config, mark=self.home)

    def _server_daemons(self) -> list[Daemon]:
        """The servers by the records that they left, whoever started them; of the two Kafkas only one that is there."""

        def daemon(name: str, folder: str, log: str) -> Daemon:
            return Daemon(name, self.home / folder, log=self.home / folder / log, mark=self.home)

        kafkas = [daemon("kafka", "kafka", "kafka.log"), daemon("kafka-stand-in", "kafka", "kafka-stand-in.log")]
        return [
            daemon("postgres", "postgres", "postgres.log"),
            daemon("broker", "broker", "broker.log"),
            daemon("cache", "cache", "cache.log"),
            *([kafka for kafka in kafkas if kafka.running] or kafkas[:1]),
        ]

    def _is_up(self) -> bool:
        """Whether all of it runs (the user's own Kafka apart): anything less is a left-over."""
        if not self.env_file.exists() or not self.supervisor.running:
            return False
        parts = self.status()
        uses_own_kafka = bool(os.environ.get("SEGSVC_KAFKA_BOOTSTRAP_SERVERS"))
        return all(part.state in ("RUNNING", "STARTING") or (part.name == "kafka" and uses_own_kafka) for part in parts)

    @contextlib.contextmanager
    def _locked(self) -> Iterator[bool]:
        """Keep other launchers of this folder out; yields whether the folder is new.

        Raises:
            LocalStackError: another one is at work.
        """
        fresh = not self.home.exists()
        self.home.mkdir(parents=True, exist_ok=True)
        with (self.home / "lock").open("w") as lock:
            try:
                fcntl.flock(lock, fcntl.LOCK_EX | fcntl.LOCK_NB)
            except BlockingIOError:
                raise LocalStackError(f"another command is starting or stopping the stack of {self.home}") from None
            yield fresh
