"""Environments with a lock's packages, or with a wheel and its dependencies, and no packages of the developers."""

from __future__ import annotations

import ast
import os
import shutil
import subprocess
import sys
from collections.abc import Mapping
from dataclasses import dataclass, field
from pathlib import Path

from tests.local_servers import REPOSITORY

INSTALL_TIMEOUT_S = 900.0
"""Packages may have to be fetched first."""

_OPTIONS = {
    "index-url": "--index-url",
    "extra-index-url": "--extra-index-url",
    "find-links": "--find-links",
    "trusted-host": "--allow-insecure-host",
}
"""pip's setting → uv's option. A setting may hold several values."""


@dataclass(frozen=True)
class Environment:
    """A Python with packages of its own. ``variables`` are set for what runs in it; ``folder``: its working folder."""

    python: Path
    folder: Path
    variables: Mapping[str, str] = field(default_factory=dict)

    def start(self, *arguments: str, output: Path, **variables: str) -> subprocess.Popen[bytes]:
        """Start its Python; both outputs go to the file ``output``."""
        with output.open("wb") as file:
            return subprocess.Popen(
                [str(self.python), *arguments],
                cwd=self.folder,
                env={**clean_environment(), **self.variables, **variables},
                stdin=subprocess.DEVNULL,
                stdout=file,
                stderr=subprocess.STDOUT,
                start_new_session=True,
            )


def clean_environment() -> dict[str, str]:
    """This process's environment without the variables that lead to our settings or our packages.

    Bytecode is always written, into the new environment: without it, each process would compile all packages again.
    """
    return {
        name: value
        for name, value in os.environ.items()
        if not name.startswith("SEGSVC_")
        and name not in ("PYTHONPATH", "PYTHONHOME", "VIRTUAL_ENV", "PYTHONDONTWRITEBYTECODE")
    }


def make_environment(folder: Path, *what: str) -> Path:
    """Make a virtual environment and install ``what`` (arguments of ``uv pip install``) into it. Returns its Python."""
    python = folder / "bin" / "python"
    _uv("venv", "--python", sys.executable, str(folder))
    _uv("pip", "install", "--python", str(python), *_where_pip_finds_packages(), *what)
    return python


def share_bytecode(made: Path, new: Path) -> None:
    """Copy the compiled modules of the environment of the Python ``made`` into that of ``new``, for equal files.

    uv links the files of a package from its cache, so both environments have the same ones. To compile them all takes
    longer than to install them. Python itself compiles again what does not fit.
    """
    source, target = (next(python.parent.parent.glob("lib/*/site-packages")) for python in (made, new))
    for compiled in source.rglob("*.pyc"):
        place = target / compiled.relative_to(source)
        if place.parent.parent.is_dir() and not place.exists():
            place.parent.mkdir(exist_ok=True)
            os.link(compiled, place)


def build(folder: Path, source: Path) -> tuple[Path, Path]:
    """Build a source distribution and from it a wheel, offline, with the installed setuptools. Returns both files."""
    backend = "import sys, setuptools.build_meta as b; print(getattr(b, 'build_' + sys.argv[1])(sys.argv[2]))"

    def built(kind: str, where: Path) -> Path:
        command = [sys.executable, "-W", "ignore", "-c", backend, kind, str(folder)]
        name = _run(command, cwd=where).splitlines()[-1]
        return folder / name

    sdist = built("sdist", source)
    unpacked = folder / "unpacked"
    shutil.unpack_archive(sdist, unpacked, filter="data")
    [root] = unpacked.iterdir()
    return sdist, built("wheel", root)


def copy_of_what_git_knows(target: Path) -> Path:
    """Copy the checkout's files as they are now, without files unknown to git (above all the folder ``build``)."""
    names = _run(["git", "ls-files", "-z", "--cached", "--others", "--exclude-standard"], cwd=REPOSITORY)
    for name in filter(None, names.split("\0")):
        if (REPOSITORY / name).is_file():
            (target / name).parent.mkdir(parents=True, exist_ok=True)
            shutil.copy(REPOSITORY / name, target / name)
    return target


def _where_pip_finds_packages() -> list[str]:
    """uv's options for the index that pip is set up with: uv does not read pip's configuration."""
    # pip itself may belong to another environment (tools/make-venv).
    for python in (sys.executable, str(Path(sys.base_prefix) / "bin" / "python3")):
        done = subprocess.run([python, "-m", "pip", "config", "list"], capture_output=True, text=True, check=False)
        if done.returncode == 0:
            break
    else:
        return []

    found: dict[str, str] = {}
    # The environment's settings come last, because they win.
    for line in sorted(done.stdout.splitlines(), key=lambda line: line.startswith(":env:")):
        name, _, value = line.partition("=")
        found[name.rpartition(".")[2]] = str(ast.literal_eval(value))

    options = ["--no-index"] if found.get("no-index", "") in ("1", "true", "True", "yes") else []
    for setting, option in _OPTIONS.items():
        for value in found.get(setting, "").split():
            options += [option, value]
    return options


def _uv(*arguments: str) -> None:
    _run([str(Path(sys.executable).with_name("uv")), "--no-config", "--quiet", *arguments], cwd=REPOSITORY)


def _run(command: list[str], *, cwd: Path) -> str:
    done = subprocess.run(
        command,
        cwd=cwd,
        env=clean_environment(),
        capture_output=True,
        text=True,
        check=False,
        timeout=INSTALL_TIMEOUT_S,
    )

    assert done.returncode == 0, f"{' '.join(command)}: {done.stdout}{done.stderr}"
    return done.stdout
