"""Conditions and users for Hypothesis: the whole subset, with right and wrong types, around every edge that we know."""

from __future__ import annotations

import json
from collections.abc import Callable
from typing import Any

import hypothesis.strategies as st

from segsvc.conditions import parse_condition, tree
from segsvc.domain.errors import ServiceError
from segsvc.domain.events import CREATE_TOPIC, CreateUser, parse

NAMES = ("a", "b", "tags", "n", "flag")

strings = st.one_of(
    st.sampled_from(
        ["", "a", "ab", "b", "RU", "ru", "é", "e\u0301", "😀", "\uffff", "%", "_", "a%", "\\", "\\\\", "'", '"', "a\nb",
         "{}", "null", "true", "1", "a_b", "\u007f", "$1", ":x", "\u2028"]
    ),
    st.text(st.characters(codec="utf-8", exclude_characters="\0"), max_size=5),
)  # fmt: skip
_offsets = st.sampled_from(
    [
        "Z",
        "z",
        "+00:00",
        "-00:00",
        "+05:30",
        "-23:59",
        "+05",
        "+0530",
        "+05:30:15",
        "+24:00",
        "+5:30",
        "",
        " Z",
        "+00:60",
        "+12:3",
    ]
)
_fractions = st.one_of(
    st.sampled_from(["", ".", ".5", ".000000001", ".0000000001", ".99999999975", ".999999999999999999", ",5"]),
    st.text("0123456789", min_size=1, max_size=17).map(lambda digits: f".{digits}"),
)
_dates = st.one_of(
    st.sampled_from(
        ["2024-02-29", "2023-02-29", "1900-02-29", "2000-02-29", "2024-12-31", "0001-01-01", "0000-12-31", "9999-12-31",
         "10000-01-01", "1969-12-31", "2024-2-9", "02024-03-01", "2024-04-31", "2024-00-10", "2024-13-01",
         "-2024-01-01"]
    ),
    st.dates().map(str),
)  # fmt: skip
_clocks = st.one_of(
    st.sampled_from(["00:00:00", "23:59:59", "23:59:60", "24:00:00", "12:60:00", "1:2:3", "12:30", "12:30:61"]),
    st.times().map(lambda time: time.strftime("%H:%M:%S")),
)
times = st.one_of(
    st.builds(
        lambda date, t, clock, fraction, offset: f"{date}{t}{clock}{fraction}{offset}",
        _dates, st.sampled_from(["T", "T", "T", "t", " "]), _clocks, _fractions, _offsets,
    ),
    st.sampled_from([" 2024-01-01T00:00:00Z\n", "infinite-future", "2024-01-01"]),
)  # fmt: skip
"""Texts of moments, and texts that nearly are."""

_identifiers = st.one_of(
    st.sampled_from(["0", "1", "2", "10", "01", "alpha", "beta", "rc", "-", "x-1", "1a", "A", "a", "", "é"]),
    st.text("0123456789", min_size=1, max_size=30),
)
_dotted = st.lists(_identifiers, min_size=1, max_size=3).map(".".join)
_numbers = st.one_of(
    st.sampled_from(["0", "1", "2", "9", "10", "01", "", "v1"]), st.text("123456789", min_size=1, max_size=25)
)
versions = st.builds(
    lambda numbers, before, build, around: f"{around}{'.'.join(numbers)}{before}{build}",
    st.one_of(st.lists(_numbers, min_size=3, max_size=3), st.lists(_numbers, min_size=1, max_size=4)),
    st.one_of(st.just(""), _dotted.map(lambda text: f"-{text}")),
    st.one_of(st.just(""), _dotted.map(lambda text: f"+{text}")),
    st.sampled_from(["", "", "", "", "v", " "]),
).filter(lambda text: len(text.encode()) <= 256)
"""Texts of versions, and texts that nearly are."""

ints = st.one_of(
    st.integers(-3, 3),
    st.sampled_from([18, 2**53 - 1, 2**53, 2**53 + 1, 2**53 + 2, -(2**53), -(2**53) - 1, 2**63 - 1, -(2**63), 2**62]),
    st.integers(-(2**63), 2**63 - 1),
)
doubles = st.one_of(
    st.sampled_from(
        [0.0, -0.0, 0.1, 0.5, 1.0, 1.5, 2.0, -1.0, 1e308, -1e308, 5e-324, 2.0**53, 2.0**53 + 2, 2.0**63, -(2.0**63),
         1e22, 9.3e18, 1e-7]
    ),
    st.floats(allow_nan=False, allow_infinity=False),
)  # fmt: skip
scalars = st.one_of(strings, ints, doubles, st.booleans())
tag_lists = st.lists(strings, max_size=4)

users: st.SearchStrategy[dict[str, Any]] = st.dictionaries(
    st.sampled_from(NAMES), st.one_of(scalars, tag_lists, st.none(), times, versions), max_size=len(NAMES)
)

_attributes = st.sampled_from(NAMES).map(tree.Attribute)
# No user has an infinite number, or a string with U+0000 in it.
_literals = st.one_of(
    scalars.map(tree.Constant),
    st.sampled_from([float("inf"), float("-inf"), "\0", "a\0", "\0a", "a\0b", "ab\0a\0RU"]).map(tree.Constant),
    strings.map(tree.Constant),
)
_texts = st.one_of(strings, st.sampled_from(["\0", "a\0b", "ab\0", "b\0\0RU"])).map(tree.Constant)


def _lists(items: st.SearchStrategy[Any]) -> st.SearchStrategy[tree.ListOf]:
    return st.lists(items, max_size=4).map(lambda found: tree.ListOf(tuple(found)))


_texts_or_attributes = st.one_of(_attributes, _attributes, _attributes.map(tree.Lower))
_times = st.one_of(_texts_or_attributes, times.map(tree.Constant)).map(tree.Time)
_versions = st.one_of(_texts_or_attributes, versions.map(tree.Constant)).map(tree.Version)
_orders = st.builds(tree.OrderOfVersions, _versions, _versions)

_values = st.recursive(
    st.one_of(_attributes, _attributes, _literals, _attributes.map(tree.Lower), _times, _orders),
    lambda inner: st.one_of(_lists(inner), inner.map(tree.Size), _lists(strings.map(tree.Constant))),
    max_leaves=4,
)
_around_exactness = st.sampled_from([2**53, 2**53 + 1, 2.0**53, 2**63 - 1, 2.0**63, 1]).map(tree.Constant)
_short_lists = st.lists(st.one_of(_attributes, _around_exactness), min_size=1, max_size=2).map(
    lambda found: tree.ListOf(tuple(found))
)
_comparisons = st.one_of(
    st.builds(tree.Compare, st.sampled_from(["==", "!=", "<", "<=", ">", ">="]), _values, _values),
    st.builds(tree.Compare, st.sampled_from(["==", "!=", "<", "<=", ">", ">="]), _attributes, _literals),
    st.builds(tree.Compare, st.sampled_from(["==", "<", ">="]), _attributes, _attributes),
    st.builds(tree.In, _values, st.one_of(_lists(_values), _attributes)),
    st.builds(tree.In, _attributes, _lists(_literals)),
    st.builds(
        tree.Test,
        st.sampled_from(["startsWith", "endsWith", "contains"]),
        st.one_of(_attributes, _texts),
        st.one_of(_attributes, _texts),
    ),
    st.builds(tree.In, _short_lists, _lists(_short_lists)),
    st.builds(tree.Compare, st.sampled_from(["==", "!=", "<", "<=", ">", ">="]), _times, _times),
    st.builds(tree.CompareVersions, st.sampled_from(["isLessThan", "isGreaterThan"]), _versions, _versions),
    st.builds(
        tree.Compare, st.sampled_from(["==", "<", ">="]), _orders, st.sampled_from([-1, 0, 1]).map(tree.Constant)
    ),
    st.one_of(_texts_or_attributes, versions.map(tree.Constant)).map(tree.IsVersion),
    st.builds(
        tree.Test,
        st.sampled_from(["startsWith", "endsWith", "contains"]),
        _attributes.map(tree.Lower),
        st.one_of(_attributes.map(tree.Lower), _texts),
    ),
    st.builds(tree.Compare, st.sampled_from(["==", "!=", "<", ">="]), _attributes.map(tree.Lower), _literals),
    st.sampled_from(NAMES).map(tree.Has),
    _attributes,
)
nodes = st.recursive(
    _comparisons,
    lambda inner: st.one_of(
        st.builds(tree.And, inner, inner),
        st.builds(tree.Or, inner, inner),
        inner.map(tree.Not),
        st.builds(tree.Compare, st.sampled_from(["==", "!="]), inner, inner),
        st.builds(tree.Compare, st.sampled_from(["<", ">="]), inner, st.one_of(inner, _attributes)),
        st.builds(tree.In, inner, st.one_of(_lists(inner), _attributes)),
        st.builds(tree.In, _lists(inner), _lists(_lists(st.one_of(inner, _attributes)))),
        st.builds(tree.Compare, st.sampled_from(["==", "!="]), _lists(inner), _lists(st.one_of(inner, _attributes))),
        st.builds(tree.Compare, st.just("<"), _lists(inner).map(tree.Size), _attributes),
    ),
    max_leaves=8,
)

NESTED: dict[str, Callable[[str], str]] = {
    "equal": lambda inner: f"({inner} == user.b)",
    "unequal": lambda inner: f"(!({inner}) != user.b)",
    "less": lambda inner: f"({inner} < user.b)",
    "less than a literal": lambda inner: f"({inner} < true)",
    "in": lambda inner: f"({inner} in [user.b])",
    "in lists": lambda inner: f"([{inner}] in [[user.b], [user.a, 1], [user.flag]])",
    "in a list beside literals": lambda inner: f"({inner} in [user.b, 1, 9007199254740993, 'x'])",
    "in an attribute": lambda inner: f"({inner} in user.tags)",
    "item of a list": lambda inner: f"(user.flag in [{inner}, user.b])",
    "and": lambda inner: f"({inner} && user.b)",
    "equal lists": lambda inner: f"([{inner}, user.a] == [user.flag, 1])",
    "list": lambda inner: f"([{inner}] == user.b)",
    "size": lambda inner: f"(size([{inner}]) == user.n)",
    "size and order": lambda inner: f"(size([{inner}]) < user.n)",
}
"""Ways to put a condition into another one."""


def deepest(wrap: Callable[[str], str], inmost: str) -> str:
    """A condition put into another one, again and again, as deep as CEL accepts it."""
    text = inmost
    while True:
        wrapped = wrap(text)
        try:
            parse_condition(wrapped)
        except ServiceError:
            return text
        text = wrapped


def stored(attributes: dict[str, Any]) -> str:
    """A user's attributes as they are stored when a create-user event brings them."""
    event = parse(CREATE_TOPIC, json.dumps({"user_id": 1, "attributes": attributes}).encode())
    assert isinstance(event, CreateUser)
    return event.attributes
