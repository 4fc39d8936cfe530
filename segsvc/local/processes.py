"""Long-lived child processes that outlive their launcher: started, recognised again later, stopped for certain.

Every process is started in a session of its own (so a Ctrl-C at the terminal reaches the launcher alone, which then
stops things in order) and carries the environment variable ``SEGSVC_LOCAL_STACK`` with the folder that it belongs to.
All descendants inherit it: ``find_marked`` finds whatever is left of a stack even when the launcher was killed before
it could note a process id.
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
    """Something of the local stack could not be started or stopped; the message says what, why and what mends it."""


def log_size(log: Path) -> int:
    """Bytes of a log file now, to tell later what was written after; 0 if there is none."""
    return log.stat().st_size if log.exists() else 0


def tail(log: Path, lines: int = 15, *, since: int = 0) -> str:
    """The last lines of a log file, indented, for an error message; says so if there are none.

    Args:
        since: leave out the bytes before: those of an earlier life of the process.
    """
    try:
        with log.open("rb") as file:
            size = log.stat().st_size
            # Smaller than before: it was begun again, so all of it is new.
            file.seek(max(since if since <= size else 0, size - 65536))
            last = file.read().decode("utf-8", "replace").splitlines()[-lines:]
    except FileNotFoundError:
        last = []
    return "\n".join(f"    {line}" for line in last) or "    (the log is empty)"


def wait_until(condition: Callable[[], bool], *, timeout_s: float, poll_s: float = POLL_S) -> bool:
    """Poll ``condition`` until it holds; False when it did not within ``timeout_s``."""
    deadline = time.monotonic() + timeout_s
    while not condition():
        if time.monotonic() >= deadline:
            return False
        time.sleep(poll_s)
    return True


BUSY_FACTOR = 10
"""A machine without an idle moment is waited for this many times as long as an idle one."""


def wait_patiently(condition: Callable[[], bool], *, timeout_s: float, poll_s: float = POLL_S) -> bool:
    """Poll ``condition`` until it holds; False when it did not within ``timeout_s`` of a machine with nothing to do.

    Time in which all processors were busy does not count: what we wait for may have been waiting for its turn. Nor does
    time in which they waited for a disk. At most ``BUSY_FACTOR`` times as long in all.
    """
    began = last = time.monotonic()
    times = psutil.cpu_times()
    spent = 0.0
    while not condition():
        time.sleep(poll_s)
        now, before, times = time.monotonic(), times, psutil.cpu_times()
        passed = sum(times) - sum(before)
        # Too short a time to have been counted in: as if idle.
        spent += (now - last) * (min(1.0, max(0.0, times.idle - before.idle) / passed) if passed > 0 else 1.0)
        last = now
        if spent >= timeout_s or now - began >= timeout_s * BUSY_FACTOR:
            return False
    return True


def free_ports(count: int, *, preferred: Sequence[int] = (), reserved: contextlib.ExitStack | None = None) -> list[int]:
    """``count`` different TCP ports of 127.0.0.1 on which nothing listens, ``preferred`` ones first.

    All are held open until the last is found, so they differ. Somebody else may still take one before it is used:
    the server then fails to start and says so. Those that are chosen with ``reserved`` are offered to nobody else who
    reserves until it is closed.
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
                    # A name that one process can have at a time, and that goes with it.
                    name = reserved.enter_context(socket.socket(socket.AF_UNIX))
                    name.bind(f"\0segsvc-port-{port}")
            except OSError:
                continue
            found.append(port)
    return found


def is_running(process: psutil.Process) -> bool:
    """Whether it still runs (a zombie does not, and a new process with the same id is another one)."""
    try:
        return process.is_running() and process.status() != psutil.STATUS_ZOMBIE
    except psutil.NoSuchProcess:
        return False


def find_marked(folder: Path) -> list[psutil.Process]:
    """All running processes that were started for ``folder``, descendants included, this one excepted."""
    mark = str(folder.resolve())
    found = []
    for process in psutil.process_iter():
        if process.pid == os.getpid():
            continue
        # Not ours to read, or gone meanwhile: not a process of this stack.
        with contextlib.suppress(psutil.Error, OSError):
            if process.environ().get(MARKER) == mark and is_running(process):
                found.append(process)
    return found


def kill_marked(folder: Path, *, timeout_s: float = 10.0) -> list[str]:
    """SIGKILL everything that ``find_marked`` finds until nothing is left; returns what it was, for the record.

    Raises:
        LocalStackError: a process survived (its pid is in the message).
    """
    killed: list[str] = []

    def none_left() -> bool:
        left = find_marked(folder)
        for process in left:
            with contextlib.suppress(psutil.NoSuchProcess):
                killed.append(f"{process.name()} ({process.pid})")
                process.kill()
        return not left

    # Again and again, because a process may fork between the scan and its death.
    if not wait_until(none_left, timeout_s=timeout_s):
        raise LocalStackError(f"these processes could not be killed: {', '.join(sorted(set(killed)))}")
    return sorted(set(killed))


@contextlib.contextmanager
def uninterrupted() -> Iterator[None]:
    """Ignore the signals that end a program while cleaning up: a second Ctrl-C must not leave a process behind.

    Does nothing outside the main thread, where signals are not delivered.
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
def ended_as_interrupted() -> Iterator[None]:
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
    """One background process, recorded in ``<folder>/<name>.pid`` so that any later command finds it again.

    Args:
        name: what people call it; also the name of its files.
        folder: its own folder; made if absent.
        log: file that gets its stdout and stderr (appended).
        mark: the folder that goes into the marker variable (its stack's); ``folder`` unless given.
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
        """The running process, whoever started it; None if there is none."""
        if self._child is not None:
            self._child.poll()  # reaps it if it has ended
        try:
            record = json.loads(self._record.read_text())
            process = psutil.Process(record["pid"])
            # The id may have been given to a stranger since: the start time tells them apart.
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
        """Whether it has ended without being told to: it was started, nobody has stopped it, and it does not run."""
        return self._record.exists() and not self.running

    def last_lines(self, lines: int = 15) -> str:
        """The end of what it has logged since this object started it; of all its log, if another one did."""
        return tail(self.log, lines, since=self._log_before)

    def spawn(
        self,
        argv: Sequence[str],
        *,
        env: Mapping[str, str] | None = None,
        cwd: Path | None = None,
        user: str | None = None,
    ) -> None:
        """Start it in the background. Whether it works is for the caller to find out (``await_ready``).

        Args:
            env: added to this process's environment (less its ``SEGSVC_*``).
            user: name of the system user to run as (only root may say); this process's user unless given.

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
            LocalStackError: the process ended, or the time is up (``wait_patiently``); with the last lines of its log.
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
        """Send each signal in turn, waiting so many seconds after each, until it is gone. Fine if it is not running.

        Raises:
            LocalStackError: it outlived them all.
        """
        process = self.process()
        record = self._record.read_text() if process else ""
        # First of all, so that nobody takes this for a crash and starts it again.
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
    """The command that runs ``argv`` as the system user ``user`` (only root may); ``argv`` itself for None.

    By a program instead of Popen(user=…): that forks this process with its threads and their locks, and a child of a
    process that has used gRPC can crash before it executes anything. Without it, Popen need not fork so.

    Raises:
        LocalStackError: the program is not there.
    """
    if user is None:
        return list(argv)
    # It is found on whatever PATH we were started with: root's tools are at home in these folders.
    program = shutil.which("setpriv", path="/usr/bin:/bin:/usr/sbin:/sbin:/usr/local/bin")
    if program is None:
        raise LocalStackError("setpriv is missing, by which root starts PostgreSQL")
    return [program, f"--reuid={user}", f"--regid={user}", "--clear-groups", *argv]


def start(
    argv: Sequence[str],
    *,
    env: Mapping[str, str],
    output: IO[bytes],
    cwd: Path | None = None,
    user: str | None = None,
) -> subprocess.Popen[bytes]:
    """Start a process in a session of its own, with both outputs to ``output``; it does not depend on this one.

    It gets this process's environment without its ``SEGSVC_*`` variables, and ``env``: a stack's settings come from
    its file alone, not from whatever the launcher happened to be started with.
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
