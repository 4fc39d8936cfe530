"""A condition that would become gigabytes of SQL is refused before it does; those that people write never are."""

from __future__ import annotations

from collections.abc import Callable
from string import ascii_lowercase

import psutil
import pytest

from segsvc.conditions import parse_condition
from segsvc.conditions.weight import WEIGHT_MAX, weight
from segsvc.domain.errors import Reason, ServiceError
from segsvc.domain.segment import CONDITION_BYTES_MAX
from segsvc.postgres.condition_statements import _clause

CHARACTERS_EACH = 150
"""Of SQL, for each unit of weight, at most."""

NESTED: dict[str, Callable[[str], str]] = {
    "equal": lambda inner: f"({inner} == user.b)",
    "unequal": lambda inner: f"(!{inner} != user.b)",
    "less": lambda inner: f"({inner} < user.b)",
    "less than a literal": lambda inner: f"({inner} < true)",
    "in": lambda inner: f"({inner} in [user.b])",
    "in lists": lambda inner: f"([{inner}] in [[user.b], [user.c, 1]])",
    "in a list beside literals": lambda inner: f"({inner} in [user.b, 1, 9007199254740993, 'x'])",
    "in an attribute": lambda inner: f"({inner} in user.b)",
    "and": lambda inner: f"({inner} && user.b)",
    "equal lists": lambda inner: f"([{inner}, user.c] == [user.b, 1])",
    "list": lambda inner: f"([{inner}] == user.b)",
    "size": lambda inner: f"(size([{inner}]) == user.b)",
}


@pytest.mark.parametrize("name", NESTED)
@pytest.mark.parametrize("inmost", ["user.a", "user.a == 'x'", "user.a == user.b"])
def test_the_weight_tells_how_long_the_sql_is(name: str, inmost: str) -> None:
    text = inmost
    for _ in range(4):
        text = NESTED[name](text)
        try:
            condition = parse_condition(text)
        except ServiceError:
            break  # as it should, see below; or of types that CEL does not compare
        assert len(_clause(text)[0]) <= CHARACTERS_EACH * weight(condition.root) + 200


@pytest.mark.parametrize("name", sorted({*NESTED} - {"equal", "unequal", "and"}))
def test_what_multiplies_is_refused(name: str) -> None:
    deep = "user.a"
    for _ in range(16 if name == "in an attribute" else 8):
        deep = NESTED[name](deep)
    with pytest.raises(ServiceError) as refused:
        parse_condition(deep)
    assert refused.value.reason is Reason.CONDITION_INVALID
    assert "within one another" in refused.value.message


@pytest.mark.parametrize("name", ["equal", "and"])
def test_what_does_not_multiply_may_be_as_deep_as_any(name: str) -> None:
    text = "user.a == user.b"
    for _ in range(25):
        text = NESTED[name](text)
    parse_condition(text)
    assert len(_clause(text)[0]) < 10_000


def test_what_is_remembered_of_a_condition_is_small() -> None:
    """A caller of previews may send other conditions all the time."""

    def read(first: int, count: int) -> None:
        for n in range(first, first + count):
            parse_condition("||".join(f"user.a{m}=={n * 1000 + m}" for m in range(200)))

    read(0, 20)
    process = psutil.Process()
    before = process.memory_info().rss
    read(20, 100)
    assert process.memory_info().rss - before < 100 * 130_000


def test_what_is_long_and_not_nested_is_taken() -> None:
    names = [*ascii_lowercase, *(a + b for a in ascii_lowercase for b in ascii_lowercase if a + b not in ("as", "in"))]
    for text in (
        " || ".join(["user.a<user.b"] * 240),
        " && ".join(["!(user.a==user.b)"] * 190),
        f"'x' in [{','.join(f'user.{name}' for name in names[:490])}]",
        f"user.a == [{','.join(f'user.{name}' for name in names[:490])}]",
        f"user.a in {list(range(1000))}",
        f"user.a in {list(range(600))} || user.b in {list(range(100))}",
        f"user.a in {[2**53 + n for n in range(220)]}",
        f"[user.a, {', '.join(map(str, range(400)))}] == [user.b, {', '.join(map(str, range(400)))}]",
    ):
        short = text.replace(", ", ",").replace(" || ", "||").replace(" && ", "&&")
        assert len(short) <= CONDITION_BYTES_MAX
        assert weight(parse_condition(short).root) <= WEIGHT_MAX
        assert len(_clause(short)[0]) <= CHARACTERS_EACH * WEIGHT_MAX
