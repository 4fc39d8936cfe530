"""Check that this machine can run the local stack; for each missing requirement, say what to do."""

from __future__ import annotations

import dataclasses
import os
import pwd
import shutil
import sys
from collections.abc import Mapping
from pathlib import Path

import psutil

from segsvc.local.kafka import real_kafka_required, why_no_real_kafka
from segsvc.local.postgres import SYSTEM_USER
from segsvc.local.processes import LocalStackError, as_user

PYTHON_MIN = (3, 11)
DISK_BYTES_MIN = 3 << 30
MEMORY_BYTES_MIN = 3 << 30


@dataclasses.dataclass(frozen=True)
class MissingRequirement:
    """Something that the local stack needs and this machine lacks.

    Attributes:
        remedy: a command or an action.
        fatal: whether the stack cannot start without it; otherwise it starts with restrictions.
    """

    problem: str
    remedy: str
    fatal: bool = True

    def __str__(self) -> str:
        return f"{self.problem}. Remedy: {self.remedy}"


def check(home: Path, environ: Mapping[str, str] = os.environ) -> list[MissingRequirement]:
    """Check everything that the stack needs; returns what is missing.

    Args:
        home: the stack's folder; it need not exist.
    """
    return [*_python(), *_machine(home), *_system_user(), *_kafka(environ)]


def require(home: Path, environ: Mapping[str, str] = os.environ) -> list[MissingRequirement]:
    """Like ``check``; returns what is missing but not fatal.

    Raises:
        LocalStackError: something fatal is missing; the message names all of it.
    """
    findings = check(home, environ)
    if fatal := [finding for finding in findings if finding.fatal]:
        raise LocalStackError("\n".join(["this machine cannot run the local stack yet:", *(f"  - {f}" for f in fatal)]))
    return findings


def _python() -> list[MissingRequirement]:
    if sys.version_info >= PYTHON_MIN:
        return []
    wanted = ".".join(map(str, PYTHON_MIN))
    found = ".".join(map(str, sys.version_info[:3]))
    return [
        MissingRequirement(f"Python {wanted} or later is needed, this is {found}", f"apt-get install python{wanted}")
    ]


def _machine(home: Path) -> list[MissingRequirement]:
    place = home.absolute()
    while not place.exists():
        place = place.parent

    findings = []
    if "," in str(home.absolute()):
        # PostgreSQL's clients and Kafka read a comma as the separator of a list.
        findings.append(
            MissingRequirement(f"{home.absolute()} has a comma in its path", "set SEGSVC_STACK_DIR to another folder")
        )

    free = shutil.disk_usage(place).free
    if free < DISK_BYTES_MIN:
        findings.append(
            MissingRequirement(
                f"{place} has {free >> 20} MiB free, {DISK_BYTES_MIN >> 20} MiB are needed",
                "free some space, or set SEGSVC_STACK_DIR to a folder on a larger disk",
            )
        )

    memory = psutil.virtual_memory().available
    if memory < MEMORY_BYTES_MIN:
        findings.append(
            MissingRequirement(
                f"{memory >> 20} MiB of memory are available, {MEMORY_BYTES_MIN >> 20} MiB are advised",
                "close other programs, or send fewer users (USERS=50000)",
                fatal=False,
            )
        )
    return findings


def _system_user() -> list[MissingRequirement]:
    """PostgreSQL does not run as root: as root, the stack needs a user for it, or the means to make that user, and
    setpriv to switch to it."""
    if os.geteuid() != 0:
        return []
    findings = []
    try:
        as_user(SYSTEM_USER, [])
    except LocalStackError as error:
        findings.append(MissingRequirement(str(error), "apt-get install util-linux, or run as an ordinary user"))
    try:
        pwd.getpwnam(SYSTEM_USER)
    except KeyError:
        if not shutil.which("useradd"):
            problem = f"the user {SYSTEM_USER} is missing and there is no useradd"
            findings.append(MissingRequirement(problem, "apt-get install passwd, or run as an ordinary user"))
    return findings


def _kafka(environ: Mapping[str, str]) -> list[MissingRequirement]:
    if environ.get("SEGSVC_KAFKA_BOOTSTRAP_SERVERS"):
        return []
    missing = why_no_real_kafka()
    if missing is None:
        return []
    required = real_kafka_required(environ)
    effect = (
        "and SEGSVC_REQUIRE_REAL_KAFKA=1 forbids the stand-in" if required else "so an in-memory stand-in will be used"
    )
    return [
        MissingRequirement(
            f"no real Kafka can be started: {missing.split(' (')[0]}, {effect}",
            "apt-get install openjdk-17-jre-headless maven, or set SEGSVC_KAFKA_BOOTSTRAP_SERVERS to brokers of yours",
            fatal=required,
        )
    ]
