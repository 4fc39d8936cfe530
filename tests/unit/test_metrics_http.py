"""Metrics of one process, and of a process with its children, as a scraper sees them."""

from __future__ import annotations

import contextlib
import json
import os
import socket
import subprocess
import sys
from pathlib import Path
from urllib.request import urlopen

import pytest
from prometheus_client import REGISTRY, CollectorRegistry, Gauge

from segsvc import metrics
from segsvc.config import Settings
from segsvc.domain.events import TOPICS
from segsvc.local.processes import free_ports
from segsvc.local.stack_env import choose_ports
from segsvc.metrics_http import MetricsAddressError, all_processes, serving

FAMILY = """
import os, signal, sys, time
from pathlib import Path
from urllib.request import urlopen
from segsvc import metrics
from segsvc.metrics_http import all_processes, serving

address = sys.argv[1]

def child(work):
    ready, done = os.pipe()
    pid = os.fork()
    if pid:
        assert os.read(ready, 1) == b"."
        return pid
    work()
    os.write(done, b".")
    signal.pause()

def scrape():
    with urlopen(f"http://{address}/metrics", timeout=5) as answer:
        lines = answer.read().decode().splitlines()
    print(sorted(line for line in lines if line.startswith("segsvc_") and not line.endswith(" 0.0")))

def first():
    metrics.warmed.labels(1).inc(3)
    metrics.in_doubt_seconds.labels(1, "PREPARING").set(7)
    metrics.event_batches_in_flight.set(5)

def second():
    metrics.warmed.labels(1).inc(4)
    metrics.in_doubt_seconds.labels(1, "PREPARING").set(2)

with serving(address, all_processes(Path(os.environ["PROMETHEUS_MULTIPROC_DIR"]))):
    one = child(first)
    two = child(second)
    scrape()
    os.kill(one, signal.SIGKILL)
    os.waitpid(one, 0)
    scrape()
with serving(address):  # the child that is left does not hold the port
    pass
os.kill(two, signal.SIGKILL)
"""


def new_address() -> str:
    return f"127.0.0.1:{free_ports(1)[0]}"


def test_children_are_added_up_and_the_dead_leave_what_they_counted(tmp_path: Path) -> None:
    run = subprocess.run(
        [sys.executable, "-c", FAMILY, new_address()],
        env={**os.environ, "PROMETHEUS_MULTIPROC_DIR": str(tmp_path)},
        capture_output=True,
        text=True,
        timeout=60,
        check=False,
    )

    assert run.returncode == 0, run.stderr
    both, one_left = run.stdout.splitlines()
    counted = ['segsvc_in_doubt_seconds{shard="1",state="PREPARING"} 2.0', 'segsvc_warmed_entries_total{shard="1"} 7.0']
    assert both == str(["segsvc_event_batches_in_flight 5.0", *counted])
    assert one_left == str(counted)


STARTING = """
import sys, threading
from pathlib import Path
from segsvc.metrics_http import all_processes

folder = Path(sys.argv[1])
registry = all_processes(folder)
# A process that has made its file and not written anything yet.
(folder / "counter_1.db").touch()
threading.Timer(0.2, (folder / "counter_1.db").unlink).start()
print(sum(1 for family in registry.collect() for sample in family.samples if sample.name.startswith("segsvc_")))
"""


def test_a_process_that_starts_while_it_is_scraped_is_waited_for(tmp_path: Path) -> None:
    environment = {**os.environ, "PROMETHEUS_MULTIPROC_DIR": str(tmp_path)}
    done = subprocess.run(
        [sys.executable, "-c", STARTING, str(tmp_path)], env=environment, capture_output=True, text=True, check=False
    )
    assert (done.returncode, done.stderr) == (0, "")


def test_what_alert_rules_watch_rise_begins_at_0() -> None:
    watched = [("segsvc_recovery_alarms_total", {"what": what}) for what in metrics.ALARMS]
    watched += [("segsvc_events_total", {"topic": topic, "outcome": "dead"}) for topic in TOPICS]
    assert None not in [REGISTRY.get_sample_value(name, labels) for name, labels in watched]


def test_what_a_process_declares_is_served_until_it_ends() -> None:
    registry = CollectorRegistry()
    Gauge("answer", "Of everything.", registry=registry).set(42)
    address = new_address()
    with serving(address, registry), urlopen(f"http://{address}/metrics", timeout=5) as answer:
        assert b"\nanswer 42.0\n" in answer.read()
    with pytest.raises(OSError, match="refused"):
        urlopen(f"http://{address}/metrics", timeout=5)


def test_an_address_in_use_is_named() -> None:
    address = new_address()
    with (
        serving(address),
        pytest.raises(MetricsAddressError, match=f"metrics on {address}: .*in use"),
        serving(address),
    ):
        pass


def test_without_an_address_nothing_is_served() -> None:
    with serving(""):
        pass


def test_values_that_live_in_memory_cannot_be_added_up(tmp_path: Path) -> None:
    with pytest.raises(RuntimeError, match="imported before"):
        all_processes(tmp_path)


@pytest.mark.parametrize(
    ("arguments", "setting"),
    [
        (["worker", "--queue", "operations"], "SEGSVC_OPERATION_WORKER_METRICS_ADDRESS"),
        (["worker", "--queue", "events"], "SEGSVC_EVENT_WORKER_METRICS_ADDRESS"),
        (["worker", "--queue", "warming"], "SEGSVC_WARMING_WORKER_METRICS_ADDRESS"),
        (["bridge"], "SEGSVC_BRIDGE_METRICS_ADDRESS"),
    ],
)
def test_a_process_whose_address_is_in_use_does_not_start(arguments: list[str], setting: str) -> None:
    # The process reaches this error only if prometheus_client was not imported before its values had a place.
    address = new_address()
    with serving(address):
        run = subprocess.run(
            [sys.executable, "-m", "segsvc", *arguments],
            env={**os.environ, "SEGSVC_ENV_FILE": "", setting: address},
            capture_output=True,
            text=True,
            timeout=60,
            check=False,
        )

    assert run.returncode == 1
    [line] = run.stderr.splitlines()
    assert json.loads(line).items() >= {
        ("event", "complaint"), ("level", "error"), ("text", f"metrics on {address}: Address already in use")
    }  # fmt: skip


@pytest.mark.parametrize("value", ["9464", ":9464", "localhost:", "localhost:metrics"])
def test_an_address_is_host_and_port(value: str) -> None:
    with pytest.raises(ValueError, match="host:port"):
        Settings(_env_file=None, bridge_metrics_address=value)


def test_each_address_of_a_stack_has_a_port_of_its_own() -> None:
    with socket.socket() as taken:
        with contextlib.suppress(OSError):  # another process has it: that serves as well
            taken.bind(("127.0.0.1", 9464))
            taken.listen()
        with contextlib.ExitStack() as reserved:
            ports = choose_ports(reserved)
    assert set(ports) <= set(Settings.model_fields)
    assert len(set(ports.values())) == len(ports)
    assert 9464 not in ports.values()
