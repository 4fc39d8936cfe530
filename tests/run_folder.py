"""The folder of one test run, and the process that clears up after the run, however it ends.

``begin`` makes the folder the run's temporary one and starts the reaper: this file as a program, in a session of its
own. When pytest is gone, after its last test or by any signal, the reaper ends every process that the run has started
and left, unmounts what lies below the folder, and deletes it. Processes are known by a variable of their environment,
which their descendants inherit; pytest-xdist's workers have it, too.
"""

from __future__ import annotations

import contextlib
import os
import select
import shutil
import signal
import subprocess
import sys
import tempfile
import time
from pathlib import Path

import psutil

# Not SEGSVC_…: those are settings, which the local stack does not pass on to what it starts.
MARK = "PYTEST_RUN_FOLDER"
_PREFIX = "segsvc-test-"
POSTGRES_ENDS_WITHIN_S = 10.0
KILLED_WITHIN_S = 20.0


def begin() -> None:
    """Give this run its folder and its reaper, unless it belongs to a run that has them (a worker of pytest-xdist)."""
    if MARK in os.environ:
        return

    place = Path(tempfile.gettempdir())
    for left_over in place.glob(f"{_PREFIX}*"):
        # Its reaper was killed too, or the machine went down.
        if not _owner_lives(left_over):
            clear(left_over)

    folder = Path(tempfile.mkdtemp(prefix=f"{_PREFIX}{os.getpid()}-"))
    # PostgreSQL's own user must be able to enter it.
    folder.chmod(0o755)

    environment = {name: value for name, value in os.environ.items() if name != MARK}
    subprocess.Popen(
        [sys.executable, __file__, str(folder), str(os.getpid())],
        cwd="/",
        env=environment,
        stdin=subprocess.DEVNULL,
        start_new_session=True,
    )
    # pytest's own folders (tmp_path) stay where developers search for them after a failure.
    os.environ.setdefault("PYTEST_DEBUG_TEMPROOT", str(place))
    os.environ[MARK] = os.environ["TMPDIR"] = str(folder)
    tempfile.tempdir = None


def clear(folder: Path) -> None:
    """End every process of the run that this folder belongs to, then delete the folder."""
    deadline = time.monotonic() + KILLED_WITHIN_S
    postgres_until = time.monotonic() + POSTGRES_ENDS_WITHIN_S

    while (found := _marked(folder)) and time.monotonic() < deadline:
        for process in found:
            with contextlib.suppress(psutil.Error):
                # A killed PostgreSQL leaves its shared memory behind. On SIGQUIT its first process ends all the rest at
                # once and removes it. The rest are left to it: if one of them ended by itself, that would look like a
                # crash, and the first process would start all of them again.
                if process.name() != "postgres" or time.monotonic() >= postgres_until:
                    process.kill()
                elif not _is_postgres(process.parent()):
                    process.send_signal(signal.SIGQUIT)
        time.sleep(0.1)

    for mount in _mounts_below(folder):
        subprocess.run(["umount", "--lazy", mount], capture_output=True, check=False)
    shutil.rmtree(folder, ignore_errors=True)


def _marked(folder: Path) -> list[psutil.Process]:
    """The running processes whose environment names the folder. Other users' processes are unreadable, and not ours."""
    found = []
    for process in psutil.process_iter():
        with contextlib.suppress(psutil.Error, OSError):
            alive = process.status() != psutil.STATUS_ZOMBIE
            if alive and process.environ().get(MARK) == str(folder):
                found.append(process)
    return found


def _is_postgres(process: psutil.Process | None) -> bool:
    return process is not None and process.name() == "postgres"


def _mounts_below(folder: Path) -> list[str]:
    """Mount points below the folder, the deepest first."""
    table = Path("/proc/mounts")
    places = [line.split()[1] for line in table.read_text().splitlines()] if table.exists() else []
    return sorted((place for place in places if place.startswith(f"{folder}/")), reverse=True)


def _owner_lives(folder: Path) -> bool:
    """Whether the pytest that made the folder still runs (its name holds that process's id)."""
    pid = folder.name.removeprefix(_PREFIX).split("-", 1)[0]
    return not pid.isdigit() or psutil.pid_exists(int(pid))


def _await_end(pid: int) -> None:
    """Wait until this process, our parent, is gone."""
    try:
        descriptor = os.pidfd_open(pid)
    except ProcessLookupError:
        return
    # Otherwise the id already belongs to another process.
    if os.getppid() == pid:
        select.select([descriptor], [], [])


if __name__ == "__main__":
    # Ctrl-C and a closed terminal are meant for pytest.
    for number in (signal.SIGINT, signal.SIGHUP):
        signal.signal(number, signal.SIG_IGN)
    _await_end(int(sys.argv[2]))
    clear(Path(sys.argv[1]))
