"""A real Flower beside a worker that carries out a rollout."""

from __future__ import annotations

import base64
import json
import urllib.error
import urllib.request
from http.client import HTTPMessage
from typing import Any
from urllib.parse import urlencode

import pytest

from segsvc.local.processes import free_ports
from tests.eventually import eventually
from tests.integration.broker.conftest import SHARDS, Workplace

ROLL_OUT = """\
import time
from segsvc.bootstrap import FrontServices
from segsvc.config import load_settings
from segsvc.domain.segment import Rule, SegmentText
from tasks.app import app
from tasks.dispatcher import CeleryDispatcher

front = FrontServices(load_settings(), sender=CeleryDispatcher(app))
front.creations.create_segment("checkout", SegmentText(), request=None, deadline_s=30)
operation = front.acceptance.roll_out("checkout", Rule(30_000), etag="", request=None)
while not front.operations.get(operation.id).state.final:
    time.sleep(0.05)
print(front.operations.get(operation.id).state.name)
"""


PASSWORD = "hush"


def ask(port: int, path: str, *, password: str | None = PASSWORD) -> tuple[int, HTTPMessage, bytes]:
    request = urllib.request.Request(f"http://127.0.0.1:{port}{path}")
    if password is not None:
        request.add_header("Authorization", f"Basic {base64.b64encode(f'segsvc:{password}'.encode()).decode()}")
    try:
        with urllib.request.urlopen(request, timeout=10) as answer:  # noqa: S310  # always http
            return answer.status, answer.headers, answer.read()
    except urllib.error.HTTPError as error:
        return error.code, error.headers, error.read()


def listed(port: int) -> list[dict[str, Any]]:
    """The rows of Flower's list of tasks."""
    query = {
        "draw": 1, "start": 0, "length": 100, "search[value]": "", "order[0][column]": 0, "order[0][dir]": "asc",
        "columns[0][data]": "name",
    }  # fmt: skip
    rows: list[dict[str, Any]] = json.loads(ask(port, f"/tasks/datatable?{urlencode(query)}")[2])["data"]
    return rows


@pytest.fixture
def flower(workplace: Workplace) -> int:
    """The port of a running Flower that answers."""
    [port] = free_ports(1)
    settings = {"SEGSVC_FLOWER_ADDRESS": f"127.0.0.1:{port}", "SEGSVC_FLOWER_PASSWORD": PASSWORD}
    workplace.start("flower", "-m", "segsvc", "flower", **settings)

    def answers() -> bool:
        try:
            return ask(port, "/healthcheck")[0] == 200
        except OSError:
            return False

    eventually(answers, 60)
    return port


def test_flower_is_legible_quiet_exact_and_closed(workplace: Workplace, flower: int) -> None:
    workplace.worker()
    workplace.installation.add_users(range(1, 3001))
    eventually(lambda: b"operations@" in ask(flower, "/workers?json=1")[2])

    for task, arguments in (("segsvc.warm_shard", {"shard": 0}), ("segsvc.maintain", {})):
        workplace.put_task(task, **arguments)
    assert workplace.run_script(ROLL_OUT).splitlines()[-1] == "DONE"
    workplace.await_work()

    def ended() -> bool:
        return [row["state"] for row in listed(flower)].count("SUCCESS") >= SHARDS + 3

    eventually(ended)

    rows = [row for row in listed(flower) if "checkout" in row["kwargs"]]
    assert len(rows) == SHARDS + 1
    assert all("30" in row["kwargs"] for row in rows)
    assert {row["name"] for row in listed(flower)} == {"segsvc.prepare_shard", "segsvc.finalize"}
    assert not [row for row in rows if "0/0" in str(row["result"])]

    for path in ("/", "/tasks", "/metrics", "/api/workers", "/broker"):
        assert ask(flower, path, password=None)[0] == 401, path
        assert ask(flower, path, password="wrong")[0] == 401, path
        assert ask(flower, path)[0] == 200, path

    for path in ("/tasks", "/metrics", "/healthcheck", "/static/favicon.ico", "/no-such-page"):
        for password in (PASSWORD, None):
            headers = ask(flower, path, password=password)[1]
            assert headers["X-Frame-Options"] == "DENY", path
            assert headers["Content-Security-Policy"] == "frame-ancestors 'none'", path

    # The lengths that Flower shows are those of this installation's queues.
    workplace.client.lpush(f"{workplace.prefix}warming", b"{}")
    lengths = json.loads(ask(flower, "/api/queues/length")[2])["active_queues"]
    assert {"name": "operations", "messages": 0} in lengths
