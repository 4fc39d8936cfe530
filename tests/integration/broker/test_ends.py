"""A worker survives an outage of its broker, a worker that ends is gone, and one that takes nothing reports it."""

from __future__ import annotations

import signal
import urllib.error
import urllib.request
from pathlib import Path

import psutil
import pytest

from segsvc.local.processes import free_ports
from tests.eventually import eventually
from tests.integration.broker.conftest import Workplace

HASTY = """\
import tasks.watchdog as watchdog
watchdog.END_WITHIN_S = 3.0
watchdog.STILL_MAX_S = 15.0
import tasks.pulse as pulse
pulse.ROUND_MAX_S = pulse.ANSWER_MAX_S = 3.0
"""
"""Shorter bounds, for tests."""

WAITS_FOR_EVER = (
    HASTY + "import threading, billiard.pool\nbilliard.pool.Pool.join = lambda *_: threading.Event().wait()\n"
)
"""A worker whose main process, when it ends, waits for a child that never ends."""


HOLDS = """\
import os, time
from pathlib import Path
from tasks.app import app

@app.task(name="segsvc.held")
def held(*, folder):
    (Path(folder) / f"started-{os.getpid()}").touch()
    while (Path(folder) / "hold").exists():
        time.sleep(0.01)
"""
"""A task that lasts as long as a test wants."""


def test_a_worker_survives_a_restart_of_its_broker_with_messages_in_its_hands(workplace: Workplace) -> None:
    worker = workplace.worker(code=HOLDS)
    folder = workplace.folder / "held"
    folder.mkdir()

    for released in ("before", "after", "before"):
        (folder / "hold").touch()
        for _ in range(4):
            workplace.put_task("segsvc.held", folder=str(folder))

        eventually(lambda: len(list(folder.glob("started-*"))) == 2)

        seen = workplace.log().count("Cannot connect to")
        workplace.broker.kill()
        if released == "before":
            # Tasks that have ended cannot be acknowledged, and messages that were only taken cannot be put back.
            (folder / "hold").unlink()
        eventually(lambda seen=seen: workplace.log().count("Cannot connect to") > seen + 1)  # type: ignore[misc]

        workplace.broker.start()
        (folder / "hold").unlink(missing_ok=True)
        workplace.await_work()
        for started in folder.glob("started-*"):
            started.unlink()

    assert worker.poll() is None
    assert "Unrecoverable error" not in workplace.log()


def test_a_worker_that_can_acknowledge_nothing_goes_on_taking_messages(workplace: Workplace) -> None:
    refuses = (
        "import redis, tasks.broker\n"
        "def refuse(*_, **__): raise redis.ConnectionError('cut off')\n"
        "tasks.broker.kombu_redis.QoS._remove_from_indices = refuse\n"
    )
    worker = workplace.worker(code=refuses)
    for _ in range(4):
        workplace.await_work()
    assert worker.poll() is None


def test_a_worker_that_has_become_deaf_is_gone(workplace: Workplace, tmp_path: Path) -> None:
    deaf = tmp_path / "deaf"
    takes_nothing = (
        "import tasks.broker, os\n"
        "def start(self, timeout=None):\n"
        f"    if not os.path.exists({str(deaf)!r}): begin(self, timeout)\n"
        "begin, tasks.broker.Channel._brpop_start = tasks.broker.Channel._brpop_start, start\n"
    )
    worker = workplace.worker(code=HASTY + "watchdog.STILL_MAX_S = 6.0\n" + takes_nothing)
    deaf.touch()
    assert worker.wait(60) == 70
    assert "heard nothing from the broker" in workplace.log()


@pytest.mark.parametrize("why", ["asked", "broken"])
def test_a_worker_that_cannot_end_is_ended(workplace: Workplace, why: str) -> None:
    broken = "import tasks.steps\ntasks.steps.PulseStep._note_round = staticmethod(lambda consumer: 1 / 0)\n"
    worker = workplace.worker(code=WAITS_FOR_EVER + (broken if why == "broken" else ""))
    children = psutil.Process(worker.pid).children()
    assert children

    worker.send_signal(signal.SIGTERM)
    assert worker.wait(60) != 0
    eventually(lambda: not any(child.is_running() and child.status() != "zombie" for child in children))


def test_a_worker_with_a_hung_loop_ends(workplace: Workplace, monkeypatch: pytest.MonkeyPatch) -> None:
    blocks = (
        "import tasks.broker, os, threading\n"
        "def stand(self, **_):\n"
        "    if os.path.exists(os.environ['STAND']): threading.Event().wait()\n"
        "    return read(self)\n"
        "read, tasks.broker.Channel._brpop_read = tasks.broker.Channel._brpop_read, stand\n"
    )

    stand = workplace.folder / "stand"
    monkeypatch.setenv("STAND", str(stand))
    worker = workplace.worker(code=HASTY + "watchdog.STILL_MAX_S = 4.0\n" + blocks)
    stand.touch()

    assert worker.wait(60) == 70


def healthy(port: int) -> tuple[int, str]:
    try:
        with urllib.request.urlopen(f"http://127.0.0.1:{port}/health", timeout=5) as answer:
            return answer.status, answer.read().decode()
    except urllib.error.HTTPError as error:
        return error.code, error.read().decode()


def test_a_worker_that_takes_no_messages_is_unhealthy(workplace: Workplace, tmp_path: Path) -> None:
    [port] = free_ports(1)
    serves = (
        "from contextlib import ExitStack; from segsvc.metrics_http import serving; from tasks.broker import pulse\n"
        f"stack = ExitStack(); stack.enter_context(serving('127.0.0.1:{port}', health=pulse.complaint))\n"
    )
    deaf = (
        "import tasks.broker, os\n"
        "def start(self, timeout=None):\n"
        f"    if not os.path.exists({str(tmp_path / 'deaf')!r}): begin(self, timeout)\n"
        "begin, tasks.broker.Channel._brpop_start = tasks.broker.Channel._brpop_start, start\n"
    )

    worker = workplace.worker(code=HASTY + serves + deaf)
    eventually(lambda: healthy(port) == (200, "ok\n"))

    (tmp_path / "deaf").touch()
    eventually(lambda: "heard nothing from the broker" in healthy(port)[1])
    assert healthy(port)[0] == 503

    (tmp_path / "deaf").unlink()
    eventually(lambda: healthy(port)[0] == 200)

    workplace.broker.stop()
    eventually(lambda: healthy(port) == (503, "the broker cannot be reached, or the worker ends\n"))
    assert worker.poll() is None
