"""docs/clients.md: its commands generate code in each language, which compiles, and its programs get an answer."""

from __future__ import annotations

import re
from collections.abc import Iterator
from concurrent.futures import ThreadPoolExecutor
from pathlib import Path

import grpc
import pytest
from segmentation.v1 import membership_pb2, membership_pb2_grpc

from tests.clients.tools import GO_PLUGINS, PAGE, block, kept, make_go, make_node, make_project, run
from tests.environments import make_environment
from tests.local_servers import REPOSITORY


class Membership(membership_pb2_grpc.MembershipServiceServicer):
    """Answers every user with a segment that is named after the id."""

    def GetUserSegments(  # noqa: N802  # as in the proto
        self, request: membership_pb2.GetUserSegmentsRequest, context: grpc.ServicerContext
    ) -> membership_pb2.UserSegments:
        return membership_pb2.UserSegments(user_id=request.user_id, slugs=[f"segment-of-{request.user_id}"])


@pytest.fixture(scope="module")
def address() -> Iterator[str]:
    """The address of a server of the contract."""
    server = grpc.server(ThreadPoolExecutor(2))
    membership_pb2_grpc.add_MembershipServiceServicer_to_server(Membership(), server)
    port = server.add_insecure_port("127.0.0.1:0")
    server.start()
    yield f"127.0.0.1:{port}"
    server.stop(None).wait()


@pytest.fixture
def project(tmp_path: Path) -> Path:
    return make_project(tmp_path)


@pytest.fixture
def node(project: Path) -> Path:
    return make_node(project)


def test_python(project: Path, address: str) -> None:
    lock = REPOSITORY / "requirements.lock"
    wanted = ("grpcio", "grpcio-tools", "googleapis-common-protos")
    python = make_environment(project / "venv", "--constraint", str(lock), *wanted)
    run(["sh", "-ec", block("Stubs in Python", "sh").replace("python3", str(python))], project)
    program = project / "build" / "clients" / "python" / "client.py"
    program.write_text(block("Stubs in Python", "python").replace("127.0.0.1:50051", address))
    assert run([str(python), str(program)], project) == "['segment-of-7']\n"


def test_go(project: Path, address: str) -> None:
    made = make_go(project)

    # buf must generate the same files.
    [command] = re.findall(r"`(buf generate [^`]*buf\.gen\.go[^`]*)`", PAGE)
    plugins = kept("go", "go", made_of="\n".join(GO_PLUGINS))
    run(["sh", "-ec", command.replace("build/clients/go", "by-buf")], project, plugins)
    names = sorted(path.relative_to(made) for path in made.rglob("*.go"))
    assert len(names) == 6
    assert names == sorted(path.relative_to(project / "by-buf") for path in (project / "by-buf").rglob("*.go"))

    (made / "main.go").write_text(block("Go", "go").replace("127.0.0.1:50051", address))
    assert "[segment-of-7]" in run(["env", "-C", str(made), "go", "run", "."], project)


def test_node(node: Path, address: str) -> None:
    (node / "client.js").write_text(block("Node", "js").replace("127.0.0.1:50051", address))
    assert run(["node", "client.js"], node) == "[ 'segment-of-7' ]\n"


def test_typescript(node: Path) -> None:
    binaries = node / "node_modules" / ".bin"
    run(["sh", "-ec", block("TypeScript", "sh")], node, binaries)
    made = node / "build" / "clients" / "typescript"
    assert (made / "segmentation" / "v1" / "membership_pb.ts").exists()
    options = ["--module", "nodenext", "--target", "es2022", "--strict", "--noEmit", "--skipLibCheck", "--types", ""]
    run(["tsc", *options, *map(str, made.rglob("*.ts"))], node, binaries)
