"""The clients of docs/clients run against both fronts, as a newcomer runs them; the page is right about errors."""

from __future__ import annotations

import json
import os
import re
import shutil
import subprocess
import sys
from pathlib import Path

import pytest
from google.longrunning import operations_pb2
from segmentation.v1 import membership_pb2, segments_pb2

from segsvc.domain.errors import Reason
from tests.clients.tools import kept, make_go, make_node, make_project, run
from tests.contract.conftest import FrontUnderTest
from tests.contract.test_memberships import NOBODY

REPOSITORY = Path(__file__).resolve().parents[2]
PAGE = REPOSITORY / "docs" / "clients.md"
CLIENTS = REPOSITORY / "docs" / "clients"
FIRST = 7_700_000
PATIENCE_S = 60.0
[GRPCURL] = re.findall(r"`go install (\S*grpcurl\S*)`", PAGE.read_text())


@pytest.fixture
def user_id(front: FrontUnderTest) -> int:
    front.installation.create_users({FIRST: {}, FIRST + 1: {}})
    return FIRST


def output_of(*arguments: str | Path) -> str:
    """What a client printed.

    Raises:
        AssertionError: the client failed; with what it printed.
    """
    environment = {name: value for name, value in os.environ.items() if not name.startswith("SEGSVC_")}
    done = subprocess.run(
        [str(argument) for argument in arguments],
        env=environment,
        capture_output=True,
        text=True,
        timeout=PATIENCE_S,
        check=False,
    )

    assert done.returncode == 0, done.stdout + done.stderr
    return done.stdout


def rolled_out_read_and_deleted(output: str, user_id: int) -> bool:
    """Whether a client that shows everything printed what it must have found."""
    operation, member, left, error = output.splitlines()
    return (
        re.fullmatch(r"operations/[0-9a-f-]{36}: done=true error=''", operation, re.IGNORECASE) is not None
        and re.fullmatch(rf"user {user_id} is in \S+: true", member, re.IGNORECASE) is not None
        and re.fullmatch(rf"user {user_id} is in \S+: false", left, re.IGNORECASE) is not None
        and error == "NOT_FOUND SEGMENT_NOT_FOUND"
    )


def test_readme(front: FrontUnderTest, user_id: int) -> None:
    [code] = re.findall(r"^```python\n(.*?)^```$", (REPOSITORY / "README.md").read_text(), re.MULTILINE | re.DOTALL)
    here = code.replace("127.0.0.1:50051", front.address).replace("user_id=9223372036854775807", f"user_id={user_id}")
    assert front.address in here
    assert re.fullmatch(r"\[.*\]\n", output_of(sys.executable, "-c", here))


def test_python(front: FrontUnderTest, user_id: int) -> None:
    output = output_of(sys.executable, CLIENTS / "sync_client.py", front.address, str(user_id))
    assert rolled_out_read_and_deleted(output, user_id), output


def test_python_with_asyncio(front: FrontUnderTest, user_id: int) -> None:
    users = [str(user_id), str(user_id + 1), str(NOBODY)]
    lines = output_of(sys.executable, CLIENTS / "asyncio_client.py", front.address, *users).splitlines()
    assert len(lines) == 4
    assert re.fullmatch(rf"user {user_id}: \d+ segments", lines[0])
    assert lines[1] == lines[0]
    assert lines[3] == f"user {NOBODY}: NOT_FOUND"


@pytest.fixture(scope="module")
def go_client(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """The client in Go, compiled."""
    module = make_go(make_project(tmp_path_factory.mktemp("go")))
    for file in (CLIENTS / "go" / "main.go", CLIENTS / "service_config.json"):
        shutil.copy(file, module)
    run(["go", "build", "-C", str(module), "-o", "client", "."], module)
    return module / "client"


def test_go(front: FrontUnderTest, user_id: int, go_client: Path) -> None:
    output = output_of(go_client, front.address, str(user_id))
    assert rolled_out_read_and_deleted(output.replace("NotFound", "NOT_FOUND"), user_id), output


@pytest.fixture(scope="module")
def node_project(tmp_path_factory: pytest.TempPathFactory) -> Path:
    project = make_node(make_project(tmp_path_factory.mktemp("node")))
    shutil.copy(CLIENTS / "service_config.json", project)
    (project / "node").mkdir()
    shutil.copy(CLIENTS / "node" / "client.js", project / "node")
    return project


def test_node(front: FrontUnderTest, user_id: int, node_project: Path) -> None:
    output = run(["node", "node/client.js", front.address, str(user_id)], node_project)
    assert rolled_out_read_and_deleted(output, user_id), output


def test_grpcurl(front: FrontUnderTest, user_id: int, tmp_path: Path) -> None:
    tools = kept("grpcurl", "go", made_of=GRPCURL)
    if not (tools / "grpcurl").exists():
        run(["env", f"GOBIN={tools}", "go", "install", GRPCURL], tmp_path)
    [command] = re.findall(r"^grpcurl .*$", PAGE.read_text(), re.MULTILINE)
    command = command.replace("42", str(user_id)).replace("127.0.0.1:50051", front.address)
    answer = json.loads(run(["sh", "-ec", command], tmp_path, tools))
    assert answer["user_id"] == str(user_id)


# -- what the page says ---------------------------------------------------------------------------------------------


def test_every_reason_is_explained_with_its_code() -> None:
    rows = re.findall(r"^\| `([A-Z_]+)` \| ([A-Z_]+) \| ([^|]+) \| ([^|]+) \|$", PAGE.read_text(), re.MULTILINE)
    assert [(reason, code) for reason, code, _, _ in rows] == [(r.text, r.category.value) for r in Reason]


def test_the_service_config_names_methods_that_there_are() -> None:
    services = {
        service.full_name: set(service.methods_by_name)
        for file in (membership_pb2, segments_pb2, operations_pb2)
        for service in file.DESCRIPTOR.services_by_name.values()
    }

    config = json.loads((CLIENTS / "service_config.json").read_text())
    named = [(name["service"], name["method"]) for rule in config["methodConfig"] for name in rule["name"]]
    assert len(named) == len(set(named)) > 10
    for service, method in named:
        assert method in services[service], method

    # A client repeats a change automatically only if the service can recognise the repetition.
    requests = {m.name: m.input_type for s in segments_pb2.DESCRIPTOR.services_by_name.values() for m in s.methods}
    requests |= {m.name: m.input_type for s in membership_pb2.DESCRIPTOR.services_by_name.values() for m in s.methods}
    for _, method in named:
        if not method.startswith(("Get", "List", "Check", "BatchGet")):
            assert "request_id" in requests[method].fields_by_name, method
