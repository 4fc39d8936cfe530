"""The watch on a process's memory ends the process; each test runs it in a process of its own."""

from __future__ import annotations

import subprocess
import sys

from grpc_api.memory_watch import EXIT_CODE

FILL = """
import time
from grpc_api.memory_watch import MemoryWatch
watch = MemoryWatch(1, 128 << 20)
watch.start()
kept = []
for _ in range({steps}):
    kept.append(b"x" * (8 << 20))
    time.sleep(0.01)
time.sleep({wait_s})
watch.close()
"""


def run(steps: int, wait_s: float) -> subprocess.CompletedProcess[str]:
    """Fill the memory in steps of 8 MiB, and leave the watch this time to notice."""
    return subprocess.run(
        [sys.executable, "-c", FILL.format(steps=steps, wait_s=wait_s)],
        capture_output=True,
        text=True,
        timeout=60,
        check=False,
    )


def test_a_process_that_cannot_be_helped_ends() -> None:
    filled = run(64, wait_s=30)
    assert filled.returncode == EXIT_CODE
    assert "memory_exhausted" in filled.stdout + filled.stderr


def test_one_that_has_enough_goes_on() -> None:
    assert run(4, wait_s=0.5).returncode == 0
