"""Real servers for the tests: session fixtures, each started on first use and stopped with the session.

tests/conftest.py imports them. Their files are in the folder of the run (tests/run_folder.py), which ends what is left.
"""

from __future__ import annotations

import shutil
import tempfile
from collections.abc import Iterator
from pathlib import Path

import pytest

from segsvc.local.kafka import KafkaServer, start_kafka
from segsvc.local.postgres import PostgresServer
from segsvc.local.processes import kill_marked
from segsvc.local.redis import BROKER_CONFIG, CACHE_CONFIG, RedisServer

REPOSITORY = Path(__file__).resolve().parent.parent


@pytest.fixture(scope="session")
def servers_folder() -> Iterator[Path]:
    """A short folder of this session's servers, open to PostgreSQL's own user (pytest's tmp_path is not, for root).

    Everything that was started for it is killed at the end, whatever the fixtures below managed to stop.
    """
    folder = Path(tempfile.mkdtemp(prefix="servers-"))
    folder.chmod(0o755)

    try:
        yield folder
    finally:
        kill_marked(folder)
        shutil.rmtree(folder, ignore_errors=True)


@pytest.fixture(scope="session")
def pg_server(servers_folder: Path) -> Iterator[PostgresServer]:
    """One PostgreSQL 18; make databases with ``pg_server.create_database(name)``, address them by ``.dsn(name)``."""
    server = PostgresServer(servers_folder / "pg", mark=servers_folder, fast=True)
    server.start()
    try:
        yield server
    finally:
        server.purge()


@pytest.fixture(scope="session")
def cache_server(servers_folder: Path) -> Iterator[RedisServer]:
    """The cache's Valkey (volatile-lru, nothing on disk): ``.url``. Flush it where a test needs it empty."""
    server = RedisServer("cache", servers_folder / "cache", CACHE_CONFIG, mark=servers_folder)
    server.start()
    try:
        yield server
    finally:
        server.stop()


@pytest.fixture(scope="session")
def broker_server(servers_folder: Path) -> Iterator[RedisServer]:
    """Celery's Valkey (noeviction, AOF): ``.url``."""
    server = RedisServer("broker", servers_folder / "broker", BROKER_CONFIG, mark=servers_folder)
    server.start()
    try:
        yield server
    finally:
        server.stop()


@pytest.fixture(scope="session")
def kafka_server(servers_folder: Path) -> Iterator[KafkaServer]:
    """A Kafka: the user's, a real one of our own, or the stand-in (``.stand_in``; an error if a real one is required).

    The user's own brokers may hold other topics: tests make topics with names of their own.
    """
    server = start_kafka(
        servers_folder / "kafka", jars=REPOSITORY / "build" / "kafka-jars", mark=servers_folder, say=print
    )

    try:
        yield server
    finally:
        server.stop()
