"""Long-lived child processes that outlive their launcher: start them, find them again later, stop them reliably.

Every process starts in a session of its own (so a Ctrl-C at the terminal reaches only the launcher, which then stops
the processes in order). Its environment variable ``SEGSVC_LOCAL_STACK`` names the folder that it belongs to. All
descendants inherit the variable: ``find_marked`` finds the remaining processes of a stack even if the launcher was
killed before it could record a process id.
"""

from __future__ import annotations

import contextlib
import json
import os
import shutil
import signal
import socket
import subprocess
import time
from collections.abc import Callable, Iterator, Mapping, Sequence
from pathlib import Path
from typing import IO

import psutil

from segsvc.config import LOCAL_STACK_MARKER

MARKER = LOCAL_STACK_MARKER
POLL_S = 0.05
_ENDING = (signal.SIGTERM, signal.SIGHUP)


class LocalStackError(Exception):
    """A part of the local stack could not be started or stopped; the message says which, why, and what to do."""


def log_size(log: Path) -> int:
    """Size of a log file now, to find later what was written since; 0 if there is no file."""
    return log.stat().st_size if log.exists() else 0


def tail(log: Path, lines: int = 15, *, since: int = 0) -> str:
    """The last lines of a log file, indented, for an error message; a note if there are none.

    Args:
        since: skip the bytes before this offset, which an earlier run of the process wrote.
    """
    try:
        with log.open("rb") as file:
            size = log.stat().st_size
            # Smaller than before: the file was started again, so all of it is new.
            file.seek(max(since if since <= size else 0, size - 65536))
            last = file.read().decode("utf-8", "replace").splitlines()[-lines:]
    except FileNotFoundError:
        last = []
    return "\n".join(f"    {line}" for line in last) or "    (the log is empty)"


def wait_until(condition: Callable[[], bool], *, timeout_s: float, poll_s: float = POLL_S) -> bool:
    """Poll ``condition`` until it holds; False if it did not within ``timeout_s``."""
    deadline = time.monotonic() + timeout_s
    while not condition():
        if time.monotonic() >= deadline:
            return False
        time.sleep(poll_s)
    return True


BUSY_FACTOR = 10
"""On a machine without idle time, the wait may take this many times as long as on an idle one."""


def wait_patiently(condition: Callable[[], bool], *, timeout_s: float, poll_s: float = POLL_S) -> bool:
    """Poll ``condition`` until it holds; False if it did not within ``timeout_s`` of idle time of the machine.

    Time in which all processors were busy does not count: the process that we wait for may have been waiting for a
    processor. Nor does time in which the processors waited for a disk. At most ``BUSY_FACTOR`` × ``timeout_s`` in all.
    """
    began = last = time.monotonic()
    times = psutil.cpu_times()
    spent = 0.0
    while not condition():
        time.sleep(poll_s)
        now, before, times = time.monotonic(), times, psutil.cpu_times()
        passed = sum(times) - sum(before)
        # Too short for the kernel's counters: count it as idle.
        spent += (now - last) * (min(1.0, max(0.0, times.idle - before.idle) / passed) if passed > 0 else 1.0)
        last = now
        if spent >= timeout_s or now - began >= timeout_s * BUSY_FACTOR:
            return False
    return True


def free_ports(count: int, *, preferred: Sequence[int] = (), reserved: contextlib.ExitStack | None = None) -> list[int]:
    """``count`` different TCP ports of 127.0.0.1 on which nothing listens, ``preferred`` ones first.

    All of them are bound until the last one is found, so they differ. Another process may still take a port before it
    is used: then the server fails to start and says so. No other caller that passes ``reserved`` gets these ports until
    ``reserved`` is closed.
    """
    found: list[int] = []
    with contextlib.ExitStack() as held:
        for wanted in [*preferred, *[0] * count]:
            if len(found) == count:
                break
            probe = held.enter_context(socket.socket())
            probe.setsockopt(socket.SOL_SOCKET, socket.SO_REUSEADDR, 1)
            try:
                probe.bind(("127.0.0.1", wanted))
                port = probe.getsockname()[1]
                if reserved is not None:
                    # An abstract socket name: one process at a time holds it, and its end releases it.
                    name = reserved.enter_context(socket.socket(socket.AF_UNIX))
                    name.bind(f"\0segsvc-port-{port}")
            except OSError:
                continue
            found.append(port)
    return found


def is_running(process: psutil.Process) -> bool:
    """Whether the process still runs (a zombie does not; a new process with the same id is a different process)."""
    try:
        return process.is_running() and process.status() != psutil.STATUS_ZOMBIE
    except psutil.NoSuchProcess:
        return False


def find_marked(folder: Path) -> list[psutil.Process]:
    """All running processes that were started for ``folder``, with their descendants, except this process."""
    mark = str(folder.resolve())
    found = []
    for process in psutil.process_iter():
        if process.pid == os.getpid():
            continue
        # Its environment cannot be read, or it has ended: not a process of this stack.
        with contextlib.suppress(psutil.Error, OSError):
            if process.environ().get(MARKER) == mark and is_running(process):
                found.append(process)
    return found


def kill_marked(folder: Path, *, timeout_s: float = 10.0) -> list[str]:
    """SIGKILL all processes that ``find_marked`` finds until none is left; returns their names and ids.

    Raises:
        LocalStackError: a process survived (the message has its id).
    """
    killed: list[str] = []

    def none_left() -> bool:
        left = find_marked(folder)
        for process in left:
            with contextlib.suppress(psutil.NoSuchProcess):
                killed.append(f"{process.name()} ({process.pid})")
                process.kill()
        return not left

    # Repeated, because a process may fork between the scan and its end.
    if not wait_until(none_left, timeout_s=timeout_s):
        raise LocalStackError(f"these processes could not be killed: {', '.join(sorted(set(killed)))}")
    return sorted(set(killed))


@contextlib.contextmanager
def uninterrupted() -> Iterator[None]:
    """Ignore the signals that end a program during clean-up: a second Ctrl-C must not leave a process behind.

    Does nothing outside the main thread: signals are delivered to the main thread only.
    """
    try:
        before = {number: signal.signal(number, signal.SIG_IGN) for number in (signal.SIGINT, *_ENDING)}
    except ValueError:
        yield
        return
    try:
        yield
    finally:
        for number, handler in before.items():
            signal.signal(number, handler)


@contextlib.contextmanager
def termination_raises() -> Iterator[None]:
    """Make SIGTERM and SIGHUP raise SystemExit here (as SIGINT raises KeyboardInterrupt), so that clean-up runs.

    Does nothing outside the main thread.
    """

    def end(number: int, _frame: object) -> None:
        raise SystemExit(128 + number)

    try:
        before = {number: signal.signal(number, end) for number in _ENDING}
    except ValueError:
        yield
        return
    try:
        yield
    finally:
        for number, handler in before.items():
            signal.signal(number, handler)


class Daemon:
    """One background process, recorded in ``<folder>/<name>.pid``, so that any later command finds it again.

    Args:
        name: its name for people; also the name of its files.
        folder: its own folder; made if absent.
        log: file to which its stdout and stderr are appended.
        mark: value of the marker variable, the stack's folder; by default ``folder``.
    """

    def __init__(self, name: str, folder: Path, *, log: Path, mark: Path | None = None) -> None:
        self.name = name
        self.folder = folder
        self.log = log
        self.mark = (mark or folder).resolve()
        self._record = folder / f"{name}.pid"
        self._child: subprocess.Popen[bytes] | None = None
        self._log_before = 0

    def process(self) -> psutil.Process | None:
        """The running process, whichever process started it; None if there is none."""
        if self._child is not None:
            self._child.poll()  # reaps it if it has ended
        try:
            record = json.loads(self._record.read_text())
            process = psutil.Process(record["pid"])
            # Another process may have this id now: the start time distinguishes them.
            if abs(process.create_time() - record["create_time"]) > 1:
                return None
        except (FileNotFoundError, ValueError, KeyError, psutil.NoSuchProcess):
            return None
        return process if is_running(process) else None

    @property
    def running(self) -> bool:
        return self.process() is not None

    @property
    def pid(self) -> int | None:
        process = self.process()
        return process.pid if process else None

    @property
    def died(self) -> bool:
        """Whether it has ended by itself: it was started, ``stop`` was not called, and it does not run."""
        return self._record.exists() and not self.running

    def last_lines(self, lines: int = 15) -> str:
        """The end of its log since this object started it; of its whole log, if another object did."""
        return tail(self.log, lines, since=self._log_before)

    def spawn(
        self,
        argv: Sequence[str],
        *,
        env: Mapping[str, str] | None = None,
        cwd: Path | None = None,
        user: str | None = None,
    ) -> None:
        """Start it in the background. The caller waits for it with ``await_ready``.

        Args:
            env: added to this process's environment (without its ``SEGSVC_*``).
            user: name of the system user to run as (only as root); by default this process's user.

        Raises:
            OSError: the program cannot be executed.
        """
        self.folder.mkdir(parents=True, exist_ok=True)
        self.log.parent.mkdir(parents=True, exist_ok=True)
        self._log_before = log_size(self.log)
        with self.log.open("ab") as log:
            self._child = start(argv, env={**(env or {}), MARKER: str(self.mark)}, output=log, cwd=cwd, user=user)

        created = psutil.Process(self._child.pid).create_time()
        unfinished = self._record.with_suffix(".pid.new")
        unfinished.write_text(json.dumps({"pid": self._child.pid, "create_time": created}))
        unfinished.replace(self._record)

    def await_ready(self, ready: Callable[[], bool], *, timeout_s: float) -> None:
        """Wait until ``ready`` holds.

        Raises:
            LocalStackError: the process ended, or is not ready in time (``wait_patiently``); with the end of its log.
        """
        ended = False

        def settled() -> bool:
            nonlocal ended
            ended = not self.running
            return ended or ready()

        if not wait_patiently(settled, timeout_s=timeout_s) or ended:
            what = "ended at once" if ended else f"was not ready within {timeout_s:g} s"
            raise LocalStackError(f"{self.name} {what}. The last lines of {self.log}:\n{self.last_lines()}")

    def stop(self, *, signals: Sequence[tuple[signal.Signals, float]]) -> None:
        """Send the signals in turn until the process has ended; wait the given seconds after each. Does nothing if it
        does not run.

        Raises:
            LocalStackError: the process survived all signals.
        """
        process = self.process()
        record = self._record.read_text() if process else ""
        # Before the first signal, so that the keeper does not take this for a crash and start it again.
        self._record.unlink(missing_ok=True)
        if process is None:
            return

        for number, timeout_s in signals:
            with contextlib.suppress(psutil.NoSuchProcess):
                process.send_signal(number)
            if wait_until(lambda: not self._runs_still(process), timeout_s=timeout_s):
                return
        self._record.write_text(record)
        raise LocalStackError(f"{self.name} (process {process.pid}) does not end")

    def _runs_still(self, process: psutil.Process) -> bool:
        if self._child is not None:
            self._child.poll()  # reaps it if it has ended
        return is_running(process)


def as_user(user: str | None, argv: Sequence[str]) -> list[str]:
    """The command that runs ``argv`` as the system user ``user`` (only as root); ``argv`` itself for None.

    A program (setpriv) switches the user, not Popen(user=…): the latter forks this process with its threads and their
    locks, and the child of a process that has used gRPC can crash before it executes anything. Without the argument,
    Popen does not need such a fork.

    Raises:
        LocalStackError: setpriv is missing.
    """
    if user is None:
        return list(argv)
    # Found whatever our own PATH is: root's tools are in these folders.
    program = shutil.which("setpriv", path="/usr/bin:/bin:/usr/sbin:/sbin:/usr/local/bin")
    if program is None:
        raise LocalStackError("setpriv is missing, with which root starts PostgreSQL")
    return [program, f"--reuid={user}", f"--regid={user}", "--clear-groups", *argv]


def start(
    argv: Sequence[str],
    *,
    env: Mapping[str, str],
    output: IO[bytes],
    cwd: Path | None = None,
    user: str | None = None,
) -> subprocess.Popen[bytes]:
    """Start a process in a session of its own, independent of this process, with stdout and stderr to ``output``.

    Its environment is this process's without the ``SEGSVC_*`` variables, plus ``env``: the settings of a stack come
    from its file alone, not from the environment of the launcher.
    """
    inherited = {name: value for name, value in os.environ.items() if not name.startswith("SEGSVC_")}
    return subprocess.Popen(
        as_user(user, argv),
        env={**inherited, **env},
        cwd=cwd,
        stdin=subprocess.DEVNULL,
        stdout=output,
        stderr=subprocess.STDOUT,
        start_new_session=True,
    )
