"""The alert rules fire when they must, and only then: Prometheus' own tool tests them."""

from __future__ import annotations

import json
import re
import shutil
import subprocess
from pathlib import Path
from typing import Any

import pytest

from tests.local_servers import REPOSITORY

ALERTS = REPOSITORY / "docs" / "alerts.yml"
METHOD = "/segmentation.v1.SegmentService/GetSegment"
NOBODY = [{"series": f'segsvc_build_info{{role="{role}"}}', "values": "1x60"}
          for role in ("operations", "events", "warming", "bridge", "beat")]  # fmt: skip


@pytest.fixture
def promtool() -> str:
    found = shutil.which("promtool")
    if found is None:
        pytest.skip("promtool is not installed; it comes with Debian's package prometheus")
    return found


def series(name: str, values: str) -> dict[str, str]:
    return {"series": name, "values": values}


def fires(promtool: str, folder: Path, alert: str, inputs: list[dict[str, str]], at: str) -> list[dict[str, str]]:
    """The labels of each alert of this name that fires at this time."""
    test = folder / "test.yml"

    # The test expects an impossible alert, so that the tool prints the alerts that do fire.
    impossible = [{"exp_labels": {"none": "such"}, "exp_annotations": {}}]
    test.write_text(
        json.dumps(
            {
                "rule_files": [str(ALERTS)],
                "evaluation_interval": "15s",
                "tests": [
                    {
                        "interval": "15s",
                        "input_series": inputs,
                        "alert_rule_test": [{"eval_time": at, "alertname": alert, "exp_alerts": impossible}],
                    }
                ],
            }
        )
    )

    done = subprocess.run([promtool, "test", "rules", str(test)], capture_output=True, text=True, check=False)
    got = done.stderr.partition("got:")[2] or done.stdout.partition("got:")[2]
    assert got, done.stdout + done.stderr
    return _labels(got)


def _labels(got: str) -> list[dict[str, str]]:
    found = re.findall(r"Labels:\{([^}]*)\}", got)
    return [dict(re.findall(r'(\w+)="([^"]*)"', labels)) for labels in found]


def test_the_rules_are_read(promtool: str) -> None:
    done = subprocess.run([promtool, "check", "rules", ALERTS], capture_output=True, text=True, check=False)
    assert done.returncode == 0, done.stdout + done.stderr


def test_the_first_failure_of_a_method_is_reported(promtool: str, tmp_path: Path) -> None:
    name = f'segsvc_rpcs_total{{code="INTERNAL",method="{METHOD}"}}'
    quiet = [series(name, "0x40")]
    once = [series(name, "0x10 1x30")]
    assert fires(promtool, tmp_path, "SegsvcInternalErrors", quiet, "5m") == []
    [labels] = fires(promtool, tmp_path, "SegsvcInternalErrors", once, "5m")
    assert labels["method"] == METHOD
    dead = [series('segsvc_events_total{topic="create-user",outcome="dead"}', "0x10 1x30")]
    assert len(fires(promtool, tmp_path, "SegsvcDeadLetters", dead, "5m")) == 1


@pytest.mark.parametrize("role", ["operations", "events", "warming", "bridge", "beat"])
def test_a_role_without_a_process_is_reported(promtool: str, tmp_path: Path, role: str) -> None:
    there = [item for item in NOBODY if f'"{role}"' not in item["series"]]
    assert fires(promtool, tmp_path, "SegsvcNobodyWorks", NOBODY, "10m") == []
    # The process is gone after a minute, and its series with it.
    gone: list[dict[str, Any]] = [*there, series(f'segsvc_build_info{{role="{role}"}}', "1x4 stale")]
    assert [labels["role"] for labels in fires(promtool, tmp_path, "SegsvcNobodyWorks", gone, "10m")] == [role]


def test_one_vanished_process_of_several_is_reported(promtool: str, tmp_path: Path) -> None:
    workers = [series(f'segsvc_build_info{{role="events",instance="{name}"}}', "1x400") for name in "ab"]
    assert fires(promtool, tmp_path, "SegsvcFewerProcesses", workers, "80m") == []
    workers[1]["values"] = "1x260 stale"
    assert len(fires(promtool, tmp_path, "SegsvcFewerProcesses", workers, "80m")) == 1


@pytest.mark.parametrize(
    ("job", "alert"),
    [
        ("front", "SegsvcFrontDown"),
        ("worker", "SegsvcWorkerDown"),
        ("bridge", "SegsvcWorkerDown"),
        ("beat", "SegsvcWorkerDown"),
    ],
)
def test_a_process_without_an_answer_is_reported(promtool: str, tmp_path: Path, job: str, alert: str) -> None:
    up = [series(f'up{{job="segsvc-{job}",instance="x"}}', "1x60")]
    assert fires(promtool, tmp_path, alert, up, "10m") == []
    assert len(fires(promtool, tmp_path, alert, [{**up[0], "values": "1x4 0x60"}], "10m")) == 1
    if job == "front":
        assert len(fires(promtool, tmp_path, alert, [{**up[0], "values": "1x4 stale"}], "10m")) == 1


def test_missing_recovery_is_reported(promtool: str, tmp_path: Path) -> None:
    # The evaluation begins at time 0.
    runs = [series("segsvc_recovery_timestamp_seconds", "0+15x60")]
    assert fires(promtool, tmp_path, "SegsvcRecoveryStopped", runs, "10m") == []
    assert len(fires(promtool, tmp_path, "SegsvcRecoveryStopped", [{**runs[0], "values": "0x60"}], "10m")) == 1
    assert len(fires(promtool, tmp_path, "SegsvcRecoveryStopped", NOBODY, "10m")) == 1


def test_one_full_or_lost_cache_server_of_several_is_told_by_name(promtool: str, tmp_path: Path) -> None:
    memory = [
        series(f'segsvc_cache_memory_bytes{{server="{server}",what="{what}"}}', f"{value}x200")
        for server, what, value in (("a", "limit", 200), ("a", "used", 150), ("b", "limit", 100), ("b", "used", 110))
    ]
    assert [labels["server"] for labels in fires(promtool, tmp_path, "SegsvcCacheFull", memory, "40m")] == ["b"]

    connected = [
        series(f'segsvc_cache_connected{{server="{server}",instance="{front}"}}', values)
        for server, front, values in (
            ("a", "x", "1x60"),
            ("b", "x", "1x60"),
            ("a", "y", "1x60"),
            ("b", "y", "1x4 0x60"),
        )
    ]
    [lost] = fires(promtool, tmp_path, "SegsvcCacheServerLost", connected, "10m")
    assert lost["server"] == "b"


def test_a_full_cache_is_reported(promtool: str, tmp_path: Path) -> None:
    limit = series('segsvc_cache_memory_bytes{what="limit"}', "100x200")
    for used, told in ((90, 0), (110, 1)):
        inputs = [limit, series('segsvc_cache_memory_bytes{what="used"}', f"{used}x200")]
        assert len(fires(promtool, tmp_path, "SegsvcCacheFull", inputs, "40m")) == told
