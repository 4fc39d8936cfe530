"""Versions by semver.org 2.0.0, for literals and for the runtime's functions. SQL reads attributes by the same rules.

A version's key is a sequence of texts. Versions have the order of their keys: text by text, in the order of code
points; where one key begins with the other one, the shorter key is less. What follows a "+" does not count.
"""

from __future__ import annotations

import re
from typing import Final

_NUMBER: Final = "(?:0|[1-9][0-9]*)"
_IDENTIFIER: Final = f"(?:{_NUMBER}|[0-9]*[a-zA-Z-][0-9a-zA-Z-]*)"
_BUILD: Final = "[0-9a-zA-Z-]+"
# For Python and for PostgreSQL.
PATTERN: Final = (
    rf"^({_NUMBER})[.]({_NUMBER})[.]({_NUMBER})(?:-({_IDENTIFIER}(?:[.]{_IDENTIFIER})*))?"
    rf"(?:[+]{_BUILD}(?:[.]{_BUILD})*)?$"
)
NUMBER: Final = "^[0-9]+$"
"""An identifier that is compared as a number."""
_COMPILED: Final = re.compile(PATTERN.removesuffix("$") + r"\Z")
_COMPILED_NUMBER: Final = re.compile(r"[0-9]+\Z")

PRE_RELEASE: Final = "0"
RELEASE: Final = "1"
"""After the three numbers: a pre-release comes before its release."""
OF_NUMBER: Final = "0"
OF_TEXT: Final = "1"
"""Before an identifier: numbers come before texts."""
LENGTH_DIGITS: Final = 4
"""A number is preceded by its length, so that texts have the order of the numbers. An attribute has at most 256 bytes,
a condition 4096."""


def key_of(text: str) -> tuple[str, ...] | None:
    """The key of a version; None: the text is none."""
    found = _COMPILED.match(text)
    if found is None:
        return None
    numbers = tuple(_of_number(found[group]) for group in (1, 2, 3))
    if found[4] is None:
        return (*numbers, RELEASE)
    return (*numbers, PRE_RELEASE, *map(_of_identifier, found[4].split(".")))


def _of_number(digits: str) -> str:
    return f"{len(digits):0{LENGTH_DIGITS}}{digits}"


def _of_identifier(text: str) -> str:
    return OF_NUMBER + _of_number(text) if _COMPILED_NUMBER.match(text) else OF_TEXT + text
