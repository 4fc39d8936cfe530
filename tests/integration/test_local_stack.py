"""The native launcher starts and stops the stack, and leaves nothing behind, however it is interrupted."""

from __future__ import annotations

import os
import shutil
import signal
import stat
import subprocess
import sys
import tempfile
from collections.abc import Iterator
from pathlib import Path

import psutil
import psycopg2
import pytest

from segsvc.config import Settings
from segsvc.local.kafka import StandInKafka, start_kafka
from segsvc.local.processes import LocalStackError, find_marked, kill_marked, wait_until
from segsvc.local.redis import RedisServer
from segsvc.local.stack import LocalStack
from segsvc.local.supervision import ProcessSpec
from tests.local_servers import REPOSITORY

SCRIPT = Path(__file__).with_name("local_stack_script.py")
JARS = REPOSITORY / "build" / "kafka-jars"
WAIT_FOR_EVER = "import signal, os; print(os.environ['SEGSVC_ENV_FILE'], flush=True); signal.pause()"


@pytest.fixture
def home() -> Iterator[Path]:
    """A stack's folder that does not exist yet, which PostgreSQL's own user can reach; it is always emptied."""
    folder = Path(tempfile.mkdtemp(prefix="segsvc-test-stack-"))
    folder.chmod(0o755)
    try:
        yield folder / "stack"
    finally:
        kill_marked(folder / "stack")
        shutil.rmtree(folder, ignore_errors=True)


@pytest.fixture
def no_java(monkeypatch: pytest.MonkeyPatch) -> None:
    """Use the stand-in instead of Kafka, because Kafka takes most of the time of every start."""
    monkeypatch.delenv("SEGSVC_REQUIRE_REAL_KAFKA", raising=False)
    monkeypatch.setenv("PATH", "/nowhere")


def pids(stack: LocalStack, *names: str) -> dict[str, int | None]:
    """Process ids of these parts."""
    return {part.name: part.pid for part in stack.status() if part.name in names}


def can_query(dsn: str) -> bool:
    try:
        query(dsn, "SELECT 1")
    except psycopg2.OperationalError:
        return False
    return True


def dummy_stack(home: Path, code: str = WAIT_FOR_EVER, **arguments: object) -> LocalStack:
    """A stack with real servers, and one process of ours that runs ``code``."""
    return LocalStack(
        {"operation_deadline_s": 7.0},
        home=home,
        processes=[ProcessSpec("serve", (sys.executable, "-c", code))],
        shards=2,
        fast=True,
        jars=JARS,
        migrate=[sys.executable, "-c", "from segsvc.config import load_settings; print(load_settings().catalog_dsn)"],
        **arguments,  # type: ignore[arg-type]
    )


def query(dsn: str, statement: str) -> None:
    database, _, socket = dsn.rpartition("/@/"[1:])[2].partition("?host=")
    with psycopg2.connect(host=socket, user="postgres", dbname=database) as connection, connection.cursor() as cursor:
        cursor.execute(statement)


def run_without_java(home: Path, command: str) -> subprocess.Popen[str]:
    """Run the script in a process of its own, without Java on its path: it starts fast, with the stand-in."""
    environ = {name: value for name, value in os.environ.items() if not name.startswith("SEGSVC_")}
    return subprocess.Popen(
        [sys.executable, str(SCRIPT), str(home), command],
        env={**environ, "PATH": "/nowhere"},
        cwd=REPOSITORY,
        stdout=subprocess.PIPE,
        stderr=subprocess.PIPE,
        text=True,
    )


def read_until(process: subprocess.Popen[str], text: str) -> None:
    assert process.stdout is not None
    for line in process.stdout:
        if text in line:
            return
    pytest.fail(f"it ended without saying {text!r}: {process.stderr and process.stderr.read()}")


@pytest.mark.usefixtures("no_java")
def test_up_status_restart_and_down(home: Path) -> None:
    said: list[str] = []
    asked: list[Settings] = []
    stack = dummy_stack(home, say=said.append, ready=lambda settings: bool(asked.append(settings)) or len(asked) > 1)
    settings = stack.up()

    assert settings.operation_deadline_s == 7.0
    assert settings.shard_count == 2
    assert len(asked) == 2
    assert stat.S_IMODE((home / "stack.env").stat().st_mode) == 0o600
    assert {part.state for part in stack.status()} == {"RUNNING"}
    assert (home / "logs" / "migrate.log").read_text().strip() == settings.catalog_dsn

    log = stack.supervisor.log_of("serve")
    assert wait_until(lambda: log.read_text() == f"{home / 'stack.env'}\n", timeout_s=30)

    # Another command finds the stack, changes nothing, and reads the same settings.
    pids = [part.pid for part in stack.status()]
    other = dummy_stack(home, say=said.append)
    assert other.up() == settings
    assert said[-1].startswith("already up")
    assert [part.pid for part in other.status()] == pids

    # A killed process is started again.
    first = stack.supervisor.pid_of("serve")
    assert first is not None
    os.kill(first, signal.SIGKILL)
    assert wait_until(lambda: stack.supervisor.pid_of("serve") not in (None, first), timeout_s=10)

    # Down leaves no process and keeps the data.
    query(settings.shard_dsns[0], "CREATE TABLE kept (i int)")
    other.down()
    assert find_marked(home) == []
    assert {part.state for part in stack.status()} == {"STOPPED"}
    assert not (home / "stack.env").exists()
    with pytest.raises(LocalStackError, match="is not up"):
        _ = dummy_stack(home).settings

    # Up again: on the same ports, with the same passwords and data.
    again = dummy_stack(home, say=said.append)
    before = settings.model_dump()
    after = again.up().model_dump()
    assert after | {"kafka_bootstrap_servers": ""} == before | {"kafka_bootstrap_servers": ""}
    query(after["shard_dsns"][0], "SELECT i FROM kept")

    dummy_stack(home, say=said.append).down(purge=True)
    assert not home.exists()


@pytest.mark.usefixtures("no_java")
def test_what_has_died_comes_back_and_nothing_else_is_touched(home: Path) -> None:
    said: list[str] = []
    stack = dummy_stack(home, say=said.append)
    settings = stack.up()
    before = {part.name: part.pid for part in stack.status()}

    # The keeper starts a killed server again, at the same place.
    for name in ("postgres", "cache"):
        psutil.Process(before[name]).kill()
    assert wait_until(
        lambda: all(pid not in (None, before[name]) for name, pid in pids(stack, "postgres", "cache").items()),
        timeout_s=60,
    )
    assert wait_until(lambda: can_query(settings.shard_dsns[0]), timeout_s=60)
    assert pids(stack, "broker", "kafka-stand-in", "serve") == {
        name: before[name] for name in ("broker", "kafka-stand-in", "serve")
    }

    assert wait_until(lambda: '"cache"' in stack.supervisor.log_of("servers").read_text(), timeout_s=30)

    # A server that was stopped on purpose stays down until ``up`` starts it; the remaining processes go on.
    RedisServer("broker", home / "broker", {}, mark=home).kill()
    stack.supervisor.stop_process("serve")

    after = dummy_stack(home, say=said.append).up()
    assert after == settings
    assert said[-1] == "the stack is up"
    assert "starting serve" in said
    assert {part.state for part in stack.status()} == {"RUNNING"}

    # The supervisor is killed, and no process watches its children.
    postgres = pids(stack, "postgres")
    orphan = stack.supervisor.pid_of("serve")

    supervisor = stack.supervisor.daemon.process()
    assert supervisor is not None
    supervisor.kill()
    assert wait_until(lambda: not stack.supervisor.running, timeout_s=10)

    assert dummy_stack(home, say=said.append).up() == settings
    assert pids(stack, "postgres") == postgres
    assert any(line.startswith("killing what an earlier run left") for line in said)
    assert orphan is not None
    assert not psutil.pid_exists(orphan) or psutil.Process(orphan).status() == psutil.STATUS_ZOMBIE

    dummy_stack(home, say=said.append).down(purge=True)
    assert find_marked(home) == []


@pytest.mark.usefixtures("no_java")
def test_a_repair_that_fails_stops_nothing_and_shows_this_lifes_log_only(home: Path) -> None:
    broken = home.with_name("broken")
    code = f"import os; os.path.exists({str(broken)!r}) and exit('the reason'); print('the life before', flush=True)"
    stack = dummy_stack(home, f"{code}; {WAIT_FOR_EVER}")
    stack.up()
    servers = pids(stack, "postgres", "broker", "cache")

    stack.supervisor.stop_process("serve")
    broken.touch()

    with pytest.raises(LocalStackError, match="serve does not stay up") as caught:
        stack.up()

    assert "the reason" in str(caught.value)
    assert "the life before" not in str(caught.value)
    assert "the life before" in stack.supervisor.log_of("serve").read_text()
    assert pids(stack, "postgres", "broker", "cache") == servers

    stack.down(purge=True)


@pytest.mark.usefixtures("no_java")
def test_a_process_that_does_not_stay_up_is_named_with_its_log(home: Path) -> None:
    with pytest.raises(LocalStackError, match=r"(?s)serve does not stay up.*the reason"):
        dummy_stack(home, "raise SystemExit('the reason')").up()
    assert find_marked(home) == []
    assert (home / "logs" / "serve.log").exists()


@pytest.mark.usefixtures("no_java")
def test_failing_migrations_end_with_their_log(home: Path) -> None:
    stack = LocalStack(
        home=home,
        processes=[],
        shards=1,
        fast=True,
        jars=JARS,
        migrate=[sys.executable, "-c", "raise SystemExit('no such column')"],
    )

    with pytest.raises(LocalStackError, match=r"(?s)migrating failed \(exit code 1\).*no such column"):
        stack.up()
    assert find_marked(home) == []


@pytest.mark.parametrize(
    ("moment", "number"),
    [
        ("starting PostgreSQL", signal.SIGINT),
        ("starting Redis", signal.SIGTERM),
        ("starting Kafka", signal.SIGINT),
        ("migrating", signal.SIGHUP),
        ("starting serve", signal.SIGINT),
    ],
)
def test_an_interrupted_up_leaves_nothing(home: Path, moment: str, number: signal.Signals) -> None:
    process = run_without_java(home, "up")
    read_until(process, moment)
    process.send_signal(number)
    process.communicate(timeout=60)
    assert process.returncode != 0
    assert find_marked(home) == []
    assert not home.exists()


def test_interrupts_during_the_clean_up_change_nothing(home: Path) -> None:
    process = run_without_java(home, "block")
    read_until(process, "inside")

    process.send_signal(signal.SIGTERM)
    read_until(process, "stopping our processes")
    process.send_signal(signal.SIGINT)
    process.send_signal(signal.SIGTERM)

    process.communicate(timeout=60)
    assert process.returncode == 128 + signal.SIGTERM
    assert find_marked(home) == []
    assert home.exists()  # a stack that was up keeps its data


def test_a_killed_launcher_is_cleaned_up_after(home: Path) -> None:
    process = run_without_java(home, "up")
    read_until(process, "starting Kafka")
    process.kill()
    process.communicate()
    assert find_marked(home) != []

    again = run_without_java(home, "up")
    read_until(again, "the stack is up")
    assert again.wait(timeout=30) == 0
    again.communicate()

    LocalStack(home=home, processes=[]).down(purge=True)
    assert find_marked(home) == []
    assert not home.exists()


def test_two_launchers_do_not_meet(home: Path) -> None:
    process = run_without_java(home, "block")
    read_until(process, "starting Redis")
    with pytest.raises(LocalStackError, match="another command"):
        LocalStack(home=home, processes=[]).down()
    read_until(process, "inside")
    process.send_signal(signal.SIGINT)
    process.communicate(timeout=60)
    assert find_marked(home) == []


@pytest.mark.usefixtures("no_java")
def test_the_stand_in_says_so_loudly_and_may_be_forbidden(home: Path) -> None:
    said: list[str] = []
    server = start_kafka(home, jars=JARS, say=said.append, environ={})

    try:
        assert isinstance(server, StandInKafka)
        assert server.stand_in
        assert said[0].startswith("ATTENTION: NO REAL KAFKA")
        assert server.bootstrap_servers.startswith("127.0.0.1:")
    finally:
        server.stop()

    with pytest.raises(
        LocalStackError, match="SEGSVC_REQUIRE_REAL_KAFKA=1, but no real Kafka can be started: Java is missing"
    ):
        start_kafka(home, jars=JARS, say=said.append, environ={"SEGSVC_REQUIRE_REAL_KAFKA": "1"})


def test_your_own_brokers_come_first() -> None:
    server = start_kafka(
        Path("/nowhere"), jars=JARS, say=lambda _: None, environ={"SEGSVC_KAFKA_BOOTSTRAP_SERVERS": "mine:9092"}
    )
    assert server.bootstrap_servers == "mine:9092"
    assert not server.stand_in
