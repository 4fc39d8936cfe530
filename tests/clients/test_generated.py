"""docs/clients.md: its commands generate code in each language, which compiles, and its programs get an answer.

What a language needs is kept in build/client-tools; where its tools are missing the test is skipped, with the reason.
"""

from __future__ import annotations

import hashlib
import os
import re
import runpy
import shutil
import subprocess
import sys
from collections.abc import Iterator
from concurrent.futures import ThreadPoolExecutor
from pathlib import Path

import grpc
import pytest
from segmentation.v1 import membership_pb2, membership_pb2_grpc

from tests.environments import clean_environment, make_environment
from tests.local_servers import REPOSITORY

HERE = Path(__file__).parent
TOOLS = REPOSITORY / "build" / "client-tools"
PAGE = (REPOSITORY / "docs" / "clients.md").read_text()
TIMEOUT_S = 600.0

GO_PLUGINS = re.findall(r"`go install (\S+)`", PAGE)


def block(heading: str, language: str) -> str:
    """The one code block of this language below a heading of the page."""
    found = re.search(rf"^### {heading}\n(.*?)(?=^##|\Z)", PAGE, re.MULTILINE | re.DOTALL)
    assert found
    [code] = re.findall(rf"^```{language}\n(.*?)^```$", found[1], re.MULTILINE | re.DOTALL)
    return str(code)


class Membership(membership_pb2_grpc.MembershipServiceServicer):
    """Answers every user with a segment that is named after the id."""

    def GetUserSegments(  # noqa: N802  # as in the proto
        self, request: membership_pb2.GetUserSegmentsRequest, context: grpc.ServicerContext
    ) -> membership_pb2.UserSegments:
        return membership_pb2.UserSegments(user_id=request.user_id, slugs=[f"segment-of-{request.user_id}"])


@pytest.fixture(scope="module")
def address() -> Iterator[str]:
    """Where a server of the contract listens."""
    server = grpc.server(ThreadPoolExecutor(2))
    membership_pb2_grpc.add_MembershipServiceServicer_to_server(Membership(), server)
    port = server.add_insecure_port("127.0.0.1:0")
    server.start()
    yield f"127.0.0.1:{port}"
    server.stop(None).wait()


@pytest.fixture
def project(tmp_path: Path) -> Path:
    """A project of somebody else: build/client-protos, buf's templates, and protoc and buf in the folder ``bin``."""
    tool = runpy.run_path(str(REPOSITORY / "tools" / "protos.py"))
    tool["write_client_protos"](tmp_path / "build" / "client-protos")
    (tmp_path / "protos").mkdir()
    for template in (REPOSITORY / "protos").glob("buf.gen.*.yaml"):
        shutil.copy(template, tmp_path / "protos")
    binaries = tmp_path / "bin"
    binaries.mkdir()
    (binaries / "protoc").write_text(f'#!/bin/sh\nexec {sys.executable} -m grpc_tools.protoc "$@"\n')
    (binaries / "protoc").chmod(0o755)
    (binaries / "buf").symlink_to(Path(sys.executable).with_name("buf"))
    return tmp_path


def run(command: list[str], folder: Path, *path: Path) -> str:
    """Run a command with ``path`` before the PATH; its standard output."""
    places = [str(folder / "bin"), *map(str, path), os.environ.get("PATH", os.defpath)]
    done = subprocess.run(
        command,
        cwd=folder,
        env={**clean_environment(), "PATH": os.pathsep.join(places)},
        capture_output=True,
        text=True,
        check=False,
        timeout=TIMEOUT_S,
    )
    assert done.returncode == 0, f"{' '.join(command)}: {done.stdout}{done.stderr}"
    return done.stdout + done.stderr


def kept(name: str, *needed: str, made_of: str) -> Path:
    """A folder of tools that is kept between runs, by what it is made of; skips where one of ``needed`` is missing."""
    for program in needed:
        if shutil.which(program) is None:
            pytest.skip(f"{program} is not installed")
    return TOOLS / f"{name}-{hashlib.sha256(made_of.encode()).hexdigest()[:12]}"


def test_python(project: Path, address: str) -> None:
    lock = REPOSITORY / "requirements.lock"
    wanted = ("grpcio", "grpcio-tools", "googleapis-common-protos")
    python = make_environment(project / "venv", "--constraint", str(lock), *wanted)
    run(["sh", "-ec", block("Stubs in Python", "sh").replace("python3", str(python))], project)
    program = project / "build" / "clients" / "python" / "client.py"
    program.write_text(block("Stubs in Python", "python").replace("127.0.0.1:50051", address))
    assert run([str(python), str(program)], project) == "['segment-of-7']\n"


def test_go(project: Path, address: str) -> None:
    plugins = kept("go", "go", made_of="\n".join(GO_PLUGINS))
    for plugin in GO_PLUGINS:
        if not (plugins / Path(plugin.partition("@")[0]).name).exists():
            run(["env", f"GOBIN={plugins}", "go", "install", plugin], project)
    run(["sh", "-ec", block("Go", "sh")], project, plugins)
    made = project / "build" / "clients" / "go"

    # The same by buf.
    [command] = re.findall(r"`(buf generate [^`]*buf\.gen\.go[^`]*)`", PAGE)
    run(["sh", "-ec", command.replace("build/clients/go", "by-buf")], project, plugins)
    names = sorted(path.relative_to(made) for path in made.rglob("*.go"))
    assert len(names) == 6
    assert names == sorted(path.relative_to(project / "by-buf") for path in (project / "by-buf").rglob("*.go"))

    for name in ("go.mod", "go.sum"):
        shutil.copy(HERE / "go" / name, made)
    (made / "main.go").write_text(block("Go", "go").replace("127.0.0.1:50051", address))
    assert "[segment-of-7]" in run(["env", "-C", str(made), "go", "run", "."], project)


@pytest.fixture
def node(project: Path) -> Path:
    """``project`` with the npm packages of tests/clients/node."""
    lock = HERE / "node" / "package-lock.json"
    folder = kept("node", "node", "npm", made_of=lock.read_text())
    if not folder.exists():
        fresh = folder.with_name(f"{folder.name}.{os.getpid()}")
        fresh.mkdir(parents=True)
        for file in (lock, HERE / "node" / "package.json"):
            shutil.copy(file, fresh)
        run(["npm", "ci", "--ignore-scripts", "--no-audit", "--no-fund", "--prefix", str(fresh)], project)
        fresh.rename(folder)
    (project / "node_modules").symlink_to(folder / "node_modules")
    (project / "package.json").write_text('{"type": "module"}')
    return project


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
