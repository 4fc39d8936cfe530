"""What a command imports before it does anything: a third of a second goes into imports alone."""

from __future__ import annotations

import os
import subprocess
import sys

import pytest

HEAVY = {
    *(
        "alembic",
        "celery",
        "cel_expr_python",
        "confluent_kafka",
        "flower",
        "kafka",
        "kombu",
        "numpy",
        "prometheus_client",
    ),
    *("psutil", "psycopg2", "pygrpc_native", "redis", "sqlalchemy", "structlog", "supervisor"),
}
"""Packages that no administrator's command needs, because it only calls the front."""


def imported(*arguments: str) -> set[str]:
    """Top-level packages that a command has imported when it ends."""
    environment = {name: value for name, value in os.environ.items() if not name.startswith("SEGSVC_")}
    done = subprocess.run(
        [sys.executable, "-X", "importtime", "-m", "segsvc", *arguments],
        env={**environment, "SEGSVC_GRPC_ADDRESS": "127.0.0.1:1", "SEGSVC_ENV_FILE": ""},
        capture_output=True,
        text=True,
        check=False,
    )

    lines = [line for line in done.stderr.splitlines() if line.startswith("import time:")]
    assert len(lines) > 100, done.stderr
    return {line.rpartition("|")[2].strip().partition(".")[0] for line in lines}


@pytest.mark.parametrize("command", ["segments list", "users segments 7", "operations list"])
def test_asking_the_front_imports_nothing_of_the_servers(command: str) -> None:
    assert imported(*command.split()) & HEAVY == set()


def test_help_imports_no_grpc_either() -> None:
    assert imported("--help") & (HEAVY | {"grpc", "pydantic"}) == set()
