"""The command line as people use it, against the whole stack."""

from __future__ import annotations

import base64
import contextlib
import json
import os
import subprocess
import sys
from collections.abc import Callable, Iterator
from pathlib import Path
from typing import Any
from urllib.request import Request, urlopen

import pytest
from kafka import KafkaProducer

from segsvc.demo.client import Client
from segsvc.local.stack import LocalStack
from tests.e2e.events import all_readable, producer
from tests.eventually import eventually

USERS = list(range(6_500_001, 6_500_201))
SLUG = "by-hand"

Segsvc = Callable[..., subprocess.CompletedProcess[str]]


@pytest.fixture(scope="module")
def segsvc(stack: LocalStack) -> Segsvc:
    """Runs a command. Its exit code must be the expected one, and it must not print a traceback."""

    def run(*arguments: str, code: int = 0) -> subprocess.CompletedProcess[str]:
        environment = {name: value for name, value in os.environ.items() if not name.startswith("SEGSVC_")}
        environment["SEGSVC_ENV_FILE"] = str(stack.home / "stack.env")
        program = Path(sys.executable).with_name("segsvc")
        done = subprocess.run(
            [program, *arguments], env=environment, capture_output=True, text=True, timeout=60, check=False
        )
        assert done.returncode == code, done
        assert "Traceback" not in done.stderr
        return done

    return run


def shown(segsvc: Segsvc, *arguments: str) -> Any:
    return json.loads(segsvc(*arguments, "--json").stdout)


@pytest.fixture(scope="module", autouse=True)
def segment(stack: LocalStack, segsvc: Segsvc) -> Iterator[None]:
    client = Client.of(stack.settings)
    client.wait_ready(30)
    with producer(stack.settings) as send:
        send("create-user", ({"user_id": user, "attributes": {"age": user % 40}} for user in USERS))
    eventually(lambda: all_readable(client, USERS))
    client.close()
    segsvc("segments", "create", SLUG)
    yield
    segsvc("segments", "delete", SLUG, "--yes")


def test_the_doctor_finds_nothing_wrong(segsvc: Segsvc) -> None:
    results = shown(segsvc, "doctor")
    assert [result["name"] for result in results if not result["ok"]] == []
    assert {"bridge", "Flower", "workers", "front"} <= {result["name"] for result in results}


def test_the_stacks_own_token_is_a_secret(segsvc: Segsvc, stack: LocalStack) -> None:
    settings, config = stack.settings, shown(segsvc, "config")
    file = Path(config["SEGSVC_TOKEN_FILE"])
    assert file == settings.token_file
    assert file.stat().st_mode & 0o077 == 0
    token = file.read_text().strip()
    segsvc("segments", "create", "with-a-token")
    shown(segsvc, "segments", "rollout", "with-a-token", "--percent", "10")
    segsvc("segments", "delete", "with-a-token", "--yes")

    password = base64.b64encode(f"{settings.flower_user}:{settings.flower_password}".encode()).decode()
    tasks = Request(  # of the local stack
        f"http://{settings.flower_address}/api/tasks", headers={"Authorization": f"Basic {password}"}
    )
    places = {
        "config": json.dumps(config),
        "metrics": urlopen(f"http://{settings.metrics_address}/metrics", timeout=10).read().decode(),
        "Flower": urlopen(tasks, timeout=10).read().decode(),  # noqa: S310
        **{log.name: log.read_text(errors="replace") for log in stack.logs.glob("*.log")},
    }
    for name in Path("/proc").glob("[0-9]*/cmdline"):
        with contextlib.suppress(OSError):
            places[str(name)] = name.read_text(errors="replace")
    assert "with-a-token" in places["Flower"]
    assert [place for place, text in places.items() if token in text] == []
    assert any("local-admin" in text for text in places.values()), "the log of a change names who made it"


def test_without_a_token_commands_are_refused(segsvc: Segsvc, stack: LocalStack) -> None:
    environment = {**os.environ, "SEGSVC_ENV_FILE": str(stack.env_file), "SEGSVC_TOKEN_FILE": ""}
    done = subprocess.run(
        [sys.executable, "-m", "segsvc", "segments", "list"],
        env=environment,
        capture_output=True,
        text=True,
        check=False,
        timeout=60,
    )
    assert done.returncode == 1
    assert done.stderr.startswith("UNAUTHENTICATED")


def test_segments_are_completed_by_the_shell(segsvc: Segsvc, stack: LocalStack) -> None:
    environment = {
        **os.environ,
        "SEGSVC_ENV_FILE": str(stack.home / "stack.env"),
        "_SEGSVC_COMPLETE": "complete_bash",
        "COMP_WORDS": f"segsvc segments stats {SLUG[:3]}",
        "COMP_CWORD": "3",
    }
    program = Path(sys.executable).with_name("segsvc")
    done = subprocess.run([program], env=environment, capture_output=True, text=True, timeout=60, check=False)
    assert done.stdout.split() == [SLUG]


def test_a_preview_and_its_rollout(segsvc: Segsvc) -> None:
    rule = ("--percent", "100", "--condition", "user.age >= 20")
    foreseen = shown(segsvc, "segments", "preview", SLUG, *rule)
    assert int(foreseen["matched_count"]) >= 100
    assert "would come" in segsvc("segments", "preview", SLUG, *rule).stdout
    done = shown(segsvc, "segments", "rollout", SLUG, *rule)
    assert done["response"]["added_count"] == foreseen["added_count"]
    wrong = segsvc("segments", "rollout", SLUG, "--percent", "1", "--condition", "user.age +", code=1)
    assert wrong.stderr.startswith("CONDITION_INVALID: rule.condition: line 1, column 11: ")


def test_a_user_put_in_and_out(segsvc: Segsvc) -> None:
    young = next(str(user) for user in USERS if user % 40 == 3)
    assert f"user.age is {3}" in segsvc("users", "explain", young, SLUG).stdout

    changed = shown(segsvc, "users", "include", young, SLUG, "--for", "2h")
    assert changed["user_segments"]["slugs"] == [SLUG]
    assert shown(segsvc, "users", "explain", young, SLUG)["reason"] == "INCLUDED_BY_OVERRIDE"
    assert shown(segsvc, "users", "show", young)["overrides"][0]["slug"] == SLUG
    assert "EXCLUDE" in segsvc("users", "exclude", young, SLUG, "--until", "2100-01-01T00:00:00Z").stdout
    assert shown(segsvc, "users", "clear", young, SLUG).get("overrides", []) == []

    assert segsvc("users", "clear", young, "nothing-there", code=1).stderr.startswith("SEGMENT_NOT_FOUND")
    for wrong in (("--for", "soon"), ("--for", "1h", "--until", "2100-01-01"), ("--until", "x")):
        segsvc("users", "include", young, SLUG, *wrong, code=2)


def test_dead_letters(segsvc: Segsvc, stack: LocalStack) -> None:
    settings = stack.settings
    sender = KafkaProducer(
        bootstrap_servers=settings.kafka_bootstrap_servers.split(","),
        api_version=(2, 0) if settings.kafka_stand_in else None,
        enable_idempotence=not settings.kafka_stand_in,
    )
    sender.send("create-user", key=b"me", value=b'{"user_id": "not a number"}')
    sender.flush()
    sender.close()
    found: list[Any] = []

    def arrived() -> bool:
        letters = shown(segsvc, "events", "dead", "list")
        found[:] = [letter for letter in letters if letter["event"] == '{"user_id": "not a number"}']
        return bool(found)

    eventually(arrived)
    letter = found[0]
    assert (letter["topic"], letter["key"]) == ("create-user", "me")
    assert "user_id" in letter["reason"]
    assert letter["reason"] in segsvc("events", "dead", "show", letter["id"]).stdout
    assert segsvc("events", "dead", "retry", letter["id"]).stdout == "1 sent again\n"
    eventually(lambda: arrived() and len(found) == 2)  # still wrong: a new letter
    count = len(shown(segsvc, "events", "dead", "list", "--new"))
    assert count >= 1  # the first one is done
    assert segsvc("events", "dead", "retry", letter["id"]).stdout == "0 sent again\n"
    assert shown(segsvc, "events", "dead", "retry", "--all")["sent"] == count
    eventually(lambda: len(shown(segsvc, "events", "dead", "list", "--new")) == count)

    assert shown(segsvc, "events", "dead", "dismiss", letter["id"])["dismissed"] == 0
    assert shown(segsvc, "events", "dead", "dismiss", "--all")["dismissed"] == count
    assert shown(segsvc, "events", "dead", "list", "--new") == []
    assert shown(segsvc, "events", "lost", "list") == []
    assert segsvc("events", "lost", "acknowledge", "--all").stdout == "0 acknowledged\n"
    assert "there is no such gap" in segsvc("events", "lost", "acknowledge", "99", code=1).stderr
    assert "there is no such dead letter" in segsvc("events", "dead", "show", "create-user/0/999999", code=1).stderr
    segsvc("events", "dead", "retry", code=2)
