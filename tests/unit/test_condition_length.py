"""A condition's SQL is about as long as the condition, however it is nested: no form that CEL accepts multiplies it."""

from __future__ import annotations

from string import ascii_lowercase

import psutil
import pytest

from segsvc.conditions import parse_condition
from segsvc.domain.segment import CONDITION_BYTES_MAX
from segsvc.postgres.conditions.statements import _clause
from tests.conditions import NESTED, deepest

CHARACTERS_EACH = 150
"""The most characters of SQL for each byte of a condition."""


def listed(item: str, times: int) -> str:
    return f"[{','.join([item] * times)}]"


@pytest.mark.parametrize("name", NESTED)
@pytest.mark.parametrize("inmost", ["user.a", "user.a == 'x'", "user.a < user.n"])
def test_what_is_nested_as_deep_as_can_be(name: str, inmost: str) -> None:
    text = deepest(NESTED[name], inmost)
    assert len(text) > 150
    assert len(_clause(text)[0]) <= CHARACTERS_EACH * len(text)


def test_comparisons_on_both_sides() -> None:
    text = "user.a"
    while len(text) * 2 + 5 < CONDITION_BYTES_MAX:
        text = f"({text} < {text})"
    assert len(text) > 2000
    assert len(_clause(text)[0]) <= CHARACTERS_EACH * len(text)


def test_what_is_long() -> None:
    names = [*ascii_lowercase, *(a + b for a in ascii_lowercase for b in ascii_lowercase if a + b not in ("as", "in"))]

    for text in (
        " || ".join(["user.a<user.b"] * 240),
        " || ".join(["size(user.a)>user.b"] * 180),
        " || ".join(["size([user.a])>user.b"] * 160),
        " && ".join(["!(user.a==user.b)"] * 190),
        f"'x' in [{','.join(f'user.{name}' for name in names[:490])}]",
        f"user.a == [{','.join(f'user.{name}' for name in names[:490])}]",
        f"{listed('user.a', 20)} in {listed(listed('user.b', 20), 20)}",
        f"user.a in {list(range(1000))}",
        f"user.a in {list(range(600))} || user.b in {list(range(100))}",
        f"user.a in {[2**53 + n for n in range(220)]}",
        f"[user.a, {', '.join(map(str, range(400)))}] == [user.b, {', '.join(map(str, range(400)))}]",
        f"{'[' * 28}user.a{']' * 28} in [{'[' * 28}user.b{']' * 28}]",
    ):
        short = text.replace(", ", ",").replace(" || ", "||").replace(" && ", "&&")
        assert len(short) <= CONDITION_BYTES_MAX
        assert len(_clause(short)[0]) <= CHARACTERS_EACH * len(short)


def test_what_is_remembered_of_a_condition_is_small() -> None:
    """A caller of previews may send a new condition each time."""

    def read(first: int, count: int) -> None:
        for n in range(first, first + count):
            parse_condition("||".join(f"user.a{m}=={n * 1000 + m}" for m in range(200)))

    read(0, 20)
    process = psutil.Process()
    before = process.memory_info().rss
    read(20, 100)
    assert process.memory_info().rss - before < 100 * 130_000
