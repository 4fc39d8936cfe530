"""Page tokens and page sizes of the public interface.

A token is ``base64url(digest ‖ JSON)``. The JSON says where the page ended; the digest covers the JSON and the scope
(which list, with which parameters). So a token that was cut, altered by accident or taken from another list is
recognised. This protects from mistakes, not from malice: a forged token can only ask for another place in the same
list.
"""

from __future__ import annotations

import base64
import binascii
import hashlib
import json
from typing import Any

from segsvc.domain.errors import Reason, ServiceError, invalid_field

PAGE_SIZE_DEFAULT = 50
PAGE_SIZE_MAX = 1000

_DIGEST_BYTES = 8


def page_size_of(requested: int) -> int:
    """The page size of a request: 0 means the default, and more than the maximum means the maximum.

    Raises:
        ServiceError: FIELD_INVALID for a negative size.
    """
    if requested < 0:
        raise invalid_field("page_size", f"must not be negative, is {requested}")
    return min(requested, PAGE_SIZE_MAX) or PAGE_SIZE_DEFAULT


def encode_token(scope: str, position: list[Any]) -> str:
    """A token for a position (JSON values) in the list that ``scope`` names."""
    payload = json.dumps(position, separators=(",", ":")).encode()
    return _spelled(_digest(scope, payload) + payload)


def decode_token(scope: str, token: str, field: str) -> Any:
    """The position in a token.

    Args:
        field: the request's field that holds the token, for the error.

    Raises:
        ServiceError: PAGE_TOKEN_INVALID unless ``encode_token`` made it for the same scope.
    """
    try:
        raw = base64.b64decode(token.encode("ascii") + b"=" * (-len(token) % 4), altchars=b"-_", validate=True)
    except (UnicodeEncodeError, binascii.Error, ValueError):
        raise token_invalid(field) from None

    digest, payload = raw[:_DIGEST_BYTES], raw[_DIGEST_BYTES:]
    # Base64 has several spellings of the same bytes; encode_token writes only one of them.
    if digest != _digest(scope, payload) or token != _spelled(raw):
        raise token_invalid(field)

    return json.loads(payload)


def token_invalid(field: str) -> ServiceError:
    """A token that does not belong to this request."""
    return invalid_field(
        field,
        "is not a token that was given for this request; start again without one",
        Reason.PAGE_TOKEN_INVALID,
    )


def _spelled(raw: bytes) -> str:
    return base64.urlsafe_b64encode(raw).rstrip(b"=").decode("ascii")


def _digest(scope: str, payload: bytes) -> bytes:
    return hashlib.blake2b(payload, digest_size=_DIGEST_BYTES, key=hashlib.sha256(scope.encode()).digest()).digest()
