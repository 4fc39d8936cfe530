"""What the processes log: JSON, one object a line, from their start to their end, with the id of the call."""

from __future__ import annotations

import json
from concurrent.futures import ThreadPoolExecutor
from pathlib import Path
from typing import Any
from uuid import uuid4

import pytest
from segmentation.v1 import segments_pb2

from segsvc.config import Settings
from segsvc.demo.client import Client
from segsvc.local.stack import LocalStack, service_processes
from tests.eventually import eventually

PROCESSES = [spec.name for spec in service_processes()]


@pytest.fixture
def logs(stack: LocalStack) -> dict[str, Path]:
    return {part.name: part.log for part in stack.status() if part.name in PROCESSES}


def lines(log: Path, start: int) -> list[dict[str, Any]]:
    """What was logged from this byte on."""
    written = log.read_bytes()[start:].decode()
    found = []

    for line in written.splitlines():
        try:
            event = json.loads(line)
        except ValueError:
            pytest.fail(f"{log.name}: not JSON: {line!r}")
        assert isinstance(event, dict), (log.name, line)
        assert {"event", "level", "timestamp"} <= event.keys(), (log.name, line)
        found.append(event)
    return found


def test_every_line_is_json_and_carries_the_request(
    stack: LocalStack, logs: dict[str, Path], client: Client, settings: Settings
) -> None:
    assert settings.log_format == "json"
    starts = {name: log.stat().st_size for name, log in logs.items()}

    # Every process is restarted: it logs at its end and at its start, where banners would be.
    def restart(name: str) -> None:
        stack.supervisor.stop_process(name)
        stack.supervisor.start_process(name)

    # Side by side, because each mostly waits.
    with ThreadPoolExecutor(len(PROCESSES)) as threads:
        list(threads.map(restart, PROCESSES))
    client.wait_ready(60)

    client.create("logged", "")
    request_id = f"call-{uuid4()}"
    request = segments_pb2.RollOutSegmentRequest(slug="logged", rule=segments_pb2.RollOutRule(percent=50))
    client.segments.RollOutSegment(request, timeout=60, metadata=[("x-request-id", request_id)])

    def of_the_call() -> list[dict[str, Any]]:
        events = lines(logs["worker-operations"], starts["worker-operations"])
        return [event for event in events if event.get("request_id") == request_id]

    # At least one event for each shard, and one for the end of the operation.
    eventually(lambda: len(of_the_call()) > settings.shard_count)

    for name in PROCESSES:
        eventually(lambda name=name: len(lines(logs[name], starts[name])) > 0, within_s=60)  # type: ignore[misc]
    for name in PROCESSES:
        events = lines(logs[name], starts[name])
        text = logs[name].read_text()
        assert settings.flower_password not in text, name
        # Work that comes every few seconds logs nothing while it succeeds.
        said = [event["event"] for event in events if event["level"] != "debug"]
        assert not [event for event in said if "segsvc.warm_" in event or "segsvc.maintain" in event], name
