"""What conditions may say about versions and times, and the warnings about strings that look like them."""

from __future__ import annotations

import pytest

from segsvc.conditions import parse_condition, times
from segsvc.conditions.traps import WARNINGS_MAX, warnings
from segsvc.domain.errors import ServiceError


@pytest.mark.parametrize(
    ("condition", "said"),
    [
        ("user.app < '10.0'", "for versions write semver"),
        ("'v2.10.0-rc.1' >= user.app || user.a == 1", "for versions write semver"),
        ("!(user.since <= '2026-01-31')", "for times write timestamp"),
        ("user.since > '2026-01-31T00:00:00+03:00'", "for times write timestamp"),
        ("timestamp(user.since) < timestamp('2026-01-31')", 'timestamp("2026-01-31") is no time'),
        ("semver(user.app).isLessThan(semver('2.10'))", 'semver("2.10") is no version'),
    ],
)
def test_a_trap_is_named(condition: str, said: str) -> None:
    [warning] = warnings(parse_condition(condition).root)
    assert said in warning


@pytest.mark.parametrize(
    "condition",
    [
        "user.app == '10.0'",
        "user.name < 'm' && user.age >= 18 && user.score < 1.5",
        "timestamp(user.since) < timestamp('2026-01-31T00:00:00Z')",
        "semver(user.app).compareTo(semver('2.10.0')) < 0",
        "user.app.startsWith('10.') || user.app in ['1.0', '2.0']",
    ],
)
def test_what_is_meant_is_not_warned_about(condition: str) -> None:
    assert warnings(parse_condition(condition).root) == []


def test_warnings_are_bounded() -> None:
    condition = " || ".join(f"user.a < '{number}.{'0' * 100}'" for number in range(30))
    found = warnings(parse_condition(condition).root)
    assert len(found) == WARNINGS_MAX
    assert all(len(warning) < 400 for warning in found)


@pytest.mark.parametrize(
    ("condition", "column", "said"),
    [
        ("semver(user.a) == semver('1.0.0')", 7, "only compared, by isLessThan, isGreaterThan or compareTo"),
        ("user.a.isLessThan(semver('1.0.0'))", 5, "write semver(user.name)"),
        ("timestamp(1) == timestamp(user.a)", 11, "timestamp takes a string"),
        ("timestamp(timestamp(user.a)) == timestamp(user.a)", 20, "timestamp takes a string"),
        ("semver(user.a).major() == 1", 21, "undeclared reference to 'major'"),
        ("timestamp(user.a).getFullYear() == 2026", 30, "getFullYear is not allowed"),
        ("user['a-b'] == 1", 6, "names of attributes match"),
        ("user[user.a] == 1", 5, 'only user["name"] has an index'),
        ("user.tags[0] == 'a'", 10, 'only user["name"] has an index'),
        ("user.a.upperAscii() == 'A'", 18, "upperAscii is not allowed"),
        ("user.n.lowerAscii() == 1", 21, "no matching overload for '_==_'"),
    ],
)
def test_what_is_not_allowed_is_refused_with_its_column(condition: str, column: int, said: str) -> None:
    with pytest.raises(ServiceError, match=f"line 1, column {column}: ") as refused:
        parse_condition(condition)
    assert said in refused.value.message


def test_another_way_to_write_an_attribute() -> None:
    assert parse_condition('user["a"] == 1').root == parse_condition("user.a == 1").root


@pytest.mark.parametrize(
    ("text", "seconds"),
    [
        ("1970-01-01T00:00:00Z", 0),
        ("2024-02-29T12:00:00+05:30", 1_709_188_200),
        ("0001-01-01T00:00:00Z", times.FIRST_S),
    ],
)
def test_times_are_counted_from_1970(text: str, seconds: int) -> None:
    assert times.ticks_of(text) == seconds * times.TICKS
