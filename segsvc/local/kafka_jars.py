"""Apache Kafka's broker as jars, fetched once with Maven and kept for all stacks of a checkout."""

from __future__ import annotations

import os
import pwd
import shutil
import signal
import subprocess
from collections.abc import Callable
from pathlib import Path

from segsvc.local.processes import MARKER, LocalStackError, start, tail

KAFKA_ARTIFACT = ("org.apache.kafka", "kafka_2.13", "4.4.0")
SLF4J_VERSION = "1.7.36"  # of the slf4j-api that this Kafka brings
COPY_GOAL = "org.apache.maven.plugins:maven-dependency-plugin:3.8.1:copy-dependencies"
FETCH_TIMEOUT_S = 600.0

_POM = """\
<project xmlns="http://maven.apache.org/POM/4.0.0">
  <modelVersion>4.0.0</modelVersion>
  <groupId>segsvc</groupId>
  <artifactId>kafka-jars</artifactId>
  <version>1</version>
  <dependencies>
    <dependency><groupId>{0}</groupId><artifactId>{1}</artifactId><version>{2}</version></dependency>
    <!-- Without a binding, the broker's log would be empty. -->
    <dependency><groupId>org.slf4j</groupId><artifactId>slf4j-simple</artifactId><version>{3}</version></dependency>
  </dependencies>
</project>
"""


def fetch_jars(jars: Path, *, mark: Path, say: Callable[[str], object] = print) -> None:
    """Fetch the broker's jars with Maven into ``jars``, unless it holds them. It appears complete or not at all.

    Raises:
        LocalStackError: Maven failed; with the last lines of its output.
    """
    pom = _POM.format(*KAFKA_ARTIFACT, SLF4J_VERSION)
    if _holds(jars, pom):
        return

    say("Kafka: fetching the broker with Maven (43 MB, once)")
    jars.parent.mkdir(parents=True, exist_ok=True)
    unfinished = jars.with_name(f"{jars.name}.unfinished-{os.getpid()}")
    shutil.rmtree(unfinished, ignore_errors=True)
    unfinished.mkdir()

    try:
        (unfinished / "pom.xml").write_text(pom)
        log = unfinished / "maven.log"
        command = ["mvn", "-q", "-B", "--strict-checksums", "-f", str(unfinished / "pom.xml"), COPY_GOAL]
        if not _has_maven_home():
            command.append(f"-Dmaven.repo.local={unfinished / 'repository'}")
        with log.open("wb") as output:
            child = start(
                [*command, "-DincludeScope=runtime", f"-DoutputDirectory={unfinished / 'jars'}"],
                env={MARKER: str(mark.resolve())},
                output=output,
            )
            try:
                code = child.wait(timeout=FETCH_TIMEOUT_S)
            except subprocess.TimeoutExpired:
                code = -1
            finally:
                if child.poll() is None:
                    os.killpg(child.pid, signal.SIGKILL)
                    child.wait()

        if code != 0:
            raise LocalStackError(
                f"Maven could not fetch Kafka (exit code {code}). The last lines of its output:\n{tail(log)}"
            )
        # Kept beside the jars: it says which versions they are.
        (unfinished / "pom.xml").rename(unfinished / "jars" / "pom.xml")
        shutil.rmtree(jars, ignore_errors=True)
        try:
            (unfinished / "jars").rename(jars)
        except OSError:
            if not _holds(jars, pom):  # otherwise another run was faster, with the same jars
                raise
    finally:
        shutil.rmtree(unfinished, ignore_errors=True)


def _has_maven_home() -> bool:
    """Whether Maven can keep its repository in its default place: the home directory of the user database (not $HOME),
    which system users and containers with an arbitrary user id lack."""
    try:
        home = Path(pwd.getpwuid(os.geteuid()).pw_dir)
    except KeyError:
        return False
    return os.access(home / ".m2" if (home / ".m2").exists() else home, os.W_OK)


def _holds(jars: Path, pom: str) -> bool:
    """Whether ``jars`` holds the versions that this pom names, and not older ones."""
    try:
        return (jars / "pom.xml").read_text() == pom
    except FileNotFoundError:
        return False
