"""Revisions of a schema are one chain, numbered from 1: two with one number, made side by side, are found here."""

from __future__ import annotations

import re
from pathlib import Path

import pytest

VERSIONS = Path(__file__).parents[2] / "migrations"
_LINE = re.compile(r'^(revision|down_revision) = (?:"(\w+)"|None)$', re.MULTILINE)


@pytest.mark.parametrize("schema", ["catalog", "shard"])
def test_the_revisions_of_a_schema_are_one_chain(schema: str) -> None:
    files = sorted((VERSIONS / schema / "versions").glob("*.py"))
    said = [dict(_LINE.findall(file.read_text())) for file in files]
    numbers = [f"{schema[0]}{number:04}" for number in range(1, len(files) + 1)]
    assert [lines["revision"] for lines in said] == numbers, "give the newer one the next number"
    assert [lines["down_revision"] for lines in said] == ["", *numbers[:-1]]
    assert all(file.name.startswith(f"{number}_") for file, number in zip(files, numbers, strict=True))
