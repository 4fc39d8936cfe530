"""Reading events: what is accepted, both sides of each limit, and the exact reasons."""

from __future__ import annotations

import json
import math
from decimal import Decimal
from typing import Any

import msgspec
import pytest
from hypothesis import given
from hypothesis import strategies as st

from segsvc.domain.events import (
    TOPICS,
    BadEvent,
    CreateUser,
    DeleteUser,
    UpdateUser,
    UserEvent,
    from_wire,
    parse,
    to_wire,
)

MAX = 2**63 - 1


def raw(**event: Any) -> bytes:
    return json.dumps(event).encode()


def attributes_of(attributes: Any) -> str:
    event = parse("create-user", raw(user_id=1, attributes=attributes))
    assert isinstance(event, CreateUser)
    return event.attributes


def reason(topic: str, value: bytes | None) -> str:
    with pytest.raises(BadEvent) as bad:
        parse(topic, value)
    return bad.value.reason


def reason_for(attributes: Any) -> str:
    return reason("create-user", raw(user_id=1, attributes=attributes))


# -- accepted ----------------------------------------------------------------------------------------------------------


def test_the_examples_of_the_contract() -> None:
    assert parse("create-user", b'{"user_id": 42, "attributes": {"a": 1}}') == CreateUser(42, '{"a":1}')
    assert parse("update-user", b'{"user_id": 42, "version": 7, "attributes": {}}') == UpdateUser(42, 7, "{}")
    assert parse("delete-user", b'{"user_id": 42}') == DeleteUser(42)


def test_unknown_fields_are_ignored_whatever_they_hold() -> None:
    assert parse("delete-user", b'{"user_id": 1, "x": {"y": [1, {"z": null}]}, "n": 1e999}') == DeleteUser(1)
    assert parse("delete-user", b'{"user_id": 1, "attributes": "ignored here", "version": -1}') == DeleteUser(1)
    assert parse("create-user", b'{"user_id": 1, "version": "ignored here"}') == CreateUser(1, "{}")
    assert parse("delete-user", b'{"user_id": 1, "n": %s}' % (b"9" * 5000)) == DeleteUser(1)
    assert parse("delete-user", b'{"user_id": 1, "text": "\\ud800"}') == DeleteUser(1)


def test_a_creation_may_have_no_attributes_and_an_update_must_have_them() -> None:
    assert parse("create-user", b'{"user_id": 1}') == CreateUser(1, "{}")
    assert parse("create-user", b'{"user_id": 1, "attributes": null}') == CreateUser(1, "{}")
    assert reason("update-user", b'{"user_id": 1, "version": 1}') == (
        "attributes: is required; an update replaces all attributes"
    )
    assert reason("update-user", b'{"user_id": 1, "version": 1, "attributes": null}') == (
        "attributes: must be a JSON object, is null"
    )


def test_the_last_of_a_repeated_key_counts() -> None:
    assert parse("create-user", b'{"user_id": 1, "user_id": 2, "attributes": {"a": 1, "a": 2}}') == (
        CreateUser(2, '{"a":2}')
    )


def test_null_means_absent() -> None:
    assert attributes_of({"a": None, "b": 1}) == '{"b":1}'
    assert attributes_of({f"a{n}": None for n in range(1000)}) == "{}"


@pytest.mark.parametrize(
    ("written", "stored"),
    [
        ("1", "1"),
        ("-0", "0"),
        ("1.0", "1.0"),
        ("1e2", "100.0"),
        ("1E+2", "100.0"),
        ("1e22", "1" + "0" * 22 + ".0"),
        ("1e-7", "0.0000001"),
        ("-2.5e-5", "-0.000025"),
        ("9223372036854775807", "9223372036854775807"),
        ("-9223372036854775808", "-9223372036854775808"),
    ],
)
def test_a_number_with_a_point_or_an_exponent_stays_a_double(written: str, stored: str) -> None:
    event = parse("create-user", b'{"user_id": 1, "attributes": {"n": %s, "s": "1e5"}}' % written.encode())
    assert event == CreateUser(1, f'{{"n":{stored},"s":"1e5"}}')


_numbers = st.integers(-(2**63), MAX) | st.floats(allow_nan=False, allow_infinity=False)
_texts = st.text(st.characters(exclude_characters="\0", exclude_categories=["Cs"]), max_size=60)
_attributes = st.dictionaries(
    st.from_regex(r"[A-Za-z_][A-Za-z0-9_]{0,63}", fullmatch=True),
    _texts | st.booleans() | _numbers | st.lists(_texts, max_size=4),
    max_size=8,
)


@given(_attributes)
def test_attributes_keep_values_and_types(attributes: dict[str, Any]) -> None:
    text = attributes_of(attributes)
    assert "e" not in text.replace("true", "").replace("false", "") or any(
        isinstance(value, str | list) or "e" in name for name, value in attributes.items()
    )
    kept = json.loads(text)
    assert kept == attributes
    assert {name: type(value) for name, value in kept.items()} == {
        name: type(value) for name, value in attributes.items()
    }


@given(st.floats(allow_nan=False, allow_infinity=False))
def test_a_double_is_stored_exactly_without_an_exponent(value: float) -> None:
    digits = attributes_of({"x": value})[len('{"x":') : -1]
    assert "." in digits
    assert "e" not in digits
    assert Decimal(digits) == Decimal(repr(value))
    assert math.isclose(float(digits), value, rel_tol=0, abs_tol=0)


@given(
    st.one_of(
        st.builds(CreateUser, st.integers(1, MAX), _texts),
        st.builds(UpdateUser, st.integers(1, MAX), st.integers(1, MAX), _texts),
        st.builds(DeleteUser, st.integers(1, MAX)),
    )
)
def test_the_way_to_a_worker_changes_nothing(event: UserEvent) -> None:
    assert from_wire(to_wire([event, event])) == [event, event]


@pytest.mark.parametrize(
    "row",
    [[], ["c", 1], ["d", "1"], ["d", 1.0], ["d", True], ["d", 1, 2], ["c", 1, b"{}"], ["u", 1, "{}"], ["x", 1], 1],
)
def test_anything_else_on_the_way_is_an_error(row: Any) -> None:
    with pytest.raises(ValueError, match=r"\$\[0\]"):
        from_wire(msgspec.msgpack.encode([row]))
    with pytest.raises(ValueError, match="truncated"):
        from_wire(to_wire([DeleteUser(1)])[:-1])


# -- refused: the document ---------------------------------------------------------------------------------------------


@pytest.mark.parametrize(
    ("value", "expected"),
    [
        (None, "event: the message has no value"),
        (b"", "event: is not JSON: Expecting value at character 0"),
        (b'{"user_id": 1', "event: is not JSON: Expecting ',' delimiter at character 13"),
        (b'{"user_id": 1} x', "event: is not JSON: Extra data at character 15"),
        (b'{"user_id": "\x01"}', "event: is not JSON: Invalid control character at character 13"),
        (b'{"user_id": NaN}', "event: is not JSON: NaN is not a JSON number"),
        (b'{"user_id": 1, "x": -Infinity}', "event: is not JSON: -Infinity is not a JSON number"),
        (b'{"x": "\xff"}', "event: is not UTF-8 at byte 7"),
        ('{"user_id": 1}'.encode("utf-16"), "event: is not UTF-8 at byte 0"),
        (b"[1]", "event: must be a JSON object, is an array"),
        (b"1" * 5000, "event: must be a JSON object, is an integer of more than 30 digits"),
        (b"{}", "user_id: is required"),
    ],
)
def test_unreadable_documents(value: bytes | None, expected: str) -> None:
    assert reason("delete-user", value) == expected


def test_size() -> None:
    def of(size: int) -> bytes:
        event = b'{"user_id": 1, "x": "%s"}'
        return event % (b"y" * (size - len(event) + 2))

    assert len(of(65_536)) == 65_536
    assert parse("delete-user", of(65_536)) == DeleteUser(1)
    assert reason("delete-user", of(65_537)) == "event: must be at most 65536 bytes, is 65537"


@pytest.mark.parametrize("opening", [b"[", b'{"a":'])
def test_depth(opening: bytes) -> None:
    def of(levels: int) -> bytes:
        closing = b"]" if opening == b"[" else b"}"
        return b'{"user_id": 1, "x": ' + opening * (levels - 1) + b"1" + closing * (levels - 1) + b"}"

    assert parse("delete-user", of(8)) == DeleteUser(1)
    assert reason("delete-user", of(9)) == "event: must be at most 8 levels deep"
    assert reason("delete-user", of(9000)) == "event: must be at most 8 levels deep"


def test_brackets_within_strings_are_not_depth() -> None:
    assert parse("delete-user", raw(user_id=1, x="[{" * 500, y='\\"[[[[[[[[[')) == DeleteUser(1)
    assert parse("delete-user", raw(user_id=1, x=[[], [], {}, [{}], [], [], [], []])) == DeleteUser(1)


@given(st.binary(max_size=80) | st.text('[]{}":,\\0 ', max_size=80).map(str.encode))
def test_no_bytes_do_anything_but_parse_or_be_refused(value: bytes) -> None:
    for topic in TOPICS:
        try:
            parse(topic, value)
        except BadEvent as bad:
            bad.reason.encode()


def test_many_quotes_are_read_once() -> None:
    # Quadratic time would take minutes.
    reason("delete-user", b"[" * 5 + b'\\"' * 32_000)
    reason("delete-user", b"[" * 9 + b'"' + b'\\"' * 32_000)


# -- refused: the fields -----------------------------------------------------------------------------------------------


@pytest.mark.parametrize("user_id", [1, MAX])
def test_user_ids(user_id: int) -> None:
    assert parse("delete-user", raw(user_id=user_id)) == DeleteUser(user_id)


@pytest.mark.parametrize(
    ("text", "shown"),
    [
        ("0", "0"),
        ("-1", "-1"),
        ("9223372036854775808", "9223372036854775808"),
        ("9" * 5000, "an integer of more than 30 digits"),
        ("1.0", "1.0"),
        ("1e0", "1.0"),
        ("true", "true"),
        ('"42"', "a string"),
        ("null", "null"),
        ("[1]", "an array"),
        ("{}", "an object"),
    ],
)
@pytest.mark.parametrize(("topic", "field"), [("delete-user", "user_id"), ("update-user", "version")])
def test_what_is_no_id_and_no_version(topic: str, field: str, text: str, shown: str) -> None:
    other = '"user_id": 5, ' if field == "version" else ""
    value = f'{{{other}"{field}": {text}, "attributes": {{}}}}'.encode()
    assert reason(topic, value) == f"{field}: must be an integer from 1 to 9223372036854775807, is {shown}"


# -- refused: attributes -----------------------------------------------------------------------------------------------


def test_how_many() -> None:
    assert len(json.loads(attributes_of({f"a{n}": n for n in range(64)} | {"b": None}))) == 64
    assert reason_for({f"a{n}": n for n in range(65)}) == "attributes: must be at most 64, are 65"


@pytest.mark.parametrize("name", ["a", "_", "Z9_", "a" * 64])
def test_names(name: str) -> None:
    assert attributes_of({name: 1}) == f'{{"{name}":1}}'


@pytest.mark.parametrize(
    ("name", "shown"),
    [
        ("", '""'),
        ("9a", '"9a"'),
        ("a-b", '"a-b"'),
        ("ä", '"\\u00e4"'),
        ("a\n", '"a\\n"'),
        ("\ud800", '"\\ud800"'),
        ("a" * 65, '"' + "a" * 65 + '"'),
        ("a" * 500, '"' + "a" * 80 + '\\u2026"'),
    ],
)
def test_what_is_no_name(name: str, shown: str) -> None:
    expected = f"attributes: names must match [A-Za-z_][A-Za-z0-9_]{{0,63}}, one is {shown}"
    assert reason_for({name: 1}) == expected
    assert reason_for({name: None}) == expected


@pytest.mark.parametrize("text", ["x" * 256, "ä" * 128, "😀" * 64, '\u007f\n"\\'])
def test_strings(text: str) -> None:
    assert json.loads(attributes_of({"s": text, "l": [text]})) == {"s": text, "l": [text]}


@pytest.mark.parametrize(
    ("text", "expected"),
    [
        ("x" * 257, "a string must be at most 256 bytes, is 257"),
        ("ä" * 129, "a string must be at most 256 bytes, is 258"),
        ("a\0b", "must not contain U+0000"),
        ("ä\0", "must not contain U+0000"),
        ("\ud800", "must not contain half of a surrogate pair"),
    ],
)
def test_what_is_no_string(text: str, expected: str) -> None:
    assert reason_for({"s": text}) == f"attributes.s: {expected}"
    assert reason_for({"s": ["fine", text]}) == f"attributes.s[1]: {expected}"


@pytest.mark.parametrize(
    ("value", "expected"),
    [
        (2**63, "an integer must be from -9223372036854775808 to 9223372036854775807"),
        (-(2**63) - 1, "an integer must be from -9223372036854775808 to 9223372036854775807"),
        ({}, "must be a string, a boolean, a number or a list of strings, is an object"),
        (["x"] * 65, "a list must have at most 64 strings, has 65"),
    ],
)
def test_what_is_no_value(value: Any, expected: str) -> None:
    assert reason_for({"a": value}) == f"attributes.a: {expected}"


@pytest.mark.parametrize(
    ("item", "shown"), [(1, "1"), (True, "true"), (None, "null"), ([], "an array"), ({}, "an object")]
)
def test_lists_hold_strings_alone(item: Any, shown: str) -> None:
    assert attributes_of({"a": []}) == '{"a":[]}'
    assert len(json.loads(attributes_of({"a": ["x"] * 64}))["a"]) == 64
    assert reason_for({"a": ["x", item]}) == f"attributes.a[1]: must be a string, is {shown}"


def test_a_number_beyond_doubles() -> None:
    assert reason("create-user", b'{"user_id": 1, "attributes": {"a": 1e999}}') == (
        "attributes.a: a number must be finite as a double"
    )
    assert reason("create-user", b'{"user_id": 1, "attributes": {"a": %s}}' % (b"9" * 5000)) == (
        "attributes.a: an integer must be from -9223372036854775808 to 9223372036854775807"
    )


@pytest.mark.parametrize("text", ["x" * 256, "ä" * 128])
def test_size_of_all_attributes(text: str) -> None:
    attributes = {f"a{n:02}": text for n in range(30)}
    size = len(json.dumps(attributes, ensure_ascii=False, separators=(",", ":")).encode())
    attributes["pad"] = "p" * (8192 - size - len(',"pad":""'))
    assert len(attributes_of(attributes).encode()) == 8192
    attributes["pad"] += "p"
    assert reason_for(attributes) == "attributes: must be at most 8192 bytes in all, are 8193"


def test_the_size_counts_numbers_in_their_shortest_form() -> None:
    attributes = {f"a{n:02}": 1e308 for n in range(60)}
    assert len(attributes_of(attributes)) > 8192


def test_an_attribute_list_is_no_object() -> None:
    assert reason_for([]) == "attributes: must be a JSON object, is an array"


def test_an_unknown_topic_is_a_fault_of_ours() -> None:
    with pytest.raises(KeyError):
        parse("rename-user", b"{}")
