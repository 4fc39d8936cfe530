"""The syntax tree of a condition: the part of CEL that has an equivalent in SQL."""

from __future__ import annotations

import json
from dataclasses import dataclass
from typing import Literal

Comparison = Literal["==", "!=", "<", "<=", ">", ">="]
StringTest = Literal["startsWith", "endsWith", "contains"]
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


Node = Constant | Attribute | ListOf | Has | Size | Compare | In | Test | Not | And | Or


_OR, _AND, _RELATION, _UNARY, _PRIMARY = range(5)
"""Precedence of the operators, from loose to tight."""


def render(node: Node) -> str:
    """The node as CEL text with as few parentheses as possible, so it is nested no deeper than the parsed text."""
    return _render(node)[0]


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
        case Size(of):
            return f"size({render(of)})", _PRIMARY
        case Test(function, text, part):
            return f"{_within(text, _PRIMARY)}.{function}({render(part)})", _PRIMARY
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
    match node:
        case Attribute(name) | Has(name):
            return frozenset({name})
        case Constant():
            return frozenset()
        case ListOf(items):
            return frozenset().union(*map(attributes_of, items))
        case Size(of) | Not(of):
            return attributes_of(of)
        case In(left, right) | And(left, right) | Or(left, right) | Compare(_, left, right) | Test(_, left, right):
            return attributes_of(left) | attributes_of(right)
