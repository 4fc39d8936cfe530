"""The syntax tree of a condition: the part of CEL that has an equivalent in SQL."""

from __future__ import annotations

import json
from collections.abc import Callable, Sequence
from dataclasses import dataclass, fields
from typing import Final, Literal

Comparison = Literal["==", "!=", "<", "<=", ">", ">="]
StringTest = Literal["startsWith", "endsWith", "contains"]
VersionTest = Literal["isLessThan", "isGreaterThan"]
Scalar = str | int | float | bool


@dataclass(frozen=True, slots=True)
class Constant:
    value: Scalar


@dataclass(frozen=True, slots=True)
class Attribute:
    """``user.name``: an error if the user does not have the attribute."""

    name: str


@dataclass(frozen=True, slots=True)
class ListOf:
    """A list literal: an error if one of its items is an error."""

    items: tuple[Node, ...]


@dataclass(frozen=True, slots=True)
class Has:
    """``has(user.name)``"""

    name: str


@dataclass(frozen=True, slots=True)
class Size:
    """Number of code points of a string or of items of a list; an error for other types."""

    of: Node


@dataclass(frozen=True, slots=True)
class Lower:
    """``of.lowerAscii()``: the letters A to Z become small; an error for anything but a string."""

    of: Node


@dataclass(frozen=True, slots=True)
class Time:
    """``timestamp(of)``: a moment, from a string of RFC 3339 or, in an attribute, an int of seconds since 1970; an
    error for anything else (``times``)."""

    of: Node


@dataclass(frozen=True, slots=True)
class IsVersion:
    """``isSemver(of)``: whether a string is a version; an error for anything but a string."""

    of: Node


@dataclass(frozen=True, slots=True)
class Version:
    """``semver(of)``: a version, from a string; an error for anything else (``versions``). Only an operand of the two
    nodes below."""

    of: Node


@dataclass(frozen=True, slots=True)
class CompareVersions:
    """``left.isLessThan(right)``, ``left.isGreaterThan(right)``"""

    function: VersionTest
    left: Version
    right: Version


@dataclass(frozen=True, slots=True)
class OrderOfVersions:
    """``left.compareTo(right)``: -1, 0 or 1"""

    left: Version
    right: Version


@dataclass(frozen=True, slots=True)
class Compare:
    operator: Comparison
    left: Node
    right: Node


@dataclass(frozen=True, slots=True)
class In:
    item: Node
    container: Node


@dataclass(frozen=True, slots=True)
class Test:
    function: StringTest
    text: Node
    part: Node


@dataclass(frozen=True, slots=True)
class Not:
    of: Node


@dataclass(frozen=True, slots=True)
class And:
    left: Node
    right: Node


@dataclass(frozen=True, slots=True)
class Or:
    left: Node
    right: Node


Node = (
    Constant
    | Attribute
    | ListOf
    | Has
    | Size
    | Lower
    | Time
    | IsVersion
    | Version
    | CompareVersions
    | OrderOfVersions
    | Compare
    | In
    | Test
    | Not
    | And
    | Or
)


def operands(node: Node) -> tuple[Node, ...]:
    """The nodes of which a node is made, in the order in which they are written."""
    if isinstance(node, ListOf):
        return node.items
    return tuple(value for value in _values(node) if isinstance(value, Node))


def rebuilt(node: Node, parts: Sequence[Node]) -> Node:
    """The same kind of node with other operands, as many as it has."""
    if isinstance(node, ListOf):
        return ListOf(tuple(parts))
    following = iter(parts)
    kind: Callable[..., Node] = type(node)
    return kind(*(next(following) if isinstance(value, Node) else value for value in _values(node)))


def _values(node: Node) -> list[object]:
    return [getattr(node, field.name) for field in fields(node)]


_OR, _AND, _RELATION, _UNARY, _PRIMARY = range(5)
"""Precedence of the operators, from loose to tight."""


def render(node: Node) -> str:
    """The node as CEL text with as few parentheses as possible, so it is nested no deeper than the parsed text."""
    return _render(node)[0]


_FUNCTIONS: Final = {Size: "size", Time: "timestamp", Version: "semver", IsVersion: "isSemver"}


def _render(node: Node) -> tuple[str, int]:
    """The text and its precedence."""
    match node:
        case Constant(value):
            return _literal(value), _PRIMARY
        case Attribute(name):
            return f"user.{name}", _PRIMARY
        case Has(name):
            return f"has(user.{name})", _PRIMARY
        case ListOf(items):
            return f"[{', '.join(map(render, items))}]", _PRIMARY
        case Size(of) | Time(of) | Version(of) | IsVersion(of):
            return f"{_FUNCTIONS[type(node)]}({render(of)})", _PRIMARY
        case Lower() | Test() | CompareVersions() | OrderOfVersions():
            return _method(node), _PRIMARY
        case _:
            return _operation(node)


def _method(node: Lower | Test | CompareVersions | OrderOfVersions) -> str:
    match node:
        case Lower(of):
            return f"{_within(of, _PRIMARY)}.lowerAscii()"
        case OrderOfVersions(left, right):
            return f"{render(left)}.compareTo({render(right)})"
        case Test(function, of, argument) | CompareVersions(function, of, argument):
            return f"{_within(of, _PRIMARY)}.{function}({render(argument)})"


def _operation(node: Compare | In | Not | And | Or) -> tuple[str, int]:
    match node:
        case Compare(operator, left, right):
            return f"{_within(left, _RELATION)} {operator} {_within(right, _UNARY)}", _RELATION
        case In(item, container):
            return f"{_within(item, _RELATION)} in {_within(container, _UNARY)}", _RELATION
        case Not(of):
            return f"!{_within(of, _UNARY)}", _UNARY
        case And(left, right):
            return f"{_within(left, _AND)} && {_within(right, _AND)}", _AND
        case Or(left, right):
            return f"{_within(left, _OR)} || {_within(right, _OR)}", _OR


def _within(node: Node, needed: int) -> str:
    text, binds = _render(node)
    return text if binds >= needed else f"({text})"


def _literal(value: Scalar) -> str:
    if isinstance(value, bool):
        return "true" if value else "false"
    if isinstance(value, str):
        return json.dumps(value, ensure_ascii=False)
    # A literal too large for a double is infinite.
    return {"inf": "1e400", "-inf": "-1e400"}.get(repr(value), repr(value))


def attributes_of(node: Node) -> frozenset[str]:
    """Names of the attributes that a node reads."""
    if isinstance(node, Attribute | Has):
        return frozenset({node.name})
    return frozenset().union(*map(attributes_of, operands(node)))
