"""The fast path of reading events gives what the thorough reader gives, or nothing."""

from __future__ import annotations

import json
from typing import Any

import pytest
from hypothesis import given, settings
from hypothesis import strategies as st

from segsvc.domain.event_fast_path import read_create, read_update
from segsvc.domain.events import BadEvent, CreateUser, UpdateUser, UserEvent, parse_any

MAX = 2**63 - 1

words = st.one_of(
    st.text(max_size=8),
    st.sampled_from(["", "a", "é" * 64, "€" * 65, "x" * 65, "x" * 256, "x" * 257, "\0", "\ud800"]),
    st.just('"\\\n\t\x7f\u2028😀'),
)
integers = st.one_of(
    st.integers(-5, 5), st.sampled_from([MAX, MAX + 1, -MAX - 1, -MAX - 2, 2**64, 10**30, 10**400]), st.booleans()
)
doubles = st.one_of(st.floats(allow_nan=True, allow_infinity=True), st.sampled_from([1.0, 1e16, 1e-7, -0.0, 5e-324]))
anything = st.recursive(
    st.one_of(words, integers, doubles, st.none()),
    lambda inner: st.one_of(st.lists(inner, max_size=4), st.dictionaries(words, inner, max_size=3)),
    max_leaves=6,
)
names = st.sampled_from(["a", "country", "_", "A9", "x" * 64, "x" * 65, "9", "é", "", "a b"])
plain = st.one_of(
    words, integers, st.lists(words, max_size=4), st.lists(st.just("t"), min_size=63, max_size=66), st.none()
)
attributes = st.one_of(
    st.dictionaries(names, st.one_of(plain, anything), max_size=5),
    # Near the limits of number and of size.
    st.dictionaries(st.integers(0, 99).map("n{}".format), st.just("x" * 120), min_size=60, max_size=70),
    anything,
)
documents = st.fixed_dictionaries(
    {"user_id": st.one_of(st.just(7), integers, anything)},
    optional={
        "attributes": st.one_of(attributes, attributes),
        "version": st.one_of(st.just(3), integers, anything),
        "more": anything,
    },
)


def thoroughly(topic: str, value: bytes) -> UserEvent | str:
    try:
        return parse_any(topic, value)
    except BadEvent as bad:
        return bad.reason


def same_both_ways(value: bytes) -> None:
    created, updated = read_create(value), read_update(value)
    if created is not None:
        assert CreateUser(*created) == thoroughly("create-user", value)
    if updated is not None:
        assert UpdateUser(*updated) == thoroughly("update-user", value)


@given(document=documents, ascii_only=st.booleans(), indent=st.sampled_from([None, 1]))
@settings(max_examples=600)
def test_what_is_read_quickly_is_what_is_read_thoroughly(
    document: dict[str, Any], ascii_only: bool, indent: int | None
) -> None:
    same_both_ways(json.dumps(document, ensure_ascii=ascii_only, indent=indent).encode("utf-8", "surrogatepass"))


@given(
    document=documents,
    at=st.integers(0, 400),
    cut=st.integers(0, 3),
    put=st.one_of(
        st.binary(max_size=3),
        st.sampled_from([b",", b"0", b".5", b"e5", b"\xff", b"\\q", b'"user_id":2,', b'"a":1,', b"\xef"]),
    ),
)
@settings(max_examples=600)
def test_what_is_spoilt_is_read_quickly_only_if_it_is_still_good(
    document: dict[str, Any], at: int, cut: int, put: bytes
) -> None:
    value = json.dumps(document).encode()
    at %= len(value)
    same_both_ways(value[:at] + put + value[at + cut :])


@pytest.mark.parametrize(
    "value",
    [
        b'{"user_id": 42, "attributes": {"country": "DE", "age": 30, "tags": ["a"], "beta": true}}',
        b'{"user_id": 42, "version": 1, "attributes": {"city": "K\xc3\xb6ln", "n": -9223372036854775808}}',
        b'{"user_id": 42}',
    ],
)
def test_the_usual_event_is_read_quickly(value: bytes) -> None:
    assert (read_update if b"version" in value else read_create)(value) is not None
    same_both_ways(value)


@pytest.mark.parametrize(
    "value",
    [
        b'{"user_id": 1.0}',
        b'{"user_id": true}',
        b'{"user_id": 0}',
        b'{"user_id": 9223372036854775808}',
        b'{"user_id": 1, "user_id": "x"}',
        b'{"user_id": 1, "more": 2}',
        b'{"user_id": 1, "attributes": {"a": null}}',
        b'{"user_id": 1, "attributes": {"a": 1.5}}',
        b'{"user_id": 1, "attributes": {"a": NaN}}',
        b'{"user_id": 1, "attributes": {"a": ' + b"9" * 5000 + b"}}",
        b'{"user_id": 1, "attributes": {"a": "\xff"}}',
        b"\xef\xbb\xbf" + b'{"user_id": 1}',
        b'{"user_id": 1}' + b" " * 65536,
        b"\xff",
        b"",
    ],
)
def test_an_unusual_event_is_left_to_the_thorough_reader(value: bytes) -> None:
    assert read_create(value) is None
