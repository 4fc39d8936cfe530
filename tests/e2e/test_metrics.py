"""Every process that counts something shows it, at the address that the settings give it."""

from __future__ import annotations

import os
import signal
from collections import Counter
from urllib.error import URLError
from urllib.request import urlopen
from uuid import uuid4

import pytest
from prometheus_client.parser import text_string_to_metric_families

from segsvc.config import Settings
from segsvc.demo.client import Client
from segsvc.domain.operation import Gid
from segsvc.local.stack import LocalStack
from segsvc.postgres.engine import Databases, Pool
from tests.e2e.events import all_readable, producer
from tests.eventually import eventually

USERS = list(range(6_000_001, 6_000_201))

Samples = Counter[tuple[str, ...]]
"""Values by name and labels' values in the order of the labels' names, added up over processes."""


def scrape(*where: str) -> Samples:
    found: Samples = Counter()
    for address in where:
        with urlopen(f"http://{address}/metrics", timeout=10) as answer:
            for family in text_string_to_metric_families(answer.read().decode()):
                for sample in family.samples:
                    if sample.name.startswith("segsvc_"):
                        found[(sample.name, *dict(sorted(sample.labels.items())).values())] += sample.value
    return found


def addresses(settings: Settings) -> list[str]:
    return [
        settings.metrics_address,
        settings.operation_worker_metrics_address,
        settings.event_worker_metrics_address,
        settings.warming_worker_metrics_address,
        settings.bridge_metrics_address,
        settings.beat_metrics_address,
    ]


@pytest.fixture(autouse=True)
def _all_serve(settings: Settings) -> None:
    """Processes that have just been started take a moment to listen."""

    def serves(address: str) -> bool:
        try:
            return bool(scrape(address))
        except URLError:
            return False

    for address in addresses(settings):
        eventually(lambda address=address: serves(address))  # type: ignore[misc]


UNREAD = 10**12
"""Added to the ids of users whom no test reads."""


def test_what_happens_is_counted_where_it_is_said(client: Client, settings: Settings) -> None:
    before = scrape(*addresses(settings))
    with producer(settings) as send:
        send("create-user", ({"user_id": user, "attributes": {}} for user in USERS))
        send("create-user", ["no event"])
    eventually(lambda: all_readable(client, USERS))
    client.create("counted", "")
    client.roll_out("counted", 50)
    client.delete("counted")

    def risen(*name: str) -> float:
        return scrape(*addresses(settings))[name] - before[name]

    kinds = ("CREATE", "ROLL_OUT", "DELETE")
    assert [risen("segsvc_operations_finished_total", kind, "DONE") for kind in kinds] == [1, 1, 1]

    bridge = settings.bridge_metrics_address
    eventually(lambda: risen("segsvc_events_total", "applied", "create-user") >= len(USERS))
    eventually(lambda: risen("segsvc_events_total", "dead", "create-user") == 1)
    assert ("segsvc_event_batches_in_flight",) in scrape(bridge)
    warming = settings.warming_worker_metrics_address
    # A bulk change leaves the cache warm, so the warmer fills only what nobody has read yet.
    with producer(settings) as send:
        send("create-user", ({"user_id": user + UNREAD, "attributes": {}} for user in USERS))
    eventually(lambda: sum(scrape(warming)[("segsvc_warmed_entries_total", str(shard))] for shard in range(4)) > 0)


def test_what_is_in_doubt_is_seen(stack: LocalStack, settings: Settings) -> None:
    beat = settings.beat_metrics_address
    gid = str(Gid(settings.cluster, uuid4(), 1))  # ours by name, and unknown to the ledger: recovery leaves it alone

    def in_doubt() -> list[float]:
        samples = scrape(beat)
        return [samples[("segsvc_in_doubt_seconds", str(shard), "UNKNOWN")] for shard in range(4)]

    def last_run() -> float:
        return scrape(beat)[("segsvc_recovery_timestamp_seconds",)]

    databases = Databases(settings, "test", Pool(1))
    try:
        with databases.shard_connection(1) as connection:
            connection.exec_driver_sql("INSERT INTO deleted_users (id, version) VALUES (1, 0)")
            connection.exec_driver_sql("PREPARE TRANSACTION %s", (gid,))
            connection.rollback()
        try:
            eventually(lambda: in_doubt()[1] > 0)
            # The last check of the other shards may have seen an operation that has just ended.
            eventually(lambda: [age for shard, age in enumerate(in_doubt()) if shard != 1] == [0, 0, 0])
            eventually(lambda: scrape(beat)[("segsvc_recovery_alarms_total", "unknown-prepared")] > 0)

            # Beat is killed, and another process takes its place.
            [pid] = [part.pid for part in stack.status() if part.name == "beat"]
            assert pid is not None
            before = last_run()
            os.kill(pid, signal.SIGKILL)

            def looked_again() -> bool:
                try:
                    return scrape(beat)[("segsvc_in_doubt_seconds", "1", "UNKNOWN")] > 0 and last_run() > before
                except OSError:  # it is not back yet
                    return False

            eventually(looked_again, within_s=60)
            assert in_doubt()[1] > 0
        finally:
            with databases.shard_autocommit(1) as connection:
                connection.exec_driver_sql("ROLLBACK PREPARED %s", (gid,))
        eventually(lambda: in_doubt() == [0, 0, 0, 0])
    finally:
        databases.close()
