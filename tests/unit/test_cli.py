"""The command line by itself: help, settings, exit codes, and what it must not load or show."""

from __future__ import annotations

import json
import os
import re
import subprocess
import sys
from collections.abc import Iterator
from pathlib import Path
from typing import Any

import pytest
import typer
from typer.main import get_command
from typer.testing import CliRunner

from segsvc.cli.app import app
from segsvc.cli.base import Refusal, bar, plain, wrapped
from segsvc.cli.commands import doctor
from segsvc.cli.commands.check import show
from segsvc.cli.commands.processes import FLOWER_COLUMNS, flower_environment
from segsvc.cli.doctor.items import Item
from segsvc.cli.doctor.storage import skew_items
from segsvc.config import BESIDE_THE_SETTINGS, Settings, descriptions
from segsvc.domain.errors import LockTimeout, segment_not_found
from segsvc.services.check.report import Kind, Report
from tests.eventually import quick
from tests.local_servers import REPOSITORY

HEAVY = ("grpc", "sqlalchemy", "celery", "redis", "kafka", "numpy", "pydantic", "alembic", "structlog")


@pytest.fixture
def runner(monkeypatch: pytest.MonkeyPatch) -> CliRunner:
    """Runs commands without the settings of this machine."""
    for name in list(os.environ):
        if name.startswith("SEGSVC_"):
            monkeypatch.delenv(name)
    monkeypatch.setenv("SEGSVC_ENV_FILE", "")
    return CliRunner()


def commands(command: Any, path: tuple[str, ...] = ()) -> Iterator[tuple[tuple[str, ...], Any]]:
    """Every command of the tree that does something, with the words that name it."""
    children = getattr(command, "commands", None)
    if children is None:
        yield path, command
        return
    for name, child in children.items():
        yield from commands(child, (*path, name))


ALL = dict(commands(get_command(app)))


def make_settings(**given: Any) -> Settings:
    return Settings(_env_file=None, **given)  # type: ignore[call-arg]


# -- help -----------------------------------------------------------------------------------------------------------


def test_the_commands_are_these() -> None:
    assert {
        "serve", "worker", "beat", "bridge", "flower", "up", "down", "status", "migrate", "config", "check", "doctor",
        "segments list", "segments show", "segments create", "segments edit", "segments preview", "segments rollout",
        "segments delete", "segments stats", "segments export",
        "users show", "users segments", "users explain", "users include", "users exclude", "users clear",
        "events dead list", "events dead show", "events dead retry",
        "operations list", "operations show", "operations watch", "operations cancel",
        "shards copy", "shards settle",
    } <= {" ".join(path) for path in ALL}  # fmt: skip


@pytest.mark.parametrize("path", ALL, ids=" ".join)
def test_help_of_every_command_has_an_example(runner: CliRunner, path: tuple[str, ...]) -> None:
    result = runner.invoke(app, [*path, "--help"], env={"COLUMNS": "80"})
    assert result.exit_code == 0
    # On one line of the smallest terminal: an example that is wrapped cannot be pasted.
    [example] = re.findall(r"^ Example: (.+?) *$", result.output, re.MULTILINE)
    assert f"Example: {example}" == ALL[path].epilog
    assert f"segsvc {' '.join(path)}" in example


SHOWING = (
    "segments", "users", "operations", "events", "check", "doctor", "config", "migrate", "status", "up", "shards",
)  # fmt: skip


@pytest.mark.parametrize("path", [path for path in ALL if path[0] in SHOWING], ids=" ".join)
def test_commands_that_show_something_can_show_json(path: tuple[str, ...]) -> None:
    assert "--json" in [name for option in ALL[path].params for name in option.opts]


@pytest.mark.parametrize("shell", ["bash", "zsh", "fish"])
def test_shells_can_complete(shell: str) -> None:
    environment = {**os.environ, "_SEGSVC_COMPLETE": f"source_{shell}"}
    program = Path(sys.executable).with_name("segsvc")
    done = subprocess.run([program], env=environment, capture_output=True, text=True, check=True)
    assert "_SEGSVC_COMPLETE" in done.stdout

    words = {"COMP_WORDS": "segsvc users ex", "COMP_CWORD": "2", "_TYPER_COMPLETE_ARGS": "segsvc users ex"}
    environment = {**os.environ, **words, "_SEGSVC_COMPLETE": f"complete_{shell}"}
    if shell == "fish":
        environment["_TYPER_COMPLETE_FISH_ACTION"] = "get-args"
    done = subprocess.run([program], env=environment, capture_output=True, text=True, check=False)
    assert "explain" in done.stdout
    assert "exclude" in done.stdout


def test_help_is_quick_because_it_loads_nothing_heavy() -> None:
    code = f"import sys, segsvc.cli.app; print([name for name in {HEAVY!r} if name in sys.modules])"
    done = subprocess.run([sys.executable, "-c", code], capture_output=True, text=True, check=True)
    assert done.stdout == "[]\n"


def test_the_module_can_be_run() -> None:
    done = subprocess.run([sys.executable, "-m", "segsvc", "--help"], capture_output=True, text=True, check=True)
    assert "Usage: segsvc" in done.stdout


# -- settings and usage ---------------------------------------------------------------------------------------------


def test_a_bad_setting_is_named_without_its_value(runner: CliRunner) -> None:
    result = runner.invoke(
        app,
        ["config"],
        env={"SEGSVC_CATALOG_DSN": "postgres://me:secret@host/x", "SEGSVC_LOCK_TIMEOUT_S": "3"},
    )

    assert result.exit_code == 2
    assert result.stdout == ""
    assert sorted(result.stderr.splitlines()) == [
        "SEGSVC_CATALOG_DSN: a DSN must start with postgresql+psycopg2://",
        "SEGSVC_LOCK_TIMEOUT_S: Input should be less than or equal to 2",
    ]


@pytest.mark.parametrize(
    ("name", "value"),
    [
        ("STATEMENT_TIMEOUT_S", "inf"), ("READ_TIMEOUT_S", "nan"), ("READ_TIMEOUT_S", "1e300"),
        ("READ_TIMEOUT_S", "1e-9"),
        ("CACHE_TTL_S", "9" * 30), ("CACHE_TTL_S", "9" * 5000), ("CONNECT_TIMEOUT_S", "99999999999"),
        ("CACHE_WARM_BUDGET_BYTES", "9" * 30), ("GRPC_ADDRESS", "here:99999"), ("GRPC_ADDRESS", "here:٥"),
        ("METRICS_ADDRESS", "here:99999"), ("CACHE_URL", "redis://here:port/0"), ("BROKER_URL", "amqp://here"),
        ("BROKER_URL", "redis://here:99999/0"), ("CLUSTER", "\udcff"), ("CLIENT_TLS", "perhaps"),
        ("CLIENT_TIMEOUT_S", "-77"), ("GRPC_ADDRESS", "\udcff:1"), ("KAFKA_GROUP", "\udcff"), ("CATALOG_DSN", "\udcff"),
        ("KAFKA_BOOTSTRAP_SERVERS", "::::"), ("KAFKA_BOOTSTRAP_SERVERS", "there:99999"),
        ("CATALOG_DSN", "postgresql+psycopg2://here/x?port=zz"),
    ],
    ids=ascii,
)  # fmt: skip
def test_odd_values_are_refused_by_name(runner: CliRunner, name: str, value: str) -> None:
    result = runner.invoke(app, ["config"], env={f"SEGSVC_{name}": value})
    assert (result.exit_code, result.stdout) == (2, "")
    [line] = result.stderr.splitlines()
    assert line.startswith(f"SEGSVC_{name}: ")
    assert value not in line


def test_an_empty_variable_is_an_absent_file(runner: CliRunner) -> None:
    names = ("GRPC_TLS_CERT", "GRPC_TLS_KEY", "CLIENT_TLS", "CLIENT_TLS_CA", "FAILPOINT_DIR", "FLOWER_DB")
    result = runner.invoke(app, ["config", "--json"], env={f"SEGSVC_{name}": "" for name in names})
    shown = json.loads(result.stdout)
    assert [shown[f"SEGSVC_{name}"] for name in names] == [None] * len(names)


def test_settings_that_cannot_be_read_are_said(runner: CliRunner, tmp_path: Path) -> None:
    file = tmp_path / "settings"
    file.write_bytes(b"SEGSVC_CLUSTER=\xff\n")

    for env, said in (
        (
            {"SEGSVC_ENV_FILE": str(file)},
            "settings: the file of SEGSVC_ENV_FILE, or one of SEGSVC_SECRETS_DIR, is not UTF-8",
        ),
        ({"SEGSVC_SECRETS_DIR": str(file)}, "settings: SEGSVC_SECRETS_DIR names no folder"),
    ):
        result = runner.invoke(app, ["config"], env=env)
        assert (result.exit_code, result.stdout, result.stderr) == (2, "", said + "\n")


def test_an_unknown_setting_is_reported_with_the_nearest_one(runner: CliRunner, tmp_path: Path) -> None:
    file = tmp_path / "settings"
    file.write_text("SEGSVC_LOG_LEVL=DEBUG\nOTHER=1\n")
    secrets = tmp_path / "secrets"
    secrets.mkdir()
    (secrets / "segsvc_catalog_dns").write_text("postgresql+psycopg2://here/x")

    env = {
        "SEGSVC_ENV_FILE": str(file), "SEGSVC_SECRETS_DIR": str(secrets),
        "SEGSVC_GRPC_ADRESS": "here:1", "segsvc_cluster": "known", "SEGSVC_XYZZY": "1",
        # Variables that Kubernetes and Docker set for services named segsvc and segsvc-front.
        "SEGSVC_SERVICE_HOST": "10.0.0.1", "SEGSVC_SERVICE_PORT": "50051", "SEGSVC_SERVICE_PORT_GRPC": "50051",
        "SEGSVC_PORT": "tcp://10.0.0.1:50051", "SEGSVC_PORT_50051_TCP": "tcp://10.0.0.1:50051",
        "SEGSVC_FRONT_PORT_50051_TCP_ADDR": "10.0.0.1", "SEGSVC_FRONT_SERVICE_HOST": "10.0.0.1",
        "SEGSVC_LOCAL_STACK": "/there",
    }  # fmt: skip

    result = runner.invoke(app, ["config", "--json"], env=env)
    assert result.exit_code == 0
    assert json.loads(result.stdout)["SEGSVC_CLUSTER"] == "known"
    assert result.stderr.splitlines() == [
        "SEGSVC_CATALOG_DNS is not a setting; do you mean SEGSVC_CATALOG_DSN?",
        "SEGSVC_GRPC_ADRESS is not a setting; do you mean SEGSVC_GRPC_ADDRESS?",
        "SEGSVC_LOG_LEVL is not a setting; do you mean SEGSVC_LOG_LEVEL?",
        "SEGSVC_XYZZY is not a setting, and does nothing",
    ]


def test_config_masks_secrets(runner: CliRunner) -> None:
    env = {
        "SEGSVC_CATALOG_DSN": "postgresql+psycopg2://me:hush:hush/hush hush@host/x",
        "SEGSVC_SHARD_DSNS": "postgresql+psycopg2://me:hush@host/a postgresql+psycopg2://host/b?password=hush",
        "SEGSVC_BROKER_URL": "redis://:hush@hush@host/0",
        "SEGSVC_FLOWER_PASSWORD": "hush",
    }

    for arguments in (["config"], ["config", "--json"]):
        result = runner.invoke(app, arguments, env=env)
        assert result.exit_code == 0
        assert "hush" not in result.output
        assert "@host/a" in result.output


def test_config_shows_every_variable_that_the_code_reads(runner: CliRunner) -> None:
    code = "\n".join(
        path.read_text()
        for root in ("segsvc", "tasks", "grpc_api", "migrations", "docker")
        for path in (REPOSITORY / root).rglob("*.py")
        if "generated" not in path.parts
    )

    shown = json.loads(runner.invoke(app, ["config", "--json"]).stdout)
    assert shown.keys() == descriptions().keys()

    # Left out: a marker of our own processes, and an example in a docstring.
    named = set(re.findall(r"SEGSVC_[A-Z0-9_]+[A-Z0-9]", code)) - {"SEGSVC_LOCAL_STACK", "SEGSVC_NAME"}
    assert named <= shown.keys()

    for field in Settings.model_fields:
        assert re.search(rf"\.{field}\b", code), f"nobody reads {field}"
    for variable in BESIDE_THE_SETTINGS:
        assert f'get("{variable}"' in code, f"nobody reads {variable}"
    for variable, about in descriptions().items():
        assert about, f"{variable} is not described"
        assert variable in runner.invoke(app, ["config"]).stdout


def test_a_failed_write_is_reported(runner: CliRunner) -> None:
    program = [sys.executable, "-m", "segsvc", "config"]
    for more in ([], ["--json"]):
        with Path("/dev/full").open("w") as full:
            environment = {**os.environ, "SEGSVC_ENV_FILE": ""}
            done = subprocess.run(
                [*program, *more], stdout=full, stderr=subprocess.PIPE, text=True, check=False, env=environment
            )
        assert (done.returncode, done.stderr) == (1, "cannot write: No space left on device\n")


@pytest.mark.parametrize(
    "arguments",
    [["nonsense"], ["worker"], ["worker", "--queue", "nonsense"], ["segments", "rollout", "x"], ["users", "show", "me"],
     ["segments", "edit", "x"], ["segments", "create", "x", "--label", "no-equals-sign"],
     ["users", "show", "0"], ["users", "show", "9223372036854775808"], ["segments", "stats", "\udcff"],
     ["users", "exclude", "1", "x", "--for", "999999999d"]],
    ids=ascii,
)  # fmt: skip
def test_wrong_usage_ends_with_2(runner: CliRunner, arguments: list[str]) -> None:
    assert runner.invoke(app, arguments).exit_code == 2


def test_brokers_out_of_reach_are_said_in_a_line(runner: CliRunner) -> None:
    result = runner.invoke(app, ["events", "dead", "list"], env={"SEGSVC_KAFKA_BOOTSTRAP_SERVERS": "127.0.0.1:1"})
    assert (result.exit_code, result.stdout) == (1, "")
    assert result.stderr == "Kafka at 127.0.0.1:1: KafkaTimeoutError; nothing was lost, try again\n"


def test_an_unreachable_front_is_reported_with_exit_code_1(runner: CliRunner) -> None:
    result = runner.invoke(app, ["segments", "list"], env={"SEGSVC_GRPC_ADDRESS": "127.0.0.1:1"})
    assert result.exit_code == 1
    assert result.stderr == (
        "UNAVAILABLE: the front at 127.0.0.1:1 cannot be reached; is it running? (segsvc up, or segsvc serve)\n"
    )


@pytest.mark.parametrize(
    ("error", "line"),
    [
        (segment_not_found("x"), "SEGMENT_NOT_FOUND: there is no segment 'x'"),
        (Refusal("two\nlines"), "two\nlines"),
        (LockTimeout(), "LOCK_TIMEOUT: a shard is locked by an operation; try again in a moment"),
    ],
)
def test_errors_for_people_become_lines(runner: CliRunner, error: Exception, line: str) -> None:
    broken = typer.Typer(cls=type(get_command(app)))

    @broken.command()
    def fail() -> None:
        raise error

    @broken.command()
    def other() -> None: ...

    result = runner.invoke(broken, ["fail"])
    assert (result.exit_code, result.stderr) == (1, line + "\n")


# -- processes ------------------------------------------------------------------------------------------------------


@pytest.mark.parametrize("command", ["beat", "check"])
def test_databases_that_are_not_set_up_are_refused(runner: CliRunner, command: str) -> None:
    result = runner.invoke(app, [command])
    assert result.exit_code == 1
    assert result.stderr == (
        "the shards: SEGSVC_SHARD_DSNS names none; run `segsvc up`, or name your shard databases\n"
    )


def test_flower_gets_its_password_where_no_other_user_can_read_it() -> None:
    settings = make_settings(flower_password="p:w", flower_address="[::1]:5555", flower_db="/x/flower.db")
    assert flower_environment(settings) == {
        "FLOWER_BASIC_AUTH": "segsvc:p:w",
        "FLOWER_ADDRESS": "::1",
        "FLOWER_PORT": "5555",
        "FLOWER_TASKS_COLUMNS": FLOWER_COLUMNS,
        "FLOWER_PERSISTENT": "true",
        "FLOWER_DB": "/x/flower.db",
    }


@pytest.mark.parametrize(
    ("given", "said"),
    [
        ({}, "SEGSVC_FLOWER_PASSWORD is empty"),
        ({"flower_password": "a,b"}, "must not contain a comma"),
        ({"flower_password": "x", "flower_user": "a:b"}, "nor the user a colon"),
        ({"flower_password": "x", "flower_address": "nowhere"}, "SEGSVC_FLOWER_ADDRESS must be host:port"),
    ],
)
def test_flower_does_not_start_open(given: dict[str, str], said: str) -> None:
    with pytest.raises(Refusal, match=said):
        flower_environment(make_settings(**given))


# -- what people see ------------------------------------------------------------------------------------------------


def test_the_report_of_the_check_ends_with_a_summary(capsys: pytest.CaptureFixture[str]) -> None:
    report = Report(users=1000, segments=2, memberships=5000, entries=900, duration_s=1.25)
    show(report)

    report.add_all(Kind.BIT, 200, [])
    report.add(Kind.COUNTER, 2, "shard_state", "user_count is 1", "there are 2 users")
    report.cache_checked = False
    show(report)

    assert capsys.readouterr().out.splitlines() == [
        "no difference in 1,000 users, 2 segments, 5,000 memberships, 900 cache entries (1.2 s)",
        "shard 2, shard_state: user_count is 1, there are 2 users",
        "… and 200 more",
        "201 differences in 1,000 users, 2 segments, 5,000 memberships, 900 cache entries (not checked) (1.2 s)",
    ]


def test_the_doctor_speaks_in_sentences(runner: CliRunner, monkeypatch: pytest.MonkeyPatch) -> None:
    def breaks(_settings: Settings) -> list[Item]:
        raise ValueError("with a secret")

    checks = {"well": lambda _: [], "told": lambda _: [Item("so it is")], "ill": lambda _: [Item("it is", "do")]}
    monkeypatch.setattr(doctor, "_checks", lambda: {**checks, "broken": breaks})

    result = runner.invoke(app, ["doctor"])
    assert result.exit_code == 1
    assert result.stdout.splitlines()[:6] == ["✓ well", "✓ told", "    so it is", "✗ ill", "    it is", "    → do"]
    assert result.stdout.splitlines()[6:8] == ["✗ broken", "    it cannot be checked (ValueError)"]
    assert result.stdout.splitlines()[-1] == "2 of 4 checks failed"
    assert "secret" not in result.output

    monkeypatch.setattr(doctor, "_checks", lambda: {"well": lambda _: []})
    assert runner.invoke(app, ["doctor"]).stdout == "✓ well\nall checks passed\n"

    assert wrapped("shard 1: a-very-long-id is there", 20, lead="  → ").splitlines() == [
        "  → shard 1:",
        "    a-very-long-id",
        "    is there",
    ]


def test_uneven_shards_are_reported_once_there_are_enough_users() -> None:
    assert [item.remedy for item in skew_items([0, 400, 0, 0])] == [""]
    assert [item.remedy for item in skew_items([10_000, 10_100, 9_900, 11_900])] == [""]
    [item] = skew_items([10_000, 10_000, 10_000, 20_000])
    assert item.text == "users a shard: 10,000, 10,000, 10,000, 20,000"
    assert item.remedy.startswith("shards differ by more than 20 %")


def test_texts_of_users_cannot_rewrite_the_terminal() -> None:
    assert plain("a\x1b[2Jb\nc é 漢") == "a�[2Jb�c é 漢"


def test_a_bar_shows_nothing_without_a_terminal(capsys: pytest.CaptureFixture[str]) -> None:
    def work() -> None:
        with bar("working") as shown:
            shown.to(1, 2, "half")

    quick(work, within_s=0.9)  # it does not wait for the second after which a bar appears
    assert capsys.readouterr() == ("", "")
