"""Tokens of ``SEGSVC_AUTH_TOKENS_FILE``. The file holds their SHA-256: who reads it cannot call with it."""

from __future__ import annotations

import hashlib
import math
from collections.abc import Mapping
from dataclasses import dataclass
from datetime import datetime
from types import MappingProxyType
from typing import Annotated, Final

import msgspec

from segsvc.access.files import AccessFileError
from segsvc.domain.access import NAME_CHARACTERS_MAX, ROLES, Principal, Role, highest, is_name

DIGEST_BYTES: Final = 32


@dataclass(frozen=True, slots=True)
class Credential:
    """Whom a token or a JWT stands for, until ``expires`` (Unix time in seconds; infinity: for ever)."""

    principal: Principal
    expires: float


class _Entry(msgspec.Struct, forbid_unknown_fields=True):
    """One token. A field that is not known is refused: a misspelt ``expires`` would make a token that never expires."""

    name: str
    sha256: str
    roles: list[str]
    # With its offset: a time without one would depend on the machine.
    expires: Annotated[datetime, msgspec.Meta(tz=True)] | None = None


def digest_of(token: str) -> bytes:
    """The SHA-256 by which a token is known."""
    return hashlib.sha256(token.encode("utf-8", "surrogatepass")).digest()


def parse_tokens(data: bytes) -> Mapping[bytes, Credential]:
    """SHA-256 of each token in the file → whom it stands for.

    Raises:
        AccessFileError: it is not a list of tokens. The text names the entry by its number.
    """
    try:
        entries = msgspec.json.decode(data, type=list[_Entry])
    except (msgspec.DecodeError, UnicodeDecodeError) as error:
        raise AccessFileError(f"is no JSON list of tokens: {error}") from None

    known: dict[bytes, Credential] = {}
    for number, entry in enumerate(entries):
        digest = _digest(number, entry.sha256)
        if digest in known:
            raise AccessFileError(f"entry {number}: its token comes twice")
        principal = Principal(
            checked_name(f"entry {number}", entry.name), checked_roles(f"entry {number}", entry.roles)
        )
        known[digest] = Credential(principal, entry.expires.timestamp() if entry.expires else math.inf)
    return MappingProxyType(known)


def parse_principals(data: bytes) -> Mapping[str, Principal]:
    """The file of names in certificates: name → principal.

    Raises:
        AccessFileError: it is not a map of names to lists of roles.
    """
    try:
        entries = msgspec.json.decode(data, type=dict[str, list[str]])
    except (msgspec.DecodeError, UnicodeDecodeError) as error:
        raise AccessFileError(f"is no JSON map of names to lists of roles: {error}") from None
    return MappingProxyType(
        {
            name: Principal(checked_name(f"name {number}", name), checked_roles(f"name {number}", roles))
            for number, (name, roles) in enumerate(entries.items())
        }
    )


def checked_name(where: str, name: str) -> str:
    """The name, if it can be a principal's. Raises AccessFileError."""
    if not is_name(name):
        raise AccessFileError(f"{where}: the name must be 1 to {NAME_CHARACTERS_MAX} printable characters")
    return name


def checked_roles(where: str, roles: list[str]) -> Role | None:
    """The highest role. Raises AccessFileError: one of them is no role."""
    for role in roles:
        if role not in ROLES:
            raise AccessFileError(f"{where}: the roles are {', '.join(ROLES)}; one of its roles is none of them")
    return highest(roles)


def _digest(number: int, text: str) -> bytes:
    try:
        digest = bytes.fromhex(text)
    except ValueError:
        digest = b""
    if len(digest) != DIGEST_BYTES or len(text) != 2 * DIGEST_BYTES:
        # Perhaps the token itself stands here, so the text is not shown.
        raise AccessFileError(f"entry {number}: sha256 must be {2 * DIGEST_BYTES} hexadecimal digits")
    return digest
