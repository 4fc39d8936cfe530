"""setup.cfg is the only declaration, is complete, and the lock holds all of it with hashes."""

from __future__ import annotations

import configparser
import importlib.util
import re
from pathlib import Path

import pytest
from packaging.requirements import Requirement
from packaging.utils import canonicalize_name

REPOSITORY = Path(__file__).resolve().parent.parent.parent


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


def test_no_package_index_is_named() -> None:
    for name in ("requirements.lock", "setup.cfg", "pyproject.toml", "Makefile", "tools/make-venv"):
        text = (REPOSITORY / name).read_text()
        assert not re.search(r"index-url [^-\\\s]|find-links [^-\\\s]|https?://", text), name


def test_pyproject_declares_nothing_of_the_project(declared: configparser.ConfigParser) -> None:
    assert "[project" not in (REPOSITORY / "pyproject.toml").read_text()
    assert lines(declared["options.entry_points"]["console_scripts"]) == ["segsvc = segsvc.cli:main"]
    assert importlib.util.find_spec("segsvc.cli") is not None
