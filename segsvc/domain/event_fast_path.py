"""A fast path for the events that nearly always arrive. ``events`` reads all events, and takes those that are left.

An event for the fast path has the documented fields and no others, and attributes that are far from every limit. A
decoder that knows these types reads it, with a fifth of the work. An event that is read here gives the same result as
in ``events``, as the tests prove. An event that cannot be read here may still be valid; if it is not, only ``events``
knows the reason.
"""

from __future__ import annotations

from typing import Annotated, Final

import msgspec
from msgspec import Meta

from segsvc.domain.event_limits import (
    ATTRIBUTE_NAME,
    ATTRIBUTES_BYTES_MAX,
    ATTRIBUTES_MAX,
    EVENT_BYTES_MAX,
    INT_MAX,
    INT_MIN,
    LIST_MAX,
    STRING_BYTES_MAX,
)
from segsvc.domain.sharding import USER_ID_MAX

_SHORT: Final = STRING_BYTES_MAX // 4
"""Any string of this many characters is within the limit of bytes."""
_KNOWN_NAMES_MAX: Final = 10_000
_known_names: Final[set[str]] = set()
"""Names that were found valid. Any number of events has few different names."""

# Doubles are rewritten and nulls left out before they are stored, so neither is for the fast path.
_String = Annotated[str, Meta(max_length=_SHORT)]
_Integer = Annotated[int, Meta(ge=INT_MIN, le=INT_MAX)]
_Strings = Annotated[list[_String], Meta(max_length=LIST_MAX)]
_Attributes = Annotated[dict[str, _String | bool | _Integer | _Strings], Meta(max_length=ATTRIBUTES_MAX)]


class _Create(msgspec.Struct, forbid_unknown_fields=True):
    user_id: Annotated[int, Meta(ge=1, le=USER_ID_MAX)]
    attributes: _Attributes = {}


class _Update(msgspec.Struct, forbid_unknown_fields=True):
    user_id: Annotated[int, Meta(ge=1, le=USER_ID_MAX)]
    version: Annotated[int, Meta(ge=1, le=INT_MAX)]
    attributes: _Attributes


_decode_create: Final = msgspec.json.Decoder(_Create).decode
_decode_update: Final = msgspec.json.Decoder(_Update).decode
_encode: Final = msgspec.json.Encoder().encode


def read_create(raw: bytes) -> tuple[int, str] | None:
    """A creation's user id and attributes as compact JSON; None: not an event for the fast path."""
    if len(raw) > EVENT_BYTES_MAX or (b"\\" in raw and b"\\u0000" in raw):
        return None
    try:
        event = _decode_create(raw)
    except (msgspec.MsgspecError, UnicodeDecodeError):
        return None
    attributes = _text(event.attributes)
    return None if attributes is None else (event.user_id, attributes)


def read_update(raw: bytes) -> tuple[int, int, str] | None:
    """An update's user id, version and attributes as compact JSON; None: not an event for the fast path."""
    if len(raw) > EVENT_BYTES_MAX or (b"\\" in raw and b"\\u0000" in raw):
        return None
    try:
        event = _decode_update(raw)
    except (msgspec.MsgspecError, UnicodeDecodeError):
        return None
    attributes = _text(event.attributes)
    return None if attributes is None else (event.user_id, event.version, attributes)


def _text(attributes: dict[str, str | bool | int | list[str]]) -> str | None:
    """Attributes as compact JSON; None: a name is not allowed, or the attributes exceed their limit of bytes."""
    if not (attributes.keys() <= _known_names or all(map(_is_name, attributes))):
        return None
    text = _encode(attributes)
    return text.decode() if len(text) <= ATTRIBUTES_BYTES_MAX else None


def _is_name(name: str) -> bool:
    if not ATTRIBUTE_NAME.fullmatch(name):
        return False
    if len(_known_names) < _KNOWN_NAMES_MAX:
        _known_names.add(name)
    return True
