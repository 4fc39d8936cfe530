"""The demonstration as a newcomer runs it, small; and interrupted."""

from __future__ import annotations

import json
import os
import signal
import subprocess
import sys
from pathlib import Path

import pytest

from segsvc.local.processes import find_marked
from tests.local_servers import REPOSITORY


@pytest.fixture
def environment(servers_folder: Path, monkeypatch: pytest.MonkeyPatch) -> dict[str, str]:
    """The environment of a demonstration with a folder of its own, and with the jars that exist already."""
    folder = servers_folder / "demo"
    folder.mkdir(exist_ok=True)
    jars = REPOSITORY / "build" / "kafka-jars"
    if jars.exists() and not (folder / "kafka-jars").exists():
        (folder / "kafka-jars").symlink_to(jars)
    return {**os.environ, "SEGSVC_STACK_DIR": str(folder / "stack"), "SEGSVC_ENV_FILE": "", "KEEP": ""}


def start_demo(environment: dict[str, str], folder: Path) -> subprocess.Popen[str]:
    return subprocess.Popen(
        [sys.executable, "-m", "segsvc", "demo", "--users", "4000"],
        cwd=folder,
        env=environment,
        stdout=subprocess.PIPE,
        stderr=subprocess.STDOUT,
        text=True,
    )


def test_the_demo_finds_what_it_expects(environment: dict[str, str], tmp_path: Path) -> None:
    with start_demo(environment, tmp_path) as demo:
        output, _ = demo.communicate(timeout=400)
    report = json.loads((tmp_path / "build" / "demo-report.json").read_text())
    assert [step for step in report if not step["ok"]] == [], output
    assert demo.returncode == 0, output
    assert all(set(step) == {"step", "expected", "actual", "ok", "seconds"} for step in report)
    assert len(report) > 20
    assert "as expected" in output
    assert not Path(environment["SEGSVC_STACK_DIR"]).exists()


def test_interrupted_it_leaves_neither_process_nor_folder(environment: dict[str, str], tmp_path: Path) -> None:
    # A shell starts what runs in its background with SIGINT ignored, and children inherit that.
    signal.signal(signal.SIGINT, signal.default_int_handler)
    stack_dir = Path(environment["SEGSVC_STACK_DIR"])

    with start_demo(environment, tmp_path) as demo:
        assert demo.stdout is not None
        for line in demo.stdout:
            if "migrating" in line:
                demo.send_signal(signal.SIGINT)
                break
        demo.communicate(timeout=120)

    assert demo.returncode not in (0, None)
    assert find_marked(stack_dir) == []
    assert not stack_dir.exists()
