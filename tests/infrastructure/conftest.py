"""One installation for all tests of faults in the infrastructure; each leaves it in full service."""

from __future__ import annotations

import shutil
import subprocess
from collections.abc import Iterator
from pathlib import Path

import pytest

from segsvc.config import Settings
from segsvc.domain.events import TOPICS
from segsvc.local.kafka import KafkaServer
from segsvc.local.processes import free_ports
from tests.eventually import eventually
from tests.infrastructure.system import DRAIN_S, System

SMALL_DISK_MB = 512


@pytest.fixture(scope="package")
def small_disk(servers_folder: Path) -> Iterator[Path | None]:
    """A small file system in memory, or None if this machine does not permit the mount."""
    folder = servers_folder / "small-disk"
    folder.mkdir()

    mount = shutil.which("mount")
    command = [mount or "mount", "-t", "tmpfs", "-o", f"size={SMALL_DISK_MB}m,mode=755", "segsvc-test", str(folder)]

    if mount is None or subprocess.run(command, capture_output=True, check=False).returncode != 0:
        yield None
        return

    try:
        yield folder
    finally:
        subprocess.run(["umount", "--lazy", str(folder)], check=True)


@pytest.fixture(scope="package")
def running(servers_folder: Path, small_disk: Path | None) -> Iterator[System]:
    home = servers_folder / "faults"
    home.mkdir()
    made = System(home, servers_folder, folder_of_one=small_disk)
    try:
        yield made
    finally:
        made.close()


@pytest.fixture
def system(running: System) -> Iterator[System]:
    """The installation, in full service before each test; after it, the faults are healed whatever the outcome was."""
    running.heal()
    running.client.wait_ready(60)
    eventually(running.workers_answer, 60)
    eventually(running.drained, DRAIN_S)
    seen = running.log_ends()
    yield running
    running.heal()
    # No fault here may need a person, or a repetition of a shard's work.
    assert '"event": "alarm"' not in running.logged(seen)


@pytest.fixture
def slug(request: pytest.FixtureRequest) -> str:
    """A segment's slug that no other test has."""
    name = str(request.node.name).removeprefix("test_").replace("_", "-")
    return "".join(sign if sign.isalnum() else "-" for sign in name)[:60].strip("-").lower()


@pytest.fixture
def bridged(system: System, slug: str, kafka_server: KafkaServer) -> Iterator[Settings]:
    """Settings of a bridge of the installation, with many small batches and topics of its own."""
    prefix = f"{slug}."
    kafka_server.create_topics(
        {
            **{f"{prefix}{topic}": 4 for topic in TOPICS},
            **{f"{prefix}{topic}.dlq": 1 for topic in TOPICS},
            f"{prefix}segment-events": 1,
        }
    )

    with system.another(
        "bridge",
        ["bridge"],
        kafka_bootstrap_servers=kafka_server.bootstrap_servers,
        kafka_stand_in=kafka_server.stand_in,
        kafka_topic_prefix=prefix,
        kafka_group=prefix,
        event_batch_max=100,
        event_batches_in_flight_max=32,
        bridge_metrics_address=f"127.0.0.1:{free_ports(1)[0]}",
    ) as own:
        yield own
