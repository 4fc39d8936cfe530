"""Projects outside this repository, in other languages, with all that they need to call the service.

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
from pathlib import Path

import pytest

from tests.environments import clean_environment
from tests.local_servers import REPOSITORY

HERE = Path(__file__).parent
TOOLS = REPOSITORY / "build" / "client-tools"
PAGE = (REPOSITORY / "docs" / "clients.md").read_text()
TIMEOUT_S = 600.0

GO_PLUGINS = re.findall(r"`go install (\S+protoc-gen\S+)`", PAGE)


def block(heading: str, language: str) -> str:
    """The one code block of this language below a heading of the page."""
    found = re.search(rf"^### {heading}\n(.*?)(?=^##|\Z)", PAGE, re.MULTILINE | re.DOTALL)
    assert found
    [code] = re.findall(rf"^```{language}\n(.*?)^```$", found[1], re.MULTILINE | re.DOTALL)
    return str(code)


def make_project(folder: Path) -> Path:
    """A project of another team: build/client-protos, buf's templates, and protoc and buf in the folder ``bin``."""
    tool = runpy.run_path(str(REPOSITORY / "tools" / "protos.py"))
    tool["write_client_protos"](folder / "build" / "client-protos")

    (folder / "protos").mkdir()
    for template in (REPOSITORY / "protos").glob("buf.gen.*.yaml"):
        shutil.copy(template, folder / "protos")

    binaries = folder / "bin"
    binaries.mkdir()
    (binaries / "protoc").write_text(f'#!/bin/sh\nexec {sys.executable} -m grpc_tools.protoc "$@"\n')
    (binaries / "protoc").chmod(0o755)
    (binaries / "buf").symlink_to(Path(sys.executable).with_name("buf"))
    return folder


def run(command: list[str], folder: Path, *path: Path) -> str:
    """Run a command with ``path`` before the PATH. Returns what it printed."""
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
    """A folder of tools kept between runs, one for each ``made_of``; skips the test if one of ``needed`` is missing."""
    for program in needed:
        if shutil.which(program) is None:
            pytest.skip(f"{program} is not installed")
    return TOOLS / f"{name}-{hashlib.sha256(made_of.encode()).hexdigest()[:12]}"


def make_go(project: Path) -> Path:
    """Generate the page's Go code in ``project``. Returns the folder of the module ``example.com/client`` with it."""
    plugins = kept("go", "go", made_of="\n".join(GO_PLUGINS))
    for plugin in GO_PLUGINS:
        if not (plugins / Path(plugin.partition("@")[0]).name).exists():
            run(["env", f"GOBIN={plugins}", "go", "install", plugin], project)
    run(["sh", "-ec", block("Go", "sh")], project, plugins)
    module = project / "build" / "clients" / "go"
    for name in ("go.mod", "go.sum"):
        shutil.copy(HERE / "go" / name, module)
    return module


def make_node(project: Path) -> Path:
    """``project`` with the npm packages of tests/clients/node."""
    lock = HERE / "node" / "package-lock.json"
    folder = kept("node", "node", "npm", made_of=lock.read_text())

    if not folder.exists():
        fresh = folder.with_name(f"{folder.name}.{os.getpid()}")
        # An attempt that failed has left it.
        shutil.rmtree(fresh, ignore_errors=True)
        fresh.mkdir(parents=True)
        for file in (lock, HERE / "node" / "package.json"):
            shutil.copy(file, fresh)
        run(["npm", "ci", "--ignore-scripts", "--no-audit", "--no-fund", "--prefix", str(fresh)], project)
        fresh.rename(folder)

    (project / "node_modules").symlink_to(folder / "node_modules")
    (project / "package.json").write_text('{"type": "module"}')
    return project
