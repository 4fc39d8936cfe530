"""Each import rule fails when an import breaks it: a rule that names a module wrongly would hold for ever."""

from __future__ import annotations

import configparser
import os
import shutil
import subprocess
import sysconfig
from pathlib import Path

import pytest

REPOSITORY = Path(__file__).resolve().parents[2]
PACKAGES = ("segsvc", "grpc_api", "tasks", "migrations")

BREAKS: dict[str, tuple[str, str]] = {
    "layers": ("segsvc/domain/user.py", "import segsvc.config"),
    "core": ("segsvc/services/users.py", "import kombu"),
    "front": ("grpc_api/health.py", "import celery"),
    "kafka": ("tasks/schedule.py", "import kafka"),
    "databases": ("segsvc/postgres/shard/statistics.py", "import segsvc.postgres.catalog.outbox"),
    "postgres": ("segsvc/postgres/conditions/literals.py", "import segsvc.postgres.shard.members"),
    "protocol": ("segsvc/twophase/ports.py", "import segsvc.twophase.protocol"),
    "local-packages": ("segsvc/cli/base.py", "import psutil"),
    "local": ("segsvc/cli/commands/users.py", "import segsvc.local.redis"),
    "database": ("segsvc/services/export.py", "import psycopg2"),
    "cache": ("segsvc/postgres/locks.py", "import redis"),
    "domain": ("segsvc/domain/bucketing.py", "import structlog"),
}
"""Rule -> a module and what it must not import."""


@pytest.fixture(scope="module")
def rules() -> dict[str, str]:
    """Every rule of the project: its key and its name."""
    config = configparser.ConfigParser()
    config.read(REPOSITORY / ".importlinter")
    keys = [section for section in config.sections() if section.startswith("importlinter:contract:")]
    return {key.rpartition(":")[2]: config[key]["name"] for key in keys}


def test_each_rule_has_a_break(rules: dict[str, str]) -> None:
    assert BREAKS.keys() == rules.keys()


def test_each_broken_rule_is_reported(rules: dict[str, str], tmp_path: Path) -> None:
    for package in PACKAGES:
        shutil.copytree(REPOSITORY / package, tmp_path / package, ignore=shutil.ignore_patterns("__pycache__"))
    shutil.copy(REPOSITORY / ".importlinter", tmp_path)
    for module, line in BREAKS.values():
        path = tmp_path / module
        path.write_text(f"{path.read_text()}\n{line}\n")

    done = subprocess.run(
        [Path(sysconfig.get_path("scripts")) / "lint-imports", "--no-cache"],
        cwd=tmp_path,
        env=os.environ | {"PYTHONPATH": str(tmp_path), "COLUMNS": "200"},
        capture_output=True,
        text=True,
        check=False,
    )

    assert done.returncode == 1, done.stdout + done.stderr
    for name in rules.values():
        assert f"{name} BROKEN" in done.stdout, name
