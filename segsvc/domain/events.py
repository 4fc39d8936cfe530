"""Events about users as they arrive over Kafka: which are accepted, and the exact reason for each refusal.

An event is read once, here. The result is canonical: ids and versions as integers, attributes as the compact JSON text
that is stored. So a duplicate key or an odd spelling of a number cannot be read in two ways.

Rules that the public interface leaves open:

- If a key comes twice, the last one counts, as in PostgreSQL's jsonb and in most JSON parsers.
- A JSON number with a point or an exponent is a double, any other an integer. The stored text keeps the two apart: an
  integer has neither, a double always has a point and never an exponent (``1e2`` becomes ``100.0``), as jsonb keeps
  the digits behind the point but not the exponent. In SQL, ``scale(value::numeric) > 0`` identifies a double.
- A creation without ``attributes`` (or with null) has none; an update must state all attributes that remain.
- The limit of 8 KiB is for the attributes that are kept, as compact JSON in UTF-8 with numbers in their shortest form.
"""

from __future__ import annotations

import json
import math
import re
from collections.abc import Callable, Mapping, Sequence
from decimal import Decimal
from typing import Any, Final, Never

import msgspec

from segsvc.domain.event_fast_path import read_create, read_update
from segsvc.domain.event_limits import (
    ATTRIBUTE_NAME,
    ATTRIBUTES_BYTES_MAX,
    ATTRIBUTES_MAX,
    DEPTH_MAX,
    EVENT_BYTES_MAX,
    INT_MAX,
    INT_MIN,
    LIST_MAX,
    STRING_BYTES_MAX,
)
from segsvc.domain.sharding import USER_ID_MAX

CREATE_TOPIC: Final = "create-user"
UPDATE_TOPIC: Final = "update-user"
DELETE_TOPIC: Final = "delete-user"
TOPICS: Final = (CREATE_TOPIC, UPDATE_TOPIC, DELETE_TOPIC)
SEGMENT_EVENTS_TOPIC: Final = "segment-events"
"""Topic that segsvc writes: changes of segments. It reads the other topics: changes of users."""

_NAME_ALLOWED: Final = f"names must match {ATTRIBUTE_NAME.pattern}"
# A string that is never closed matches to the end, so the pattern passes over any input once.
_STRUCTURE: Final = re.compile(rb'"(?:[^"\\]++|\\.)*+"?|[\[{]|[\]}]', re.DOTALL)


class BadEvent(Exception):
    """An event outside the contract: it becomes a dead letter with this reason. A retry cannot help."""

    def __init__(self, reason: str) -> None:
        super().__init__(reason)
        self.reason = reason


class Unstorable(Exception):
    """The database refused the data of a batch, and would refuse it again. Nothing of the batch was stored.

    Attributes:
        code: the SQLSTATE, for the dead letter's reason. The driver's text is left out.
    """

    def __init__(self, code: str) -> None:
        super().__init__(code)
        self.code = code


class CreateUser(msgspec.Struct, frozen=True, gc=False, array_like=True, forbid_unknown_fields=True, tag="c"):
    """A user arrives. ``attributes`` is compact JSON. Their version is 0."""

    user_id: int
    attributes: str


class UpdateUser(msgspec.Struct, frozen=True, gc=False, array_like=True, forbid_unknown_fields=True, tag="u"):
    """All attributes of a user, replacing the earlier ones; the newest ``version`` (1 or more) wins."""

    user_id: int
    version: int
    attributes: str


class DeleteUser(msgspec.Struct, frozen=True, gc=False, array_like=True, forbid_unknown_fields=True, tag="d"):
    """A user is deleted, permanently."""

    user_id: int


UserEvent = CreateUser | UpdateUser | DeleteUser


def parse(topic: str, raw: bytes | None) -> UserEvent:
    """Read the value of one message.

    Args:
        topic: one of ``TOPICS``.
        raw: the bytes of the value; None: the message has none. The key is ignored: it is not trusted.

    Raises:
        BadEvent: the event is outside the contract.
        KeyError: there is no such topic.
    """
    if raw is not None:
        if topic == CREATE_TOPIC and (created := read_create(raw)) is not None:
            return CreateUser(*created)
        if topic == UPDATE_TOPIC and (updated := read_update(raw)) is not None:
            return UpdateUser(*updated)
    return parse_any(topic, raw)


def parse_any(topic: str, raw: bytes | None) -> UserEvent:
    """As ``parse``, without the fast path: this reader knows every event."""
    return _READERS[topic](_document(raw))


_encode_events: Final = msgspec.msgpack.Encoder().encode
_decode_events: Final = msgspec.msgpack.Decoder(list[UserEvent]).decode


def to_wire(events: Sequence[UserEvent]) -> bytes:
    """Events as bytes for a worker; ``from_wire`` reads them."""
    return _encode_events(events)


def from_wire(payload: bytes) -> list[UserEvent]:
    """Read what ``to_wire`` wrote. Raises ValueError for anything else."""
    return _decode_events(payload)  # its errors are ValueErrors


# -- reading the document -------------------------------------------------------------------------------------------


def _no_constant(name: str) -> Never:
    raise BadEvent(f"event: is not JSON: {name} is not a JSON number")


_decode: Final = json.JSONDecoder(parse_constant=_no_constant).decode
# Python refuses to convert integers of thousands of digits. In a field that is ignored, such a number must not matter.
# In any other field it is out of range, so only its first digits are read.
_decode_long_integers: Final = json.JSONDecoder(
    parse_constant=_no_constant, parse_int=lambda digits: int(digits[:40])
).decode


def _document(raw: bytes | None) -> Mapping[str, Any]:
    if raw is None:
        raise BadEvent("event: the message has no value")
    if len(raw) > EVENT_BYTES_MAX:
        raise BadEvent(f"event: must be at most {EVENT_BYTES_MAX} bytes, is {len(raw)}")
    if _deeper_than_allowed(raw):
        raise BadEvent(f"event: must be at most {DEPTH_MAX} levels deep")

    try:
        text = raw.decode("utf-8")
    except UnicodeDecodeError as error:
        raise BadEvent(f"event: is not UTF-8 at byte {error.start}") from None

    try:
        document = _decode(text)
    except json.JSONDecodeError as error:
        raise BadEvent(f"event: is not JSON: {error.msg.removesuffix(' at')} at character {error.pos}") from None
    except ValueError:
        document = _decode_long_integers(text)

    if not isinstance(document, dict):
        raise BadEvent(f"event: must be a JSON object, is {_shown(document)}")
    return document


def _deeper_than_allowed(raw: bytes) -> bool:
    """Whether arrays and objects are nested too deep. This is checked before the parser, which recurses, sees them.

    As long as the bytes are JSON, strings are recognised as the parser recognises them. It stops where they are not.
    """
    if raw.count(b"{") + raw.count(b"[") <= DEPTH_MAX:
        return False  # nearly always: the depth is at most the number of opening brackets

    depth = 0
    for match in _STRUCTURE.finditer(raw):
        if match[0] in b"[{":
            depth += 1
            if depth > DEPTH_MAX:
                return True
        elif match[0] in b"]}":
            depth -= 1
    return False


# -- fields ---------------------------------------------------------------------------------------------------------

_ABSENT: Final = object()


def _create(document: Mapping[str, Any]) -> CreateUser:
    attributes = document.get("attributes")
    return CreateUser(_user_id(document), "{}" if attributes is None else _attributes(attributes))


def _update(document: Mapping[str, Any]) -> UpdateUser:
    user_id = _user_id(document)
    version = _integer(document, "version", 1, INT_MAX)
    attributes = document.get("attributes", _ABSENT)
    if attributes is _ABSENT:
        raise BadEvent("attributes: is required; an update replaces all attributes")
    return UpdateUser(user_id, version, _attributes(attributes))


def _delete(document: Mapping[str, Any]) -> DeleteUser:
    return DeleteUser(_user_id(document))


_READERS: Final[Mapping[str, Callable[[Mapping[str, Any]], UserEvent]]] = {
    CREATE_TOPIC: _create,
    UPDATE_TOPIC: _update,
    DELETE_TOPIC: _delete,
}


def _user_id(document: Mapping[str, Any]) -> int:
    return _integer(document, "user_id", 1, USER_ID_MAX)


def _integer(document: Mapping[str, Any], name: str, least: int, most: int) -> int:
    value = document.get(name, _ABSENT)
    # Not isinstance: True is an int to Python, and 1.0 equals 1.
    if type(value) is int and least <= value <= most:
        return value
    if value is _ABSENT:
        raise BadEvent(f"{name}: is required")
    raise BadEvent(f"{name}: must be an integer from {least} to {most}, is {_shown(value)}")


# -- attributes -----------------------------------------------------------------------------------------------------

_encode: Final = json.JSONEncoder(
    ensure_ascii=False, separators=(",", ":"), allow_nan=False, check_circular=False
).encode


def _attributes(value: Any) -> str:
    """Check attributes against their limits. Returns the text to store; attributes that are null are left out."""
    if type(value) is not dict:
        raise BadEvent(f"attributes: must be a JSON object, is {_shown(value)}")

    kept: dict[str, Any] = {}
    for name, item in value.items():
        if not ATTRIBUTE_NAME.fullmatch(name):
            raise BadEvent(f"attributes: {_NAME_ALLOWED}, one is {_quoted(name)}")
        if item is None:
            continue
        check = _CHECKS.get(type(item))
        if check is None:
            raise BadEvent(
                f"attributes.{name}: must be a string, a boolean, a number or a list of strings, is {_shown(item)}"
            )
        check(name, item)
        kept[name] = item

    if len(kept) > ATTRIBUTES_MAX:
        raise BadEvent(f"attributes: must be at most {ATTRIBUTES_MAX}, are {len(kept)}")

    text = _encode(kept)
    size = len(text) if text.isascii() else len(text.encode("utf-8"))
    if size > ATTRIBUTES_BYTES_MAX:
        raise BadEvent(f"attributes: must be at most {ATTRIBUTES_BYTES_MAX} bytes in all, are {size}")

    if any(type(item) is float and "e" in repr(item) for item in kept.values()):
        return _without_exponents(kept)
    return text


def _check_string(where: str, value: str) -> None:
    if value.isascii():
        size = len(value)
    else:
        try:
            size = len(value.encode("utf-8"))
        except UnicodeEncodeError:
            raise BadEvent(f"attributes.{where}: must not contain half of a surrogate pair") from None
    if size > STRING_BYTES_MAX:
        raise BadEvent(f"attributes.{where}: a string must be at most {STRING_BYTES_MAX} bytes, is {size}")
    if "\0" in value:
        raise BadEvent(f"attributes.{where}: must not contain U+0000")


def _check_bool(where: str, value: bool) -> None:
    """Both values are allowed."""


def _check_int(where: str, value: int) -> None:
    if not INT_MIN <= value <= INT_MAX:
        raise BadEvent(f"attributes.{where}: an integer must be from {INT_MIN} to {INT_MAX}")


def _check_float(where: str, value: float) -> None:
    if not math.isfinite(value):
        raise BadEvent(f"attributes.{where}: a number must be finite as a double")


def _check_list(name: str, items: list[Any]) -> None:
    if len(items) > LIST_MAX:
        raise BadEvent(f"attributes.{name}: a list must have at most {LIST_MAX} strings, has {len(items)}")
    for index, item in enumerate(items):
        if type(item) is not str:
            raise BadEvent(f"attributes.{name}[{index}]: must be a string, is {_shown(item)}")
        _check_string(f"{name}[{index}]", item)


# By exact type: True must not pass for an int.
_CHECKS: Final[Mapping[type, Callable[[str, Any], None]]] = {
    bool: _check_bool,
    int: _check_int,
    float: _check_float,
    str: _check_string,
    list: _check_list,
}


def _without_exponents(attributes: Mapping[str, Any]) -> str:
    return "{" + ",".join(f"{_encode(name)}:{_value_text(item)}" for name, item in attributes.items()) + "}"


def _value_text(item: Any) -> str:
    if type(item) is not float:
        return _encode(item)
    digits = format(Decimal(repr(item)), "f")
    return digits if "." in digits else digits + ".0"


# -- words ----------------------------------------------------------------------------------------------------------


def _quoted(name: str) -> str:
    """A name as JSON text, short enough for a reason. ASCII only, because a name may contain any character."""
    return json.dumps(name if len(name) <= 80 else name[:80] + "…")


def _shown(value: Any) -> str:
    """A value as a reason shows it: numbers and constants as they are, what may be personal by its type only."""
    match value:
        case None:
            return "null"
        case bool():
            return "true" if value else "false"
        case int():
            return str(value) if abs(value) < 10**30 else "an integer of more than 30 digits"
        case float():
            return repr(value)
        case str():
            return "a string"
        case list():
            return "an array"
    return "an object"
