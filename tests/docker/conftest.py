"""The operations' part of the system in containers: workers and beat of our image, PostgreSQL, two Redis servers.

The tests' own process is the front: it accepts operations and sends chords through the broker in its container.
"""

from __future__ import annotations

from collections.abc import Iterator

import docker
import pytest
from celery import Celery
from docker.errors import DockerException
from docker.models.images import Image
from docker.models.networks import Network
from pytest_celery import RedisContainer
from pytest_docker_tools import build, container, fxtr, network

from segsvc.bootstrap import FrontServices
from segsvc.config import Settings
from tasks.app import celery_config
from tasks.dispatcher import CeleryDispatcher
from tests.docker.containers import (
    FAILPOINTS,
    PASSWORD,
    BeatContainer,
    CacheContainer,
    OperationsContainer,
    PostgresContainer,
    Worker,
)
from tests.installation import Installation
from tests.local_servers import REPOSITORY

USERS = range(1, 6001)
SHARDS = 3
DATABASES = ("test_catalog", *(f"test_shard{shard}" for shard in range(SHARDS)))
START_TIMEOUT_S = 60


def _engine_problem() -> str | None:
    """Why no container can be started; None: one can."""
    try:
        client = docker.from_env()
        try:
            client.ping()
        finally:
            client.close()
    except DockerException as error:
        return f"no Docker engine answers ({type(error).__name__})"
    return None


def pytest_collection_modifyitems(items: list[pytest.Item]) -> None:
    """Skip tests that need an engine where there is none; the summary counts them with the reason."""
    mine = [item for item in items if item.get_closest_marker("docker")]
    if mine and (problem := _engine_problem()):
        for item in mine:
            item.add_marker(pytest.mark.skip(reason=problem))


chord_network = network(scope="session")
service_image = build(
    scope="session", path=str(REPOSITORY), dockerfile="docker/Dockerfile", tag="segsvc:test", forcerm=True
)
postgres = container(
    scope="session",
    image="postgres:18-bookworm",
    command=list(PostgresContainer.SETTINGS),
    environment={"POSTGRES_USER": "segsvc", "POSTGRES_PASSWORD": PASSWORD, "POSTGRES_DB": "postgres"},
    ports={"5432/tcp": None},
    network="{chord_network.name}",
    wrapper_class=PostgresContainer,
    timeout=START_TIMEOUT_S,
)
broker = container(
    scope="session",
    image="redis:8-bookworm",
    command=RedisContainer.command(),
    ports={"6379/tcp": None},
    network="{chord_network.name}",
    wrapper_class=RedisContainer,
    timeout=START_TIMEOUT_S,
)
cache = container(
    scope="session",
    image="redis:8-bookworm",
    command=CacheContainer.command(),
    ports={"6379/tcp": None},
    network="{chord_network.name}",
    wrapper_class=CacheContainer,
    timeout=START_TIMEOUT_S,
)


@pytest.fixture(scope="session")
def inner_environment(postgres: PostgresContainer, broker: RedisContainer, cache: CacheContainer) -> dict[str, str]:
    """The settings of the processes in containers."""
    catalog, *shards = map(postgres.inner_dsn, DATABASES)

    return {
        "SEGSVC_CATALOG_DSN": catalog,
        "SEGSVC_SHARD_DSNS": " ".join(shards),
        "SEGSVC_BROKER_URL": broker.url,
        "SEGSVC_CACHE_URL": cache.url,
        "SEGSVC_REDISPATCH_QUIET_S": "1",
        "SEGSVC_OPERATION_DEADLINE_S": "60",
        "SEGSVC_OPERATION_WORKER_PROCESSES": "2",
        "SEGSVC_FAILPOINT_DIR": FAILPOINTS,
    }


@pytest.fixture(scope="session")
def migrated(
    postgres: PostgresContainer,
    inner_environment: dict[str, str],
    docker_client: docker.DockerClient,
    service_image: Image,
    chord_network: Network,
) -> None:
    """``segsvc migrate`` of our image has made the tables."""
    for name in DATABASES:
        postgres.create_database(name)

    # Raises if its exit code is not 0.
    docker_client.containers.run(
        service_image.id, ["migrate"], environment=inner_environment, network=chord_network.name, remove=True
    )


@pytest.fixture(scope="session")
def installation(
    migrated: None, postgres: PostgresContainer, broker: RedisContainer, cache: CacheContainer
) -> Installation:
    """The same installation as this process reaches it, with users."""
    catalog, *shards = map(postgres.dsn, DATABASES)
    settings = Settings(
        _env_file=None,
        catalog_dsn=catalog,
        shard_dsns=tuple(shards),
        broker_url=broker.host_url,
        cache_url=cache.host_url,
    )

    made = Installation(settings, postgres)
    made.add_users(USERS)
    return made


first_container = container(
    image="{service_image.id}",
    command=OperationsContainer.command(),
    environment=fxtr("inner_environment"),
    network="{chord_network.name}",
    wrapper_class=OperationsContainer,
    timeout=START_TIMEOUT_S,
)
second_container = container(
    image="{service_image.id}",
    command=OperationsContainer.command(),
    environment=fxtr("inner_environment"),
    network="{chord_network.name}",
    wrapper_class=OperationsContainer,
    timeout=START_TIMEOUT_S,
)
beat = container(
    image="{service_image.id}",
    command=["beat"],
    environment=fxtr("inner_environment"),
    network="{chord_network.name}",
    wrapper_class=BeatContainer,
    timeout=START_TIMEOUT_S,
)


def celery_of(settings: Settings) -> Celery:
    """The Celery application as a front on this machine has it."""
    app = Celery("segsvc", set_as_current=False)
    app.conf.update(celery_config(settings))
    return app


@pytest.fixture
def workers(
    installation: Installation, first_container: OperationsContainer, second_container: OperationsContainer
) -> tuple[Worker, Worker]:
    app = celery_of(installation.settings)
    return Worker(first_container, app), Worker(second_container, app)


@pytest.fixture
def front(installation: Installation, workers: tuple[Worker, Worker], beat: BeatContainer) -> Iterator[FrontServices]:
    """All processes run; this front accepts operations."""
    made = FrontServices(installation.settings, sender=CeleryDispatcher(celery_of(installation.settings)))
    yield made
    made.creations.close()
    made.close()
