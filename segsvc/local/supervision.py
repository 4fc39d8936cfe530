"""Our own processes under supervisord, which starts them, restarts them when they end, and rotates their logs.

supervisord runs in the foreground of a ``Daemon``; it is controlled over a Unix socket that only its user can open.
"""

from __future__ import annotations

import dataclasses
import http.client
import os
import shlex
import signal
import sys
import xmlrpc.client
from collections.abc import Mapping, Sequence
from pathlib import Path
from typing import Any

from supervisor.xmlrpc import SupervisorTransport

from segsvc.local.folders import make_private, socket_folder
from segsvc.local.processes import Daemon, LocalStackError, log_size, tail, wait_patiently

START_TIMEOUT_S = 30.0
# Longer than the stop timeout of any process (they are stopped in parallel).
STOP_TIMEOUT_S = 90.0
# A process that ends earlier than this has failed to start: in a crash loop its state is BACKOFF, in the end FATAL.
STARTED_AFTER_S = 2
START_ATTEMPTS = 20
# After this many failed starts of one process, we report it.
FAILED_STARTS_MAX = 3

_CONFIG = """\
; Written by segsvc at every start: changes here are lost.
[supervisord]
nodaemon = true
silent = true
logfile = {logs}/supervisord.log
logfile_maxbytes = 10MB
logfile_backups = 1
pidfile = {folder}/supervisord.own.pid
childlogdir = {logs}
minfds = 4096
umask = 077
{user}
[unix_http_server]
file = {socket}
chmod = 0600

[rpcinterface:supervisor]
supervisor.rpcinterface_factory = supervisor.rpcinterface:make_main_rpcinterface

[supervisorctl]
serverurl = unix://{socket}
"""

_PROGRAM = """\

[program:{name}]
command = {command}
autostart = true
autorestart = true
startsecs = {startsecs}
startretries = {startretries}
stopsignal = TERM
stopwaitsecs = {stop_timeout_s}
stopasgroup = {stop_as_group}
killasgroup = true
redirect_stderr = true
stdout_logfile = {logs}/{name}.log
stdout_logfile_maxbytes = 10MB
stdout_logfile_backups = 2
"""


@dataclasses.dataclass(frozen=True)
class ProcessSpec:
    """One process to keep running.

    Attributes:
        name: its name for people; its log is ``<name>.log``.
        argv: program and arguments.
        stop_timeout_s: seconds from SIGTERM to SIGKILL of its whole process group; below ``STOP_TIMEOUT_S``.
        stop_as_group: whether its children get SIGTERM, too. False for Celery workers: SIGTERM would kill the pool in
            the middle of its tasks, while the parent alone lets the tasks finish.
    """

    name: str
    argv: tuple[str, ...]
    stop_timeout_s: int = 20
    stop_as_group: bool = True


@dataclasses.dataclass(frozen=True)
class ProcessState:
    """What supervisord knows about a process.

    Attributes:
        state: STARTING, RUNNING, BACKOFF, STOPPED, FATAL, …
        pid: None if there is no process.
        description: for people: the uptime, or the last error.
    """

    name: str
    state: str
    pid: int | None
    description: str


class Supervisord:
    """supervisord with a fixed set of processes.

    Args:
        folder: folder of its configuration and socket.
        logs: folder of all logs.
        mark: the stack's folder for ``processes.find_marked``.
    """

    def __init__(self, folder: Path, *, logs: Path, mark: Path | None = None) -> None:
        self.folder = folder.resolve()
        self.logs = logs.resolve()
        self.daemon = Daemon("supervisord", self.folder, log=self.logs / "supervisord.out", mark=mark)
        self._logs_before: dict[str, int] = {}
        # supervisord first makes the socket with its process id appended to the name.
        self.socket = socket_folder(self.folder, longest_name="control.0123456789") / "control"

    @property
    def running(self) -> bool:
        return self.daemon.running

    @property
    def config(self) -> Path:
        """Its configuration file: people can use ``supervisorctl -c <config>`` at the same time."""
        return self.folder / "supervisord.conf"

    def start(self, processes: Sequence[ProcessSpec], *, env: Mapping[str, str]) -> None:
        """Start supervisord and all processes with ``env`` in their environment; returns when supervisord answers.

        Raises:
            LocalStackError: supervisord itself did not start.
        """
        self.folder.mkdir(parents=True, exist_ok=True)
        self.logs.mkdir(parents=True, exist_ok=True)
        make_private(self.socket.parent)
        self._logs_before = {process.name: log_size(self.log_of(process.name)) for process in processes}
        self.config.touch(mode=0o600)
        self.config.write_text(self._render(processes))

        argv = [sys.executable, "-m", "supervisor.supervisord", "-c", str(self.config)]
        self.daemon.spawn(argv, env={"PYTHONUNBUFFERED": "1", **env})
        self.daemon.await_ready(self._answers, timeout_s=START_TIMEOUT_S)

    def start_missing(self) -> list[str]:
        """Start the processes that do not run and that supervisord no longer restarts; returns their names.

        Raises:
            LocalStackError: supervisord does not answer.
        """
        missing = [state.name for state in self.states() if state.state in ("STOPPED", "EXITED", "FATAL", "UNKNOWN")]
        for name in missing:
            self._logs_before[name] = log_size(self.log_of(name))
            # Without waiting: await_running waits.
            self._call("startProcess", name, False)
        return missing

    def await_running(self, *, timeout_s: float) -> None:
        """Wait (``wait_patiently``) until all processes run and have stayed up for a moment.

        Raises:
            LocalStackError: a process did not; with the last lines of its log.
        """
        attempts: dict[str, set[int]] = {}

        def settled() -> bool:
            infos = self._call("getAllProcessInfo")
            for info in infos:
                if info["statename"] == "BACKOFF":
                    attempts.setdefault(info["name"], set()).add(info["start"])
            looping = any(len(starts) >= FAILED_STARTS_MAX for starts in attempts.values())
            states = {info["statename"] for info in infos}
            return looping or "FATAL" in states or states <= {"RUNNING"}

        wait_patiently(settled, timeout_s=timeout_s)
        for process in self.states():
            if process.state != "RUNNING":
                raise LocalStackError(
                    f"{process.name} does not stay up ({process.state}). "
                    f"The last lines of {self.log_of(process.name)}:\n{self.last_lines(process.name)}"
                )

    def states(self) -> list[ProcessState]:
        """All processes by name.

        Raises:
            LocalStackError: supervisord does not answer.
        """
        return [
            ProcessState(info["name"], info["statename"], info["pid"] or None, info["description"])
            for info in self._call("getAllProcessInfo")
        ]

    def pid_of(self, name: str) -> int | None:
        """Process id of one process; None while it does not run.

        Raises:
            LocalStackError: there is no such process, or supervisord does not answer.
        """
        return self._call("getProcessInfo", name)["pid"] or None

    def log_of(self, name: str) -> Path:
        """Log of one process (older logs are beside it: ``.1``, ``.2``)."""
        return self.logs / f"{name}.log"

    def last_lines(self, name: str) -> str:
        """The end of a process's log since this object started it; of its whole log, if another object did."""
        return tail(self.log_of(name), since=self._logs_before.get(name, 0))

    def stop_process(self, name: str) -> None:
        """Stop one process and wait for its end; supervisord does not start it again until ``start_process``."""
        self._call("stopProcess", name)

    def start_process(self, name: str) -> None:
        """Start one process and wait until it has stayed up for a moment."""
        self._call("startProcess", name)

    def stop(self) -> None:
        """Stop all processes in order, then supervisord. Returns when they are gone."""
        self.daemon.stop(signals=((signal.SIGTERM, STOP_TIMEOUT_S), (signal.SIGKILL, 5.0)))

    def _render(self, processes: Sequence[ProcessSpec]) -> str:
        def escaped(value: object) -> str:
            return str(value).replace("%", "%%")

        logs = escaped(self.logs)
        # With or without this line root stays root; without it, supervisord prints a warning.
        user = "user = root\n" if os.geteuid() == 0 else ""
        head = _CONFIG.format(logs=logs, folder=escaped(self.folder), socket=escaped(self.socket), user=user)
        return head + "".join(
            _PROGRAM.format(
                name=process.name,
                command=escaped(shlex.join(process.argv)),
                startsecs=STARTED_AFTER_S,
                startretries=START_ATTEMPTS,
                stop_timeout_s=process.stop_timeout_s,
                stop_as_group="true" if process.stop_as_group else "false",
                logs=logs,
            )
            for process in processes
        )

    def _answers(self) -> bool:
        try:
            return bool(self._call("getState")["statename"] == "RUNNING")
        except LocalStackError:
            return False

    def _call(self, method: str, *arguments: object) -> Any:
        """One call of supervisord's XML-RPC interface.

        Raises:
            LocalStackError: supervisord cannot be reached, or refuses.
        """
        transport = SupervisorTransport(None, None, f"unix://{self.socket}")
        proxy = xmlrpc.client.ServerProxy("http://127.0.0.1", transport=transport)
        try:
            return getattr(proxy.supervisor, method)(*arguments)
        except xmlrpc.client.Fault as fault:
            raise LocalStackError(f"supervisord refused {method} {arguments}: {fault.faultString}") from fault
        except (OSError, http.client.HTTPException, xmlrpc.client.ProtocolError) as error:
            raise LocalStackError(f"supervisord does not answer at {self.socket}: {error}") from error
        finally:
            transport.close()
