"""CEL's environments: what an author may write, and what the runtime computes.

Versions have a type of their own for the checker, so that only their functions take them. The runtime cannot hold
values of such a type; there a version is its key as bytes, which nothing else in a condition is.
"""

from __future__ import annotations

from typing import Final

from cel_expr_python import cel
from cel_expr_python.ext import ext_strings

from segsvc.conditions.versions import key_of

_STRING: Final = cel.Type.STRING


def _version(text: str) -> bytes:
    key = key_of(text)
    if key is None:
        raise ValueError("String to version conversion failed")
    # This byte is less than any in a key's texts, so bytes have the order of keys. (The runtime ends values at a zero.)
    return b"\1".join(part.encode() for part in key)


def _functions(version: cel.Type) -> list[cel.FunctionDecl]:
    pair = [version, version]
    return [
        cel.FunctionDecl("semver", [cel.Overload("semver_of_string", version, [_STRING], False, _version)]),
        cel.FunctionDecl(
            "isSemver",
            [cel.Overload("string_is_semver", cel.Type.BOOL, [_STRING], False, lambda text: key_of(text) is not None)],
        ),
        cel.FunctionDecl(
            "isLessThan",
            [cel.Overload("semver_is_less", cel.Type.BOOL, pair, True, lambda left, right: left < right)],
        ),
        cel.FunctionDecl(
            "isGreaterThan",
            [cel.Overload("semver_is_greater", cel.Type.BOOL, pair, True, lambda left, right: left > right)],
        ),
        cel.FunctionDecl(
            "compareTo",
            [
                cel.Overload(
                    "semver_compare",
                    cel.Type.INT,
                    pair,
                    True,
                    lambda left, right: (left > right) - (left < right),
                )
            ],
        ),
    ]


def _environment(version: cel.Type) -> cel.Env:
    return cel.NewEnv(
        variables={"user": cel.Type.Map(_STRING, cel.Type.DYN)},
        extensions=[ext_strings.ExtStrings()],
        functions=_functions(version),
    )


CHECKER: Final = _environment(cel.Type.AbstractType("semver"))
"""Parses and checks. Its expressions cannot be evaluated."""
RUNTIME: Final = _environment(cel.Type.BYTES)
"""Evaluates what CHECKER accepts."""
