"""The tests follow docs/extending.md step by step: they apply its messages, and make its changes to a project copy."""

from __future__ import annotations

import json
import os
import re
import shutil
import subprocess
import sys
from collections.abc import Iterator, Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import pytest

from segsvc.local.postgres import PostgresServer
from segsvc.local.redis import RedisServer
from tests.installation import Installation, new_installation

REPOSITORY = Path(__file__).resolve().parent.parent.parent
PAGE = REPOSITORY / "docs" / "extending.md"
SCRIPT = Path(__file__).with_name("extending_script.py")
USER = 4711
EVERYBODY = 7
"""A segment rolled out to 100 %."""


@dataclass(frozen=True)
class Block:
    """A fenced block of the page: ```` ```language about ````."""

    section: str
    language: str
    about: str
    text: str


def blocks_of(page: str) -> list[Block]:
    pattern = re.compile(
        r"^## (?P<section>[^\n]+)$|^```(?P<language>\w+)(?: (?P<about>[^\n]+))?\n(?P<text>.*?)^```$",
        re.MULTILINE | re.DOTALL,
    )

    blocks: list[Block] = []
    section = ""

    for match in pattern.finditer(page):
        if match["section"]:
            section = match["section"]
        else:
            blocks.append(Block(section, match["language"], match["about"] or "", match["text"]))

    return blocks


@pytest.fixture(scope="module")
def page() -> list[Block]:
    return blocks_of(PAGE.read_text())


def messages(page: Sequence[Block], section: str) -> list[tuple[str, str, bool]]:
    """Messages of a section in their order, as (topic, message, refused)."""
    return [
        (block.about.split()[0], block.text, block.about.endswith(" refused"))
        for block in page
        if block.section == section and block.language == "json"
    ]


def changed(text: str, diff: str) -> str:
    """Make the changes of a block. Each hunk's old lines must be in the file exactly once."""
    lines = text.splitlines()
    for hunk in re.split(r"^@@\n", diff, flags=re.MULTILINE):
        old = [line[1:] for line in hunk.splitlines() if not line.startswith("+")]
        new = [line[1:] for line in hunk.splitlines() if not line.startswith("-")]

        places = [at for at in range(len(lines)) if lines[at : at + len(old)] == old]
        assert len(places) == 1, f"docs/extending.md wants to change what is not there once: {old}"
        lines[places[0] : places[0] + len(old)] = new

    return "".join(f"{line}\n" for line in lines)


@pytest.fixture
def installation(pg_server: PostgresServer, cache_server: RedisServer) -> Iterator[Installation]:
    with new_installation(pg_server, shards=2, cache_url=cache_server.url) as made:
        for shard in range(2):
            made.execute(
                shard,
                "INSERT INTO segments (id, slug, salt, rule_threshold, rule_condition, rule_policy) "
                "VALUES (:id, 'everybody', 1, 100000, '', 1)",
                id=EVERYBODY,
            )
        yield made


def apply(installation: Installation, sent: Sequence[tuple[str, str]], project: Path = REPOSITORY) -> dict[str, Any]:
    """Apply messages with the code of a project. Returns the script's report."""
    settings = installation.settings.model_dump(
        mode="json", include={"catalog_dsn", "shard_dsns", "cache_url", "cluster"}
    )

    job = json.dumps({"settings": settings, "messages": sent})
    path = os.pathsep.join(map(str, (project, *sys.path)))

    run = subprocess.run(
        [sys.executable, str(SCRIPT)],
        input=job,
        env={**os.environ, "PYTHONPATH": path},
        capture_output=True,
        text=True,
        timeout=60,
        check=False,
    )

    assert run.returncode == 0, run.stderr

    told: dict[str, Any] = json.loads(run.stdout)
    assert Path(told["code"]).is_relative_to(project)
    return told


def test_an_attribute_is_added_by_sending_it(page: list[Block], installation: Installation) -> None:
    steps = messages(page, "Add an attribute")
    assert [topic for topic, _, _ in steps] == ["create-user", "update-user", "update-user", "update-user"]
    outcomes = apply(installation, [(topic, text) for topic, text, _ in steps])["outcomes"]
    assert outcomes[:3] == [
        {"applied": 1, "version": 0, "attributes": {"country": "DE", "loyalty_tier": "gold"}},
        {"applied": 1, "version": 1, "attributes": {"country": "DE", "loyalty_tier": "platinum"}},
        {"applied": 1, "version": 2, "attributes": {"country": "DE"}},
    ]
    assert outcomes[3]["refused"].startswith("attributes.loyalty_tier[1]: must be a string")
    assert [refused for _, _, refused in steps] == [False, False, False, True]


def test_an_event_type_is_added_by_the_changes_of_the_page(
    page: list[Block], installation: Installation, tmp_path: Path
) -> None:
    ignored = shutil.ignore_patterns("__pycache__")
    shutil.copytree(REPOSITORY / "segsvc", tmp_path / "segsvc", ignore=ignored)
    shutil.copytree(REPOSITORY / "migrations", tmp_path / "migrations", ignore=ignored)
    diffs = [block for block in page if block.section == "Add an event type" and block.language == "diff"]
    assert diffs
    for block in diffs:
        file = tmp_path / block.about
        file.write_text(changed(file.read_text(), block.text))

    (topic, good, _), (_, bad, refused) = messages(page, "Add an event type")
    assert refused
    created = json.dumps({"user_id": USER, "attributes": {"country": "DE", "age": 41}})
    overtaken = json.dumps({"user_id": USER, "version": 4, "attributes": {"country": "AT"}})
    sent = [("create-user", created), (topic, good), (topic, good), ("update-user", overtaken), (topic, bad)]
    told = apply(installation, sent, tmp_path)

    anonymous = {"version": 5, "attributes": {}}
    assert told["outcomes"] == [
        {"applied": 1, "version": 0, "attributes": {"country": "DE", "age": 41}},
        {"applied": 1, **anonymous},
        {"applied": 0, **anonymous},
        {"applied": 0, **anonymous},
        {"refused": "version: is required"},
    ]
    assert installation.members(EVERYBODY) == {USER}, "the user stays, and stays in segments"
    assert topic in told["topics"]
    assert {topic, f"{topic}.dlq"} <= set(told["local_topics"])


@pytest.mark.parametrize("text", ["a = 1\n", "b = 2\nb = 2\n"])
def test_a_change_that_does_not_fit_is_noticed(text: str) -> None:
    with pytest.raises(AssertionError, match="what is not there once"):
        changed(text, " b = 2\n+c = 3\n")
