"""The gRPC contract is well-formed, its generated code is current, and existing clients still work with it."""

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


@pytest.mark.parametrize("module", [membership_pb2, operations_pb2, segments_pb2])
def test_the_names_in_other_languages_stay(module: Any) -> None:
    # buf does not enforce these options: the contract was published without them (docs/adr/0028).
    options = {field.name: value for field, value in module.DESCRIPTOR.GetOptions().ListFields()}
    assert options == {
        "csharp_namespace": "Segmentation.V1",
        "go_package": "segsvc/segmentation/v1;segmentationv1",
        "java_package": "segmentation.v1",
    }


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


def test_what_clients_are_generated_from_is_complete(tool: dict[str, Any], tmp_path: Path) -> None:
    protos = tmp_path / "client-protos"
    tool["write_client_protos"](protos)
    ours = {path.relative_to(protos) for path in (protos / "segmentation").rglob("*.proto")}
    assert ours == {path.relative_to(tool["PROTOS"]) for path in tool["PROTOS"].rglob("*.proto")}
    # One include path, no other packages: like plain protoc elsewhere. (The well-known types come with every protoc.)
    command = [sys.executable, "-m", "grpc_tools.protoc", f"-I{protos}", f"--python_out={tmp_path}"]
    files = sorted(map(str, protos.rglob("*.proto")))
    done = subprocess.run([*command, *files], cwd=tmp_path, capture_output=True, text=True, check=False)
    assert (done.returncode, done.stdout, done.stderr) == (0, "", "")
