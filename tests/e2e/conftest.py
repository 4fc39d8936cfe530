"""The whole stack with real processes, for the tests that see the service as its users do."""

from __future__ import annotations

from collections.abc import Iterator
from pathlib import Path

import pytest

from segsvc.cli.front import is_serving
from segsvc.config import Settings
from segsvc.demo.client import Client
from segsvc.local.stack import LocalStack
from tests.local_servers import REPOSITORY

DEADLINE_S = 10.0


@pytest.fixture(scope="package")
def stack(servers_folder: Path) -> Iterator[LocalStack]:
    """One running stack for all end-to-end tests; each leaves it in full service.

    It ends after the last of them: its processes would take time from the tests that follow.
    """
    home = servers_folder / "stack"
    failpoints = home / "failpoints"
    made = LocalStack(
        {"failpoint_dir": failpoints, "operation_deadline_s": DEADLINE_S},
        home=home,
        jars=REPOSITORY / "build" / "kafka-jars",
        ready=is_serving,
    )

    with made:
        failpoints.mkdir()
        yield made


@pytest.fixture
def settings(stack: LocalStack) -> Settings:
    return stack.settings


@pytest.fixture
def client(settings: Settings) -> Iterator[Client]:
    made = Client.of(settings)
    made.wait_ready(30)
    yield made
    made.close()
