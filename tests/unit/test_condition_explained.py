"""Why a condition does not hold, for people: the comparisons that decided, and what the user has."""

from __future__ import annotations

import pytest

from segsvc.conditions import parse_condition

ANNA = {"a": 1, "name": "Анна", "tags": ["x", "y"], "n": 2.5, "vip": True}


@pytest.mark.parametrize(
    ("condition", "said"),
    [
        ("user.a == 1 && user.n > 3.0", "user.n > 3.0 is not true: user.n is 2.5"),
        ("user.n > 3.0 || user.name == 'Bob'",
         'user.n > 3.0 is not true: user.n is 2.5; user.name == "Bob" is not true: user.name is "Анна"'),
        ("user.age >= 18", "user.age >= 18 is not true: user.age is absent"),
        ("user.name >= 18", 'user.name >= 18 does not apply: user.name is "Анна"'),
        ("size(user.a) > 1", "size(user.a) > 1 does not apply: user.a is 1"),
        ("!user.name", '!user.name does not apply: user.name is "Анна"'),
        ("user.name", 'user.name is not true: user.name is "Анна"'),
        ("!(user.a == 1 || user.age == 3)", "!(user.a == 1) is not true: user.a is 1"),
        ("!(user.vip && 'x' in user.tags)",
         '!user.vip is not true: user.vip is true; !("x" in user.tags) is not true: user.tags is ["x", "y"]'),
        ("!(!(user.a == 2) && !(user.age == 3))",
         "user.a == 2 is not true: user.a is 1; user.age == 3 is not true: user.age is absent"),
        ("'age' in user", "has(user.age) is not true: user.age is absent"),
        ("1 == 2", "1 == 2 is not true"),
    ],
)  # fmt: skip
def test_the_comparison_that_decided(condition: str, said: str) -> None:
    assert parse_condition(condition).explain(ANNA) == said


def test_what_is_long_is_shortened() -> None:
    said = parse_condition(f"user.a in [{','.join(map(str, range(2, 900)))}]").explain(ANNA)
    assert said.startswith("user.a in [2, 3, ")
    assert said.endswith("… is not true: user.a is 1")
    assert len(said) < 250
