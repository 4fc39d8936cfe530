"""Events as they nearly always are, read quickly; everything else is left to ``events``, which reads all there is.

The usual event has the documented fields and no others, and attributes that are far from every limit. It is read by a
decoder that knows these types: a fifth of the work. What is read here is read there in the same way, which the tests
hold; what cannot be read here may still be good, and only there the reason is known why it is not.
"""

from __future__ import annotations

from typing import Final

import msgspec

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

_Attributes = dict[str, str | bool | int | float | list[str] | None]

_SHORT: Final = STRING_BYTES_MAX // 4
"""Characters that are within the limit whatever they are."""
_KNOWN_NAMES_MAX: Final = 10_000
_known_names: Final[set[str]] = set()
"""Names that were found good: there are few, in any number of events."""


class _Create(msgspec.Struct, forbid_unknown_fields=True):
    # Also float: int alone would take 1.0 for 1.
    user_id: int | float
    attributes: _Attributes = {}


class _Update(msgspec.Struct, forbid_unknown_fields=True):
    user_id: int | float
    version: int | float
    attributes: _Attributes


_decode_create: Final = msgspec.json.Decoder(_Create).decode
_decode_update: Final = msgspec.json.Decoder(_Update).decode
_encode: Final = msgspec.json.Encoder().encode


def read_create(raw: bytes) -> tuple[int, str] | None:
    """A creation's user id and attributes as compact JSON; None: it is not of the usual kind."""
    if len(raw) > EVENT_BYTES_MAX:
        return None
    try:
        event = _decode_create(raw)
    except (msgspec.MsgspecError, UnicodeDecodeError):
        return None
    user_id = event.user_id
    if type(user_id) is not int or not 1 <= user_id <= USER_ID_MAX:
        return None
    attributes = _text(event.attributes)
    return None if attributes is None else (user_id, attributes)


def read_update(raw: bytes) -> tuple[int, int, str] | None:
    """An update's user id, version and attributes as compact JSON; None: it is not of the usual kind."""
    if len(raw) > EVENT_BYTES_MAX:
        return None
    try:
        event = _decode_update(raw)
    except (msgspec.MsgspecError, UnicodeDecodeError):
        return None
    user_id, version = event.user_id, event.version
    if type(user_id) is not int or not 1 <= user_id <= USER_ID_MAX:
        return None
    if type(version) is not int or not 1 <= version <= INT_MAX:
        return None
    attributes = _text(event.attributes)
    return None if attributes is None else (user_id, version, attributes)


def _text(attributes: _Attributes) -> str | None:
    """Attributes as compact JSON; None: there is one that is near a limit, or is not stored as it comes."""
    if len(attributes) > ATTRIBUTES_MAX:
        return None
    for name, value in attributes.items():
        if name not in _known_names and not _is_name(name):
            return None
        if isinstance(value, str):
            if len(value) > _SHORT or "\0" in value:
                return None
        elif not _is_plain(value):
            return None
    text = _encode(attributes)
    return text.decode() if len(text) <= ATTRIBUTES_BYTES_MAX else None


def _is_name(name: str) -> bool:
    if not ATTRIBUTE_NAME.fullmatch(name):
        return False
    if len(_known_names) < _KNOWN_NAMES_MAX:
        _known_names.add(name)
    return True


def _is_plain(value: object) -> bool:
    """Doubles are spelt anew and nulls left out before they are stored: neither is plain."""
    if isinstance(value, bool):
        return True
    if isinstance(value, int):
        return INT_MIN <= value <= INT_MAX
    return (
        isinstance(value, list)
        and len(value) <= LIST_MAX
        and all(len(item) <= _SHORT and "\0" not in item for item in value)
    )
