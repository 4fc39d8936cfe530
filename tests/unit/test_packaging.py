"""setup.cfg is the project's only declaration and is complete; the lock holds all that it declares, with hashes."""

from __future__ import annotations

import ast
import configparser
import importlib.metadata
import importlib.util
import re
import sys
from collections.abc import Iterable
from pathlib import Path

import pytest
from packaging.requirements import Requirement
from packaging.utils import canonicalize_name

REPOSITORY = Path(__file__).resolve().parent.parent.parent
OURS = {"segsvc", "tasks", "grpc_api", "migrations", "segmentation"}


@pytest.fixture(scope="module")
def declared() -> configparser.ConfigParser:
    parser = configparser.ConfigParser()
    parser.read(REPOSITORY / "setup.cfg")
    return parser


def lines(text: str) -> list[str]:
    return [line for line in map(str.strip, text.splitlines()) if line and not line.startswith("#")]


def test_every_package_is_declared(declared: configparser.ConfigParser) -> None:
    roots = [REPOSITORY / name for name in ("segsvc", "tasks", "grpc_api")]
    found = {
        ".".join(file.parent.relative_to(REPOSITORY).parts)
        for root in roots
        for file in root.rglob("*.py")
        if "generated" not in file.parts
    }
    assert {*found, "migrations", "segmentation", "segmentation.v1"} == set(lines(declared["options"]["packages"]))
    for package in found:
        assert (REPOSITORY / Path(*package.split(".")) / "__init__.py").exists(), package


def test_the_lock_pins_what_is_declared_by_hash(declared: configparser.ConfigParser) -> None:
    text = (REPOSITORY / "requirements.lock").read_text()
    entries = re.findall(r"^(\S+)==(\S+) \\\n((?:    --hash=sha256:[0-9a-f]{64}(?: \\)?\n)+)", text, re.MULTILINE)
    assert len(entries) == text.count("==") > 0
    pins = {canonicalize_name(name): version for name, version, _ in entries}
    extras = declared["options.extras_require"]
    for line in lines("\n".join([declared["options"]["install_requires"], *extras.values()])):
        wanted = Requirement(line)
        assert wanted.specifier.contains(pins[canonicalize_name(wanted.name)]), line


def imported(roots: Iterable[str], *, without: str = "-") -> dict[str, str]:
    """Top-level modules that the files below ``roots`` import, lazily or not → one of the files."""
    found: dict[str, str] = {}
    for root in roots:
        for file in [REPOSITORY / root] if root.endswith(".py") else (REPOSITORY / root).rglob("*.py"):
            place = str(file.relative_to(REPOSITORY))
            if place.startswith(without):
                continue
            for node in ast.walk(ast.parse(file.read_text())):
                if isinstance(node, ast.Import):
                    names = [alias.name for alias in node.names]
                elif isinstance(node, ast.ImportFrom) and node.module and not node.level:
                    names = [node.module]
                else:
                    continue
                found.update({name.partition(".")[0]: place for name in names})

    return {name: file for name, file in found.items() if name not in sys.stdlib_module_names | OURS}


@pytest.mark.parametrize(
    ("roots", "without", "extras"),
    [
        (("segsvc", "tasks", "grpc_api", "migrations", "docker/health.py"), "segsvc/local/", ()),
        (("segsvc/local",), "-", ("local",)),
    ],
    ids=["the service", "the local stack"],
)
def test_what_is_imported_is_declared(
    declared: configparser.ConfigParser, roots: tuple[str, ...], without: str, extras: tuple[str, ...]
) -> None:
    # What setup.cfg declares, with all its dependencies.
    installed = re.findall(r"^(\S+)==", (REPOSITORY / "docker" / "requirements.lock").read_text(), re.MULTILINE)
    more = [line for name in extras for line in lines(declared["options.extras_require"][name])]
    allowed = {*map(canonicalize_name, installed), *(canonicalize_name(Requirement(line).name) for line in more)}
    packages = importlib.metadata.packages_distributions()

    modules = imported(roots, without=without)
    assert len(modules) > 3
    for module, file in modules.items():
        assert allowed & {canonicalize_name(name) for name in packages[module]}, f"{file} imports {module}"


def test_the_image_has_the_versions_that_are_tested() -> None:
    pins = [
        set(re.findall(r"^(\S+==\S+) ", (REPOSITORY / name).read_text(), re.MULTILINE))
        for name in ("docker/requirements.lock", "requirements.lock")
    ]
    assert pins[0]
    assert pins[0] < pins[1]


def test_no_package_index_is_named() -> None:
    for name in ("requirements.lock", "setup.cfg", "pyproject.toml", "Makefile", "tools/make-venv"):
        text = (REPOSITORY / name).read_text()
        assert not re.search(r"index-url [^-\\\s]|find-links [^-\\\s]|https?://", text), name


def test_pyproject_declares_nothing_of_the_project(declared: configparser.ConfigParser) -> None:
    assert "[project" not in (REPOSITORY / "pyproject.toml").read_text()
    assert lines(declared["options.entry_points"]["console_scripts"]) == ["segsvc = segsvc.cli:main"]
    assert importlib.util.find_spec("segsvc.cli") is not None
