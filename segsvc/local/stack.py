"""All of segsvc on this machine: servers, migrations, and our own processes, started and stopped as one.

Order of start: PostgreSQL, broker, cache, Kafka and its topics; ``stack.env`` with all settings; migrations; then our
processes under supervisord, and with them the keeper, which starts a server again that has ended by itself. ``down``
stops them in reverse order. If a first start fails or is interrupted, no process is left behind; data folders appear
complete or not at all. Where parts of the stack run already, ``up`` starts the missing parts and stops nothing.
"""

from __future__ import annotations

import contextlib
import dataclasses
import fcntl
import json
import os
import secrets
import shutil
import signal
import sys
from collections.abc import Callable, Iterator, Mapping, Sequence
from pathlib import Path
from types import TracebackType
from typing import Any, Self

import psutil

from segsvc.access.tokens import digest_of
from segsvc.config import Settings
from segsvc.domain.access import Role
from segsvc.local import preflight
from segsvc.local.kafka import KafkaServer
from segsvc.local.processes import (
    MARKER,
    LocalStackError,
    find_marked,
    is_running,
    kill_marked,
    start,
    tail,
    termination_raises,
    uninterrupted,
    wait_patiently,
    wait_until,
)
from segsvc.local.servers import Servers
from segsvc.local.stack_env import StackChoices, choose_ports, preferred_ports, read_env, write_env, write_private
from segsvc.local.supervision import ProcessSpec, Supervisord
from tasks.queues import QUEUES

RUNNING_TIMEOUT_S = 90.0
READY_TIMEOUT_S = 60.0
MIGRATE_TIMEOUT_S = 300.0
SHARDS = 4

Say = Callable[[str], object]


@dataclasses.dataclass(frozen=True)
class Part:
    """One server or process in ``LocalStack.status``. ``state``: RUNNING, STOPPED, or another state of supervisord."""

    name: str
    state: str
    pid: int | None
    log: Path


def service_processes() -> tuple[ProcessSpec, ...]:
    """Our own processes, one ``segsvc`` command each. Every queue has a worker of its own, so that no queue starves."""

    def segsvc(name: str, *arguments: str, stop_as_group: bool = True) -> ProcessSpec:
        return ProcessSpec(name, (sys.executable, "-m", "segsvc", *arguments), stop_as_group=stop_as_group)

    return (
        segsvc("serve", "serve"),
        *(segsvc(f"worker-{queue}", "worker", "--queue", queue, stop_as_group=False) for queue in QUEUES),
        segsvc("beat", "beat"),
        segsvc("bridge", "bridge"),
        segsvc("flower", "flower"),
    )


class LocalStack:
    """Starts, stops and describes the stack of one folder.

    Args:
        settings_overrides: settings by field name; they override the environment and the choices made here.
        home: the stack's folder; by default the setting ``stack_dir``.
        processes: our own processes.
        shards: number of shard databases. Fixed by the first ``up`` of a folder: another number needs another folder.
        jars: where Kafka's jars are kept for all stacks; by default ``kafka-jars`` beside ``home``.
        fast: for tests: PostgreSQL's data survives a killed process but not a power failure.
        say: called with a sentence about each step.
        ready: called with the settings, repeatedly, once all processes run; ``up`` returns when it returns True.
        migrate: command that migrates catalog and shards; None: nothing is migrated.

    As a context manager: up inside the block, and down (data kept) after it, also after SIGTERM and Ctrl-C.
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
        self.supervisor = Supervisord(self.home / "run", logs=self.logs, mark=self.home)

    # -- commands ---------------------------------------------------------------------------------------------------

    @property
    def settings(self) -> Settings:
        """Settings of the running stack, also if another command started it.

        Raises:
            LocalStackError: the stack is not up.
        """
        if self._settings is None:
            if not self.env_file.exists():
                raise LocalStackError(f"the stack of {self.home} is not up (make up)")
            self._settings = Settings(_env_file=None, **read_env(self.env_file))
        return self._settings

    def up(self) -> Settings:
        """Start the parts that do not run, and return the settings. Ports, passwords and data stay as they were. If all
        parts run, change nothing and say so.

        Raises:
            LocalStackError: a part did not start: which, why, and the last lines of its log. Parts that ran before this
                call keep running; if there were none, everything that was started is stopped again. The logs stay.
            KeyboardInterrupt, SystemExit: interrupted; the same holds. A folder that this call made is removed.
        """
        with termination_raises(), self._locked() as fresh:
            if self._is_up():
                self._say(f"already up ({self.home})")
                return self.settings
            ran_before = self._kill_leftovers()
            if ran_before:
                self._say("parts of the stack run; starting the missing parts")
            try:
                self._start_missing()
            except BaseException as error:
                if ran_before:
                    self._say(
                        "the parts that ran before keep running (segsvc status shows them, segsvc down stops them)"
                    )
                    raise
                with uninterrupted():
                    self._say("stopping what was started")
                    self._stop_all()
                    if fresh and not isinstance(error, Exception):
                        self._remove()
                raise
            return self.settings

    def down(self, *, purge: bool = False) -> None:
        """Stop everything, and make sure that no process is left. Does nothing if the stack is not up.

        Args:
            purge: also delete the data and the folder.

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
        """Every server and process with its state, in the order of start."""
        parts = [
            Part(daemon.name, "RUNNING" if daemon.running else "STOPPED", daemon.pid, daemon.log)
            for daemon in self._servers().daemons()
        ]
        if self.supervisor.running:
            parts += [
                Part(state.name, state.state, state.pid, self.supervisor.log_of(state.name))
                for state in self.supervisor.states()
            ]
        else:
            specs = (*self._processes, self._keeper())
            parts += [Part(spec.name, "STOPPED", None, self.supervisor.log_of(spec.name)) for spec in specs]
        return parts

    def __enter__(self) -> Self:
        with contextlib.ExitStack() as undo:
            undo.enter_context(termination_raises())
            self.up()
            undo.callback(self.down)
            self._stack = undo.pop_all()
        return self

    def __exit__(
        self, kind: type[BaseException] | None, error: BaseException | None, trace: TracebackType | None
    ) -> None:
        self._stack.close()

    # -- up ---------------------------------------------------------------------------------------------------------

    def _start_missing(self) -> None:
        """Start the parts that do not run. Running parts stay, unless an address that they use has changed."""
        for finding in preflight.require(self.home):
            self._say(f"ATTENTION: {finding}")
        self.logs.mkdir(parents=True, exist_ok=True)
        databases = ["segsvc_catalog", *(f"segsvc_shard_{shard}" for shard in range(self._shards))]

        with contextlib.ExitStack() as reserved:
            servers = self._servers()
            kafka = servers.start(databases, reserved, say=self._say)
            addresses = self._addresses(servers, databases, kafka)
            if self._runs_with(addresses):
                self._say(f"starting {', '.join(self.supervisor.start_missing()) or 'nothing else'}")
            else:
                # Our processes run with outdated settings, or do not run.
                self.supervisor.stop()
                choices = StackChoices(self.home / "kept.json")
                choices.ports |= choose_ports(reserved, preferred_ports(choices))
                choices.write()
                self._settings = self._choose_settings(addresses, choices)
                write_env(self.env_file, self._settings)
                self._run_migrations()

                self._say(f"starting {', '.join(spec.name for spec in self._processes)}")
                self.supervisor.start([*self._processes, self._keeper()], env=self._child_env())
            self.supervisor.await_running(timeout_s=RUNNING_TIMEOUT_S)
            self._await_ready(self.settings)
        self._say("the stack is up")

    def _runs_with(self, addresses: Mapping[str, Any]) -> bool:
        """Whether supervisord runs exactly our processes, with these settings."""
        if not self.supervisor.running or not self.env_file.exists():
            return False
        names = {spec.name for spec in (*self._processes, self._keeper())}
        same = all(getattr(self.settings, name) == value for name, value in {**addresses, **self._overrides}.items())
        return same and {state.name for state in self.supervisor.states()} == names

    def _keeper(self) -> ProcessSpec:
        """The process that starts a server again after it has ended by itself."""
        arguments = (str(self.home), str(self._jars.resolve()), *(["--fast"] if self._fast else []))
        return ProcessSpec("servers", (sys.executable, "-m", "segsvc.local.keeper", *arguments))

    def _addresses(self, servers: Servers, databases: Sequence[str], kafka: KafkaServer) -> dict[str, Any]:
        """The settings that lead to the servers, and to this folder."""
        postgres = servers.postgres()
        catalog, *shards = databases
        return {
            "catalog_dsn": postgres.dsn(catalog),
            "shard_dsns": tuple(postgres.dsn(shard) for shard in shards),
            "broker_url": servers.redis("broker").url,
            "cache_url": servers.redis("cache").url,
            # Servers that the environment names are no part of this stack.
            "cache_urls": (),
            "cache_urls_also": (),
            "kafka_bootstrap_servers": kafka.bootstrap_servers,
            "kafka_stand_in": kafka.stand_in,
            "stack_dir": self.home,
        }

    def _choose_settings(self, addresses: Mapping[str, Any], choices: StackChoices) -> Settings:
        """All settings: the servers' addresses are ours, the rest may come from the environment; the overrides win."""
        proposed: dict[str, Any] = {
            **{name: f"127.0.0.1:{choices.ports[name]}" for name in preferred_ports(choices)},
            "grpc_reflection": True,
            **self._own_access(choices),
            "flower_password": choices.secret("flower_password", lambda: secrets.token_urlsafe(12)),
            "flower_db": self.home / "flower.db",
            # Below the cache's maxmemory: the warmer must not cause evictions.
            "cache_warm_budget_bytes": 3 << 29,
        }
        given = self._base_settings().model_fields_set
        free = {name: value for name, value in proposed.items() if name not in given}
        base = self._base_settings().model_dump(include=given)
        return Settings(_env_file=None, **{**base, **free, **addresses, **self._overrides})

    def _own_access(self, choices: StackChoices) -> dict[str, Any]:
        """A token of an administrator, in a file for the owner of the stack, and the front's file that knows it. Empty
        if the environment or the overrides say who may call."""
        if "auth" in self._base_settings().model_fields_set or "auth" in self._overrides:
            return {}
        token = choices.secret("admin_token", lambda: secrets.token_urlsafe(32))
        entry = {"name": "local-admin", "sha256": digest_of(token).hex(), "roles": [Role.ADMIN.text]}
        known, own = self.home / "tokens.json", self.home / "admin.token"
        write_private(known, json.dumps([entry], indent=2) + "\n")
        write_private(own, token + "\n")
        return {"auth": "tokens", "auth_tokens_file": known, "token_file": own}

    def _base_settings(self) -> Settings:
        """Settings of the environment (and of SEGSVC_ENV_FILE, unless that is this stack's own file), no defaults."""
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
                wait_patiently(lambda: child.poll() is not None, timeout_s=MIGRATE_TIMEOUT_S)
            finally:
                if child.poll() is None:
                    os.killpg(child.pid, signal.SIGKILL)
                    child.wait()
        if child.returncode != 0:
            raise LocalStackError(
                f"migrating failed (exit code {child.returncode}). The last lines of {log}:\n{tail(log)}"
            )

    def _await_ready(self, settings: Settings) -> None:
        ready = self._ready
        if ready is not None and not wait_patiently(lambda: ready(settings), timeout_s=READY_TIMEOUT_S, poll_s=0.1):
            name = self._processes[0].name
            raise LocalStackError(
                f"{name} runs but did not become ready within {READY_TIMEOUT_S:g} s. "
                f"The last lines of {self.supervisor.log_of(name)}:\n{self.supervisor.last_lines(name)}"
            )

    def _child_env(self) -> dict[str, str]:
        return {"SEGSVC_ENV_FILE": str(self.env_file)}

    # -- down -------------------------------------------------------------------------------------------------------

    def _stop_all(self) -> None:
        """Stop all parts in order, as gently as possible; then kill all processes that still have this stack's mark."""
        if self.supervisor.running:
            self._say("stopping our processes")
        failures: list[str] = []
        # Our processes first: the keeper, which is one of them, would start the servers again.
        stops = [self.supervisor.stop, *self._servers().stops()]
        for stop in stops:
            try:
                stop()
            except LocalStackError as error:  # continue: the other parts must be stopped as well
                failures.append(str(error))

        if killed := kill_marked(self.home):
            self._say(f"killed what did not belong to a running stack: {', '.join(killed)}")
        if self._settings is not None or self.env_file.exists():
            # Without the file, commands say that the stack is not up instead of failing at dead addresses.
            self.env_file.unlink(missing_ok=True)
            self._settings = None
        if failures and find_marked(self.home):
            raise LocalStackError("; ".join(failures))

    def _remove(self) -> None:
        """Delete the folder, and the files of the stack that are elsewhere."""
        self._servers().postgres().purge()
        shutil.rmtree(self.home, ignore_errors=True)
        if self.supervisor.socket.parent != self.supervisor.folder:
            shutil.rmtree(self.supervisor.socket.parent, ignore_errors=True)

    # -- parts ------------------------------------------------------------------------------------------------------

    def _servers(self) -> Servers:
        return Servers(self.home, jars=self._jars, fast=self._fast)

    def _kill_leftovers(self) -> bool:
        """Kill the processes that have this stack's mark but belong neither to its servers nor to its supervisord:
        a killed launcher or parent has left them. Returns whether a part of the stack still runs.
        """
        # In this order: a process that a server forks after the scan is not among those found.
        found = find_marked(self.home)
        daemons = [*self._servers().daemons(), self.supervisor.daemon]
        roots = [process for daemon in daemons if (process := daemon.process())]

        belonging: set[int] = set()
        for root in roots:
            with contextlib.suppress(psutil.NoSuchProcess):  # it has just ended: its children have no parent any more
                belonging |= {root.pid, *(child.pid for child in root.children(recursive=True))}

        leftovers = [process for process in found if process.pid not in belonging]
        for process in leftovers:
            with contextlib.suppress(psutil.NoSuchProcess):
                self._say(f"killing what an earlier run left: {process.name()} ({process.pid})")
                process.kill()

        if not wait_until(lambda: not any(map(is_running, leftovers)), timeout_s=10):
            raise LocalStackError(f"these processes could not be killed: {', '.join(str(p.pid) for p in leftovers)}")
        return bool(roots)

    def _is_up(self) -> bool:
        """Whether all parts run (except the user's own Kafka). If not, the parts that run are left-overs."""
        if not self.env_file.exists() or not self.supervisor.running:
            return False
        parts = self.status()
        uses_own_kafka = bool(os.environ.get("SEGSVC_KAFKA_BOOTSTRAP_SERVERS"))
        return all(part.state in ("RUNNING", "STARTING") or (part.name == "kafka" and uses_own_kafka) for part in parts)

    @contextlib.contextmanager
    def _locked(self) -> Iterator[bool]:
        """Lock the folder against other launchers; yields whether the folder is new.

        Raises:
            LocalStackError: another launcher has the lock.
        """
        fresh = not self.home.exists()
        self.home.mkdir(parents=True, exist_ok=True)
        with (self.home / "lock").open("w") as lock:
            try:
                fcntl.flock(lock, fcntl.LOCK_EX | fcntl.LOCK_NB)
            except BlockingIOError:
                raise LocalStackError(f"another command is starting or stopping the stack of {self.home}") from None
            yield fresh
