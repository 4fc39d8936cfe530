"""The gRPC contract: well-formed, its generated code current, and still what other people's clients were built on."""

from __future__ import annotations

import runpy
import shutil
import subprocess
import sys
from pathlib import Path
from typing import Any

import pytest
from segmentation.v1 import membership_pb2, operations_pb2, segments_pb2

REPOSITORY = Path(__file__).resolve().parent.parent.parent


@pytest.fixture(scope="module")
def tool() -> dict[str, Any]:
    """What tools/protos.py defines."""
    return runpy.run_path(str(REPOSITORY / "tools" / "protos.py"))


def test_the_protos_pass_every_check() -> None:
    done = subprocess.run(
        [sys.executable, str(REPOSITORY / "tools" / "protos.py"), "check"], capture_output=True, text=True, check=False
    )
    assert (done.returncode, done.stdout, done.stderr) == (0, "", "")


def test_reflection_serves_them_by_the_names_that_clients_import() -> None:
    names = [module.DESCRIPTOR.name for module in (membership_pb2, operations_pb2, segments_pb2)]
    assert names == [f"segmentation/v1/{name}.proto" for name in ("membership", "operations", "segments")]


@pytest.mark.parametrize(
    ("before", "after", "complaint"),
    [
        ("string display_name = 2;", "string display_name = 20;", 'field "2" with name "display_name"'),
        ("rpc GetSegment(GetSegmentRequest)", "rpc FetchSegment(GetSegmentRequest)", 'RPC "GetSegment"'),
    ],
)
def test_a_breaking_change_is_noticed(
    tool: dict[str, Any], tmp_path: Path, before: str, after: str, complaint: str
) -> None:
    changed = tmp_path / "protos"
    shutil.copytree(tool["PUBLISHED"], changed)
    file = changed / "segmentation" / "v1" / "segments.proto"
    assert before in file.read_text()
    file.write_text(file.read_text().replace(before, after))
    assert complaint in tool["breaking_changes"](changed, tool["PUBLISHED"])


def test_stale_generated_code_is_noticed(tool: dict[str, Any], tmp_path: Path) -> None:
    copy = tmp_path / "generated"
    shutil.copytree(tool["GENERATED"], copy)
    assert tool["differences"](copy, tool["GENERATED"]) == []
    (copy / "segmentation" / "v1" / "segments_pb2.py").write_text("")
    (copy / "segmentation" / "v1" / "extra.py").touch()
    assert tool["differences"](copy, tool["GENERATED"]) == [
        "segmentation/v1/extra.py",
        "segmentation/v1/segments_pb2.py",
    ]
