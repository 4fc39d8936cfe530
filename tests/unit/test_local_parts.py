"""Parts of the native launcher that need no server."""

from __future__ import annotations

import contextlib
import os
import signal
import socket
import stat
import subprocess
import sys
import time
from pathlib import Path
from typing import NamedTuple

import pytest

from segsvc.config import Settings
from segsvc.local import kafka, packages, preflight, processes, stack
from segsvc.local.folders import make_private, socket_folder
from segsvc.local.kafka_jars import fetch_jars
from segsvc.local.processes import Daemon, LocalStackError, free_ports, kill_marked, tail, wait_until
from segsvc.local.stack_env import StackChoices, read_env, write_env
from segsvc.local.supervision import ProcessSpec, Supervisord

PYTHON = sys.executable


@pytest.fixture(autouse=True)
def _no_settings(monkeypatch: pytest.MonkeyPatch) -> None:
    for name in [name for name in os.environ if name.startswith("SEGSVC_")]:
        monkeypatch.delenv(name)


# -- processes --------------------------------------------------------------------------------------------------------


def test_a_daemon_is_found_again_and_stopped_by_another_object(tmp_path: Path) -> None:
    daemon = Daemon("d", tmp_path, log=tmp_path / "log")
    daemon.spawn([PYTHON, "-c", "import signal; print('up', flush=True); signal.pause()"])
    daemon.await_ready(lambda: "up" in (tmp_path / "log").read_text(), timeout_s=10)
    other = Daemon("d", tmp_path, log=tmp_path / "log")
    assert other.pid == daemon.pid is not None
    other.stop(signals=((signal.SIGTERM, 5.0),))
    assert not daemon.running
    assert daemon.pid is None
    other.stop(signals=((signal.SIGTERM, 5.0),))  # again: nothing to do


def test_a_daemon_that_ends_at_once_shows_its_last_lines(tmp_path: Path) -> None:
    daemon = Daemon("d", tmp_path, log=tmp_path / "log")
    daemon.spawn([PYTHON, "-c", "raise SystemExit('this is why')"])
    with pytest.raises(LocalStackError, match=r"(?s)d ended at once.*    this is why"):
        daemon.await_ready(lambda: False, timeout_s=10)


def test_a_daemon_that_does_not_get_ready_says_so(tmp_path: Path) -> None:
    daemon = Daemon("d", tmp_path, log=tmp_path / "log")
    daemon.spawn([PYTHON, "-c", "import signal; signal.pause()"])
    with pytest.raises(LocalStackError, match=r"was not ready within 0.2 s.*\n    \(the log is empty\)"):
        daemon.await_ready(lambda: False, timeout_s=0.2)
    daemon.stop(signals=((signal.SIGKILL, 5.0),))


def test_the_id_of_an_ended_daemon_is_not_mistaken_for_it(tmp_path: Path) -> None:
    daemon = Daemon("d", tmp_path, log=tmp_path / "log")
    (tmp_path / "d.pid").write_text(f'{{"pid": {os.getpid()}, "create_time": 1.0}}')
    assert not daemon.running


def test_descendants_are_found_by_their_mark_and_killed(tmp_path: Path) -> None:
    code = f"import subprocess, signal; subprocess.Popen([{PYTHON!r}, '-c', 'import signal; signal.pause()'])"
    daemon = Daemon("d", tmp_path, log=tmp_path / "log")
    daemon.spawn([PYTHON, "-c", f"{code}; signal.pause()"])
    assert wait_until(lambda: len(processes.find_marked(tmp_path)) == 2, timeout_s=10)
    assert len(kill_marked(tmp_path)) == 2
    assert processes.find_marked(tmp_path) == []


def test_settings_of_the_launcher_do_not_reach_what_it_starts(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setenv("SEGSVC_CATALOG_DSN", "the wrong one")
    daemon = Daemon("d", tmp_path, log=tmp_path / "log")
    daemon.spawn([PYTHON, "-c", "import os; print('SEGSVC_CATALOG_DSN' in os.environ)"])
    assert wait_until(lambda: (tmp_path / "log").read_text() == "False\n", timeout_s=10)


def test_wait_until_is_bounded() -> None:
    before = time.monotonic()
    assert not wait_until(lambda: False, timeout_s=0.1)
    assert time.monotonic() - before < 5


class Times(NamedTuple):
    """Seconds, as psutil counts them."""

    user: float
    idle: float


class Clock:
    """A machine whose processors are idle for a share of the time; time passes only by sleeping."""

    def __init__(self, monkeypatch: pytest.MonkeyPatch, idle_share: float) -> None:
        self.now = 100.0
        self.idle_share = idle_share
        monkeypatch.setattr(time, "monotonic", lambda: self.now)
        monkeypatch.setattr(time, "sleep", self.sleep)
        monkeypatch.setattr(processes.psutil, "cpu_times", self.times)

    def sleep(self, seconds: float) -> None:
        self.now += seconds

    def times(self) -> Times:
        idle = self.now * self.idle_share
        return Times(self.now - idle, idle)


@pytest.mark.parametrize(("idle_share", "waited"), [(1.0, 10.0), (0.5, 20.0), (0.0, 100.0)])
def test_a_busy_machine_is_waited_for(monkeypatch: pytest.MonkeyPatch, idle_share: float, waited: float) -> None:
    clock = Clock(monkeypatch, idle_share)
    assert not processes.wait_patiently(lambda: False, timeout_s=10, poll_s=0.1)
    assert clock.now - 100 == pytest.approx(waited, abs=1)


def test_what_was_logged_before_is_not_shown(tmp_path: Path) -> None:
    log = tmp_path / "log"
    log.write_text("the life before\n")
    daemon = Daemon("d", tmp_path, log=log)
    daemon.spawn([PYTHON, "-c", "raise SystemExit('this is why')"])
    with pytest.raises(LocalStackError) as caught:
        daemon.await_ready(lambda: False, timeout_s=10)
    assert "this is why" in str(caught.value)
    assert "the life before" not in str(caught.value)


def test_ended_by_itself_and_stopped_are_distinguished(tmp_path: Path) -> None:
    daemon = Daemon("d", tmp_path, log=tmp_path / "log")
    assert not daemon.died
    daemon.spawn([PYTHON, "-c", "import signal; signal.pause()"])
    assert not daemon.died
    assert daemon.pid is not None

    os.kill(daemon.pid, signal.SIGKILL)
    assert wait_until(lambda: daemon.died, timeout_s=10)

    daemon.spawn([PYTHON, "-c", "import signal; signal.pause()"])
    Daemon("d", tmp_path, log=tmp_path / "log").stop(signals=((signal.SIGKILL, 5.0),))
    assert not daemon.running
    assert not daemon.died


def test_what_a_stack_chose_it_keeps(tmp_path: Path) -> None:
    kept = StackChoices(tmp_path / "kept.json")
    kept.ports["cache"] = 4711
    assert kept.secret("flower", lambda: "drawn") == "drawn"
    again = StackChoices(tmp_path / "kept.json")
    assert again.ports == {"cache": 4711}
    assert again.secret("flower", lambda: "another") == "drawn"
    assert stat.S_IMODE((tmp_path / "kept.json").stat().st_mode) == 0o600


def test_free_ports_differ_and_avoid_what_is_taken() -> None:
    with socket.socket() as taken:
        taken.bind(("127.0.0.1", 0))
        taken.listen()
        port = taken.getsockname()[1]
        found = free_ports(3, preferred=[port])
    assert len(set(found)) == 3
    assert port not in found


def test_a_reserved_port_is_offered_to_no_other_caller() -> None:
    with contextlib.ExitStack() as reserved:
        [port] = free_ports(1, reserved=reserved)
        with contextlib.ExitStack() as others:
            [other] = free_ports(1, preferred=[port], reserved=others)
        assert other != port
    with contextlib.ExitStack() as later:
        assert free_ports(1, preferred=[port], reserved=later) == [port]


def test_tail_shows_the_end(tmp_path: Path) -> None:
    log = tmp_path / "log"
    assert tail(log) == "    (the log is empty)"
    log.write_text("\n".join(map(str, range(100_000))))
    assert tail(log, 2) == "    99998\n    99999"


# -- folders ----------------------------------------------------------------------------------------------------------


def test_sockets_go_elsewhere_where_a_path_is_too_long(tmp_path: Path) -> None:
    assert socket_folder(Path("/short"), longest_name="s") == Path("/short")
    elsewhere = socket_folder(tmp_path / ("x" * 100), longest_name="s")
    assert len(str(elsewhere)) < 90
    assert elsewhere == socket_folder(tmp_path / ("x" * 100), longest_name="s")


def test_a_private_folder_is_private_and_not_somebody_elses(tmp_path: Path) -> None:
    make_private(tmp_path / "a" / "b")
    assert stat.S_IMODE((tmp_path / "a" / "b").stat().st_mode) == 0o700
    (tmp_path / "trap").symlink_to(tmp_path / "a")
    with pytest.raises(LocalStackError, match="belongs to another user"):
        make_private(tmp_path / "trap")


# -- settings ---------------------------------------------------------------------------------------------------------


def test_stack_env_comes_back_as_it_was(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    settings = Settings(
        _env_file=None,
        shard_dsns=("postgresql+psycopg2:///a?host=/it's_a_$HOME_\\_place", "postgresql+psycopg2:///b"),
        flower_password="quotes ' and \"",
        kafka_stand_in=True,
    )

    file = tmp_path / "stack.env"
    write_env(file, settings)
    assert stat.S_IMODE(file.stat().st_mode) == 0o600
    monkeypatch.setenv("SEGSVC_FLOWER_PASSWORD", "not this one")
    assert Settings(_env_file=None, **read_env(file)) == settings

    # A process of the stack reads the same settings.
    monkeypatch.delenv("SEGSVC_FLOWER_PASSWORD")
    monkeypatch.setenv("HOME", "expanded")
    assert Settings(_env_file=file) == settings


def test_every_queue_has_a_worker_of_its_own() -> None:
    commands = {spec.name: spec.argv[3:] for spec in stack.service_processes()}
    assert set(commands) == {
        *("serve", "worker-operations", "worker-events", "worker-warming", "beat", "bridge", "flower")
    }
    assert commands["worker-events"] == ("worker", "--queue", "events")


# -- supervisord ------------------------------------------------------------------------------------------------------


def test_the_supervisors_configuration_survives_odd_arguments(tmp_path: Path) -> None:
    said = "100% 'quoted' \"twice\" and spaced"
    supervisor = Supervisord(tmp_path / "run", logs=tmp_path / "logs")

    try:
        supervisor.start(
            [ProcessSpec("odd", (PYTHON, "-c", f"import signal; print({said!r}, flush=True); signal.pause()"))], env={}
        )
        supervisor.await_running(timeout_s=20)
        assert supervisor.log_of("odd").read_text() == f"{said}\n"
        supervisor.stop_process("odd")
        assert [state.state for state in supervisor.states()] == ["STOPPED"]
        supervisor.start_process("odd")
        assert supervisor.pid_of("odd") is not None
        with pytest.raises(LocalStackError, match="BAD_NAME"):
            supervisor.pid_of("other")
    finally:
        supervisor.stop()

    assert processes.find_marked(tmp_path / "run") == []
    with pytest.raises(LocalStackError, match="does not answer"):
        supervisor.states()


# -- preflight --------------------------------------------------------------------------------------------------------


def test_preflight_names_what_is_missing_and_the_remedy(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(preflight, "DISK_BYTES_MIN", 1 << 60)
    monkeypatch.setattr(preflight, "why_no_real_kafka", lambda: "Java is missing (install it)")
    with pytest.raises(LocalStackError) as caught:
        preflight.require(tmp_path / "not,there", {"SEGSVC_REQUIRE_REAL_KAFKA": "1"})
    text = str(caught.value)
    assert "MiB free" in text
    assert "not,there has a comma in its path. Remedy: set SEGSVC_STACK_DIR" in text
    assert "Java is missing, and SEGSVC_REQUIRE_REAL_KAFKA=1 forbids the stand-in. Remedy: apt-get install" in text


def test_missing_packages_are_named_with_the_mend(monkeypatch: pytest.MonkeyPatch) -> None:
    assert packages.what_is_missing() is None
    monkeypatch.setattr(packages, "_PACKAGES", {"no_such_module": "no-such-package", "psutil": "psutil"})
    assert packages.what_is_missing() == (
        "the local stack needs packages that are not installed: no-such-package. "
        "Install the extra: pip install 'segsvc[local]' (in a checkout: make .venv)"
    )


def test_a_missing_kafka_is_fatal_only_where_a_real_one_is_required(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr(preflight, "why_no_real_kafka", lambda: "Maven is missing (install it)")
    findings = preflight.require(tmp_path, {})
    assert any("in-memory stand-in will be used" in finding.problem for finding in findings)
    own = preflight.require(tmp_path, {"SEGSVC_KAFKA_BOOTSTRAP_SERVERS": "mine:9092", "SEGSVC_REQUIRE_REAL_KAFKA": "1"})
    assert not any("Kafka" in finding.problem for finding in own)


@pytest.mark.parametrize(
    ("said", "version"),
    [
        ('openjdk version "17.0.9" 2023-10-17', 17),
        ('java version "1.8.0_292"', 8),
        ('openjdk version "21" 2023-09-19', 21),
        ("nothing", None),
    ],
)
def test_javas_version_is_read(tmp_path: Path, monkeypatch: pytest.MonkeyPatch, said: str, version: int | None) -> None:
    java = tmp_path / "java"
    java.write_text(f"#!/bin/sh\necho '{said}' >&2\n")
    java.chmod(0o755)
    monkeypatch.setenv("PATH", str(tmp_path))
    assert kafka.java_version() == version
    missing = kafka.why_no_real_kafka()
    assert missing is not None
    assert ("Maven is missing" in missing) == (version is not None and version >= 17)


def test_a_failed_fetch_leaves_no_jars(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    maven = tmp_path / "mvn"
    maven.write_text("#!/bin/sh\necho no network today\nexit 1\n")
    maven.chmod(0o755)
    monkeypatch.setenv("PATH", f"{tmp_path}:/bin:/usr/bin")
    with pytest.raises(LocalStackError, match=r"(?s)Maven could not fetch Kafka.*no network today"):
        fetch_jars(tmp_path / "build" / "jars", mark=tmp_path, say=lambda _: None)
    assert list((tmp_path / "build").iterdir()) == []


def test_jars_of_another_version_are_fetched_again(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    maven = tmp_path / "mvn"
    maven.write_text('#!/bin/sh\nfor word; do case $word in -DoutputDirectory=*) mkdir "${word#*=}";; esac; done\n')
    maven.chmod(0o755)
    monkeypatch.setenv("PATH", f"{tmp_path}:/bin:/usr/bin")

    jars, said = tmp_path / "jars", list[str]()
    jars.mkdir()
    (jars / "old.jar").touch()

    fetch_jars(jars, mark=tmp_path, say=said.append)
    assert [file.name for file in jars.iterdir()] == ["pom.xml"]
    fetch_jars(jars, mark=tmp_path, say=said.append)
    assert len(said) == 1


def test_the_stand_in_wants_its_argument() -> None:
    done = subprocess.run(
        [PYTHON, "-m", "segsvc.local.kafka_standin"], capture_output=True, text=True, check=False, timeout=60
    )
    assert done.returncode == 1
    assert done.stderr.startswith("usage:")
