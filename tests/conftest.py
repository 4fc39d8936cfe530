"""Fixtures of every test, and how they are spread over processes."""

from __future__ import annotations

import os
from pathlib import Path

import pytest
from xdist.remote import Producer
from xdist.scheduler import LoadScopeScheduling

from segsvc.log import configure_logging
from tests import run_folder
from tests.local_servers import REPOSITORY, broker_server, cache_server, kafka_server, pg_server, servers_folder

__all__ = ["broker_server", "cache_server", "kafka_server", "pg_server", "servers_folder"]

# First of all: everything that is started or written from here on is cleared up after this run, however it ends.
run_folder.begin()

# A Java virtual machine of a test lives for minutes at most: the second compiler would take more time than it saves.
os.environ.setdefault("JAVA_TOOL_OPTIONS", "-XX:TieredStopAtLevel=1")

# Log as our processes do, but less: structlog's own default takes seconds to render an exception.
configure_logging("WARNING", "console")

_TESTS = Path(__file__).parent.relative_to(REPOSITORY).as_posix()
_SHARED_SERVERS = ("e2e", "contract", "infrastructure", "integration/cache", "integration/events", "integration/check")
"""Folders whose tests share servers that take long to start. The longest come first, so that no process waits for them
at the end; each process takes two groups at once, so the third one follows the first."""


def _group(test_id: str) -> str:
    """What stays in one process: a folder that shares servers, else a file."""
    file = test_id.split("::", 1)[0].removeprefix(f"{_TESTS}/")
    return next((folder for folder in _SHARED_SERVERS if file.startswith(f"{folder}/")), file)


class ByServers(LoadScopeScheduling):
    """Gives each process whole groups (``make test``). The marks of ``--dist=loadgroup`` have no effect from pytest
    9.2 on (pytest-xdist issue 1386)."""

    def _split_scope(self, nodeid: str) -> str:
        return _group(nodeid)


def pytest_xdist_make_scheduler(config: pytest.Config, log: Producer) -> ByServers:
    return ByServers(config, log)


def pytest_collection_modifyitems(config: pytest.Config, items: list[pytest.Item]) -> None:
    """Put the long groups first, if several processes share the tests."""
    if hasattr(config, "workerinput"):
        places = {group: place for place, group in enumerate(_SHARED_SERVERS)}
        items.sort(key=lambda item: places.get(_group(item.nodeid), len(places)))
