"""A test run that is killed leaves nothing: no process, no file, no mount, no shared memory."""

from __future__ import annotations

import os
import signal
import subprocess
import sys
from pathlib import Path

import pytest

from segsvc.local.processes import wait_until
from tests.environments import clean_environment
from tests.local_servers import REPOSITORY
from tests.run_folder import MARK, _marked, _mounts_below


def shared_memory(folder: Path) -> set[Path]:
    """The shared memory of this run's PostgreSQL server, as files."""
    found = set()
    for process in _marked(folder):
        if process.name() == "postgres":
            found |= {Path(mapped.path) for mapped in process.memory_maps() if mapped.path.startswith("/dev/shm/")}
    return found


@pytest.mark.parametrize(
    ("number", "workers"),
    [
        pytest.param(signal.SIGTERM, 1, id="SIGTERM, two processes"),
        pytest.param(signal.SIGKILL, 0, id="SIGKILL"),
        pytest.param(signal.SIGKILL, 1, id="SIGKILL, two processes", marks=pytest.mark.long),
        pytest.param(signal.SIGHUP, 0, id="SIGHUP", marks=pytest.mark.long),
        pytest.param(signal.SIGINT, 1, id="SIGINT, two processes", marks=pytest.mark.long),
    ],
)
def test_a_killed_run_leaves_nothing(tmp_path: Path, number: signal.Signals, workers: int) -> None:
    said = tmp_path / "folder"
    place = Path(os.environ[MARK]).parent
    environment = {name: value for name, value in clean_environment().items() if name != MARK and "PYTEST" not in name}
    script = Path(__file__).with_name("killed_run.py")

    # A background process of a shell may have inherited that SIGINT is ignored.
    signal.signal(signal.SIGINT, signal.default_int_handler)
    run = subprocess.Popen(
        [sys.executable, "-m", "pytest", str(script), "-n", str(workers), "-p", "no:cacheprovider"],
        cwd=REPOSITORY,
        env={**environment, "SAY_HERE": str(said), "TMPDIR": str(place)},
        stdout=subprocess.DEVNULL,
        stderr=subprocess.DEVNULL,
        start_new_session=True,
    )

    try:
        assert wait_until(lambda: said.exists() and said.read_text() != "", timeout_s=120)
        folder = Path(said.read_text())
        assert folder.parent == place
        assert {"postgres", "valkey-server"} <= {process.name() for process in _marked(folder)}

        memory = shared_memory(folder)
        assert memory

        run.send_signal(number)
        run.wait(timeout=60)
        assert wait_until(lambda: not folder.exists() and not _marked(folder), timeout_s=60)
        assert _mounts_below(folder) == []
        assert not any(segment.exists() for segment in memory)
    finally:
        run.kill()
        run.wait()
