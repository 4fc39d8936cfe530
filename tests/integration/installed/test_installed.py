"""The image works with its lock alone, and the built wheel works with its own requirements alone.

A developer's environment has many more packages, so an undeclared import is not noticed there. Every command is started
without servers to connect to, and must run until it reports that.
"""

from __future__ import annotations

import contextlib
import json
import os
import re
import signal
import tarfile
import zipfile
from collections.abc import Iterable, Iterator, Sequence
from concurrent.futures import ThreadPoolExecutor
from pathlib import Path
from typing import Any

import pytest
from typer.main import get_command

from segsvc.cli.app import app
from segsvc.local.processes import free_ports, wait_until
from tests.environments import Environment, build, copy_of_what_git_knows, make_environment, share_bytecode
from tests.local_servers import REPOSITORY

TIMEOUT_S = 120.0

# The message of each command when no server answers.
REFUSED = "(?i)refused|cannot be reached"
NEEDS_EXTRA = r"the local stack needs packages .*confluent-kafka.*psutil.*pip install 'segsvc\[local\]'"
END = {"migrate": REFUSED, "check": REFUSED, "doctor": REFUSED, "demo --running": REFUSED}
# These commands run until they are stopped.
RUN = {
    "serve": "listening",
    "worker --queue operations": "(?i)cannot connect to redis.*refused",
    "beat": "(?i)connection error.*refused",
    "bridge": "(?i)refused",
    "flower": "(?i)failed to capture events.*refused",
}
# These commands need no process of their own.
LOCAL_STACK = ("up", "down", "status", "demo")
SAMPLES = {
    "slug": "a", "slugs": "a", "user_id": "1", "percent": "10", "name": "operations/create-1", "letter_id": "1-1",
    "shard": "0", "to": "postgresql+psycopg2://u@127.0.0.1:1/x", "fence": "postgresql+psycopg2://u@127.0.0.1:1/x",
}  # fmt: skip
"""A value for each argument or option that a command requires."""
ONE_OF = {"segments edit": ["--name", "x"]}
"""Options of which a command requires one; commands with an option --all get it."""

MISHAP = re.compile(r"Traceback|ImportError|ModuleNotFoundError|No module named")


def leaves(command: Any, path: tuple[str, ...] = ()) -> Iterator[tuple[tuple[str, ...], Any]]:
    """Every command below this command that has no commands itself."""
    if hasattr(command, "commands"):
        for name, below in command.commands.items():
            yield from leaves(below, (*path, name))
    else:
        yield path, command


def administration() -> list[list[str]]:
    """The commands in groups, each with a value for everything that it requires."""
    made = []

    for path, command in leaves(get_command(app)):
        if len(path) > 1:
            words = [*path, *ONE_OF.get(" ".join(path), [])]
            for parameter in command.params:
                if "--all" in parameter.opts:
                    words.append("--all")
                if parameter.required:
                    option = parameter.opts[0]
                    words += [option] if option.startswith("--") else []
                    words.append(SAMPLES[parameter.name])
            made.append(words)

    return made


@pytest.fixture(scope="module")
def variables(tmp_path_factory: pytest.TempPathFactory) -> dict[str, str]:
    """Settings with addresses at which no server answers."""
    folder = tmp_path_factory.mktemp("nothing")

    # Nothing listens on port 1, and nothing is given that port.
    nowhere = "127.0.0.1:1"

    return {
        "SEGSVC_CLUSTER": "nowhere",
        "SEGSVC_CATALOG_DSN": f"postgresql+psycopg2://u@{nowhere}/catalog",
        "SEGSVC_SHARD_DSNS": f"postgresql+psycopg2://u@{nowhere}/shard",
        "SEGSVC_CACHE_URL": f"redis://{nowhere}/0",
        "SEGSVC_BROKER_URL": f"redis://{nowhere}/0",
        "SEGSVC_KAFKA_BOOTSTRAP_SERVERS": nowhere,
        "SEGSVC_FLOWER_PASSWORD": "x",
        # Another stack on this machine may have the usual ports.
        "SEGSVC_GRPC_ADDRESS": nowhere,
        "SEGSVC_METRICS_ADDRESS": "",
        "SEGSVC_STACK_DIR": str(folder / "stack"),
        "SEGSVC_FAILPOINT_DIR": str(folder),
        "SEGSVC_ENV_FILE": "",
        "SEGSVC_LOG_LEVEL": "INFO",
    }


@pytest.fixture(scope="module")
def image(tmp_path_factory: pytest.TempPathFactory, variables: dict[str, str]) -> Environment:
    """The contents of docker/Dockerfile's image: the packages of its lock, and the folders that it copies."""
    folder = tmp_path_factory.mktemp("image")
    lock = REPOSITORY / "docker" / "requirements.lock"
    python = make_environment(folder / "venv", "--no-deps", "--require-hashes", "--requirement", str(lock))

    dockerfile = (REPOSITORY / "docker" / "Dockerfile").read_text()
    known = copy_of_what_git_knows(folder / "checkout")
    copied = re.findall(r"^COPY (?!--)(\S+) (\S+)$", dockerfile, re.MULTILINE)

    for source, target in copied:
        if not target.startswith("/"):
            (folder / "app" / target).parent.mkdir(parents=True, exist_ok=True)
            (known / source).rename(folder / "app" / target)

    [path] = re.findall(r"PYTHONPATH=(\S+)", dockerfile)
    made = Environment(python, folder / "app", {**variables, "PYTHONPATH": path.replace("/app", str(folder / "app"))})
    import_everything(made, folder)
    return made


@pytest.fixture(scope="module")
def distributions(tmp_path_factory: pytest.TempPathFactory) -> tuple[Path, Path]:
    """A source distribution, and the wheel that is built from it."""
    source = copy_of_what_git_knows(tmp_path_factory.mktemp("source"))
    return build(tmp_path_factory.mktemp("distributions"), source)


@pytest.fixture(scope="module")
def installed(
    tmp_path_factory: pytest.TempPathFactory,
    distributions: tuple[Path, Path],
    variables: dict[str, str],
    image: Environment,
) -> Environment:
    """The wheel with the packages that it requires, in the versions of the lock."""
    folder = tmp_path_factory.mktemp("installed")
    constraint = REPOSITORY / "docker" / "requirements.lock"
    python = make_environment(folder / "venv", "--constraint", str(constraint), str(distributions[1]))
    share_bytecode(image.python, python)
    made = Environment(python, folder, variables)
    import_everything(made, folder)
    return made


def outcome(environment: Environment, command: str, ports: Sequence[int], folder: Path) -> str:
    """Run a command until it prints the expected message or ends. Returns the error, or '' if there is none."""
    place = folder / re.sub(r"\W+", "-", command)
    place.mkdir()
    output = place / "output"
    process = environment.start(
        *("-m", "segsvc", *command.split()),
        output=output,
        SEGSVC_GRPC_ADDRESS=f"127.0.0.1:{ports[0]}",
        SEGSVC_FLOWER_ADDRESS=f"127.0.0.1:{ports[1]}",
        TMPDIR=str(place),
    )

    def said() -> str:
        return output.read_text(errors="replace")

    pattern = END.get(command) or RUN[command]
    ends = command in END

    try:
        wait_until(
            lambda: process.poll() is not None or (not ends and re.search(pattern, said()) is not None),
            timeout_s=TIMEOUT_S,
        )
        code = process.poll()
    finally:
        with contextlib.suppress(ProcessLookupError):
            os.killpg(process.pid, signal.SIGKILL)
        process.wait()

    as_expected = (code in (0, 1)) if ends else code is None
    if as_expected and re.search(pattern, said()) and not MISHAP.search(said()):
        return ""
    return f"segsvc {command}: exit code {code}, said:\n{said()[-3000:]}\n"


def outcomes(environment: Environment, commands: Iterable[str], folder: Path) -> str:
    """The errors of these commands, which run side by side, because most wait for one refusal after the other."""
    commands = list(commands)
    # All ports are drawn at once: otherwise a port that a command has not bound yet could be given to another command.
    ports = free_ports(2 * len(commands))
    pairs = list(zip(ports[::2], ports[1::2], strict=True))
    with ThreadPoolExecutor(8) as threads:
        return "".join(threads.map(lambda c, pair: outcome(environment, c, pair, folder), commands, pairs))


def packages(environment: Environment) -> set[str]:
    """Names of the packages that are installed in the environment."""
    found = next(environment.python.parent.parent.glob("lib/*/site-packages")).glob("*.dist-info")
    return {folder.name.partition("-")[0].lower() for folder in found}


def import_everything(environment: Environment, folder: Path) -> None:
    """Import all our modules except the local stack's. This also compiles the modules that the commands need."""
    script = Path(__file__).with_name("every_import.py")
    process = environment.start(str(script), output=folder / "imports")
    code = process.wait(timeout=TIMEOUT_S)
    assert (code, (folder / "imports").read_text()) == (0, "")


def test_every_command_is_started_here() -> None:
    named = {command.split()[0] for command in (*END, *RUN, *LOCAL_STACK, "config")}
    assert named == {path[0] for path, _ in leaves(get_command(app)) if len(path) == 1}


def test_the_image_runs_what_it_is_for(image: Environment, tmp_path: Path) -> None:
    assert outcomes(image, ("demo --running", *RUN), tmp_path) == ""
    # No server answers, so every health check fails.
    checks = [image.start("docker/health.py", what, output=tmp_path / what) for what in ("front", "1")]
    assert [check.wait(timeout=TIMEOUT_S) for check in checks] == [1] * len(checks)
    for what in ("front", "1"):
        assert not MISHAP.search((tmp_path / what).read_text())


def test_the_image_has_what_the_wheel_brings(installed: Environment, image: Environment) -> None:
    # The lock has a few more packages, which only an older Python needs.
    assert packages(installed) - packages(image) == {"segsvc"}


def test_the_wheel_runs_every_command(installed: Environment, tmp_path: Path) -> None:
    script = Path(__file__).with_name("administration.py")
    commands = administration()
    output = tmp_path / "administration"
    grouped = installed.start(
        *(
            str(script),
            json.dumps([*commands, *([word] for word in LOCAL_STACK), *(each.split() for each in END), ["config"]]),
        ),
        output=output,
        SEGSVC_GRPC_ADDRESS="127.0.0.1:1",
    )
    # Of the commands that the image runs as well, these are enough to show that the wheel is complete.
    assert outcomes(installed, ("serve", "worker --queue operations"), tmp_path) == ""

    assert grouped.wait(timeout=TIMEOUT_S) == 0
    text = output.read_text()
    assert not MISHAP.search(text), text
    [*ended, last] = re.split(r"^(.+): exit (\S+)\n", text, flags=re.MULTILINE)
    assert last == ""
    said = {command: (code, shown) for shown, command, code in zip(*[iter(ended)] * 3, strict=True)}

    assert {said[" ".join(words)][0] for words in commands} == {"1"}, text
    for command, pattern in END.items():
        code, shown = said[command]
        assert code in ("0", "1")
        assert re.search(pattern, shown), (command, shown)
    for word in LOCAL_STACK:
        code, shown = said[word]
        assert code == "1"
        assert re.search(NEEDS_EXTRA, shown), (word, shown)
    assert said["config"][0] == "0"


def test_the_distributions_hold_all_that_is_needed_at_run_time(distributions: tuple[Path, Path]) -> None:
    sdist, wheel = distributions
    files = set(zipfile.ZipFile(wheel).namelist())

    for root in ("segsvc", "tasks", "grpc_api", "migrations"):
        for path in (REPOSITORY / root).rglob("*"):
            name = path.relative_to(REPOSITORY).as_posix().removeprefix("grpc_api/generated/")
            if path.is_file() and path.suffix not in (".pyc", ".pyi"):
                assert name in files, name

    with tarfile.open(sdist) as archive:
        names = {member.name.partition("/")[2] for member in archive}
    assert names >= {
        "setup.cfg",
        "pyproject.toml",
        "README.md",
        "segsvc/__main__.py",
        "migrations/catalog/script.py.mako",
    }
