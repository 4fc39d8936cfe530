"""A condition: parsed once, with an exact refusal, then evaluated for single users. SQL evaluates it in bulk.

The official runtime (package ``cel-expr-python``) parses, checks and evaluates: its result defines the meaning.
"""

from __future__ import annotations

import re
from collections.abc import Iterator, Mapping
from dataclasses import dataclass
from functools import lru_cache
from itertools import islice
from typing import Any, Final

from cel_expr_python import cel

from segsvc.conditions import checked, tree
from segsvc.conditions.environment import CHECKER, RUNTIME
from segsvc.domain.errors import FieldViolation, Reason, ServiceError
from segsvc.domain.segment import CONDITION_BYTES_MAX

DEPTH_MAX: Final = 32
"""Levels of nesting; the runtime's parser enforces this limit."""
_REASONS_SHOWN: Final = 3
_VALUE_SHOWN: Final = 60
_NODE_SHOWN: Final = 200

_RUNTIME_ERROR: Final = re.compile(r"ERROR: <input>:(\d+):(\d+): (.*)")


@dataclass(frozen=True, slots=True)
class Condition:
    """Made by ``parse_condition``.

    Attributes:
        text: the condition as it was given.
        root: the root of its tree.
    """

    text: str
    root: tree.Node

    def holds(self, attributes: Mapping[str, Any]) -> bool:
        """Whether the condition holds for a user. It does not if the whole is an error or any value but a bool."""
        return _holds(self.text, attributes)

    def explain(self, attributes: Mapping[str, Any]) -> str:
        """Why the condition holds or does not, for people: the comparisons that decide, and the user's values."""
        if self.holds(attributes):
            return "the condition holds"
        return "; ".join(islice(_failures(self.root, attributes), _REASONS_SHOWN))


def _failures(node: tree.Node, attributes: Mapping[str, Any]) -> Iterator[str]:
    """The reasons why a node is not true."""
    match node:
        case tree.And(left, right):
            # One side is enough; people read the left one first.
            yield from _failures(left if not _holds(tree.render(left), attributes) else right, attributes)
        case tree.Or(left, right):
            yield from _failures(left, attributes)
            yield from _failures(right, attributes)
        case tree.Not(tree.And(left, right)):
            yield from _failures(tree.Or(tree.Not(left), tree.Not(right)), attributes)
        case tree.Not(tree.Or(left, right)):
            yield from _failures(tree.And(tree.Not(left), tree.Not(right)), attributes)
        case tree.Not(tree.Not(of)):
            yield from _failures(of, attributes)
        case _:
            yield _failure(node, attributes)


def _holds(text: str, attributes: Mapping[str, Any]) -> bool:
    return _value(text, attributes) is True


def _value(text: str, attributes: Mapping[str, Any]) -> Any:
    """The runtime's result; an error is a text."""
    return _program(text).eval(data={"user": dict(attributes)}).value()


# A program takes up to a hundred times as much memory as its text; it is used for single users only.
@lru_cache(maxsize=256)
def _program(text: str) -> Any:
    return RUNTIME.compile(text)


def _failure(node: tree.Node, attributes: Mapping[str, Any]) -> str:
    names = sorted(tree.attributes_of(node))
    found = [
        f"user.{name} is {_shortened(tree.render(_as_node(attributes[name])), _VALUE_SHOWN)}"
        if name in attributes
        else f"user.{name} is absent"
        for name in names
    ]

    text = tree.render(node)
    # No attribute is absent and the result is an error: a value has a type for which the node has no meaning.
    is_error = not isinstance(node, tree.Attribute) and isinstance(_value(text, attributes), str)
    said = "does not apply" if is_error and all(name in attributes for name in names) else "is not true"
    return f"{_shortened(text, _NODE_SHOWN)} {said}" + (f": {', '.join(found)}" if found else "")


def _shortened(text: str, characters: int) -> str:
    return text if len(text) <= characters else f"{text[:characters]}…"


def _as_node(value: Any) -> tree.Node:
    return tree.ListOf(tuple(map(_as_node, value))) if isinstance(value, list) else tree.Constant(value)


@lru_cache(maxsize=1024)  # a tree takes up to twenty times as much memory as its text
def parse_condition(text: str, name: str = "rule.condition") -> Condition:
    """Parse a condition that is not empty.

    Args:
        name: the request's field with the condition, for the refusal.

    Raises:
        ServiceError: CONDITION_INVALID, with line and column.
    """
    size = len(text.encode("utf-8", "surrogatepass"))
    if size > CONDITION_BYTES_MAX:
        raise _invalid(name, f"must be at most {CONDITION_BYTES_MAX} bytes, is {size}", 1, 1)
    if "\0" in text:
        raise _invalid(name, "must have U+0000 only as an escape", *_line_and_column(text, text.index("\0")))

    try:
        program = CHECKER.compile(text)
    except TypeError:
        raise _invalid(name, "must not contain half of a surrogate pair", 1, 1) from None
    except RuntimeError as error:
        raise _from_runtime(name, str(error)) from None

    kind = program.return_type()
    if kind not in (cel.Type.BOOL, cel.Type.DYN):
        raise _invalid(name, f"must be a bool, is of type {str(kind).lower()}", 1, 1)

    try:
        root = checked.to_tree(program.serialize())
    except checked.NotInSubset as refusal:
        raise _invalid(name, refusal.what, *_line_and_column(text, refusal.position)) from None

    return Condition(text, root)


def _line_and_column(text: str, position: int) -> tuple[int, int]:
    """Line and column, both counted from 1, in characters."""
    before = text[:position]
    return before.count("\n") + 1, position - (before.rfind("\n") + 1) + 1


def _from_runtime(name: str, message: str) -> ServiceError:
    found = _RUNTIME_ERROR.search(message)
    if found:
        return _invalid(name, found[3].removesuffix(" [INVALID_ARGUMENT]"), int(found[1]), int(found[2]))
    # The parser checks the depth of the text, then of the parsed expression. Neither message has a position.
    if "recursion limit" in message or "recursion depth" in message:
        return _invalid(name, f"must be nested at most {DEPTH_MAX} levels deep", 1, 1)
    return _invalid(name, "is not a CEL expression", 1, 1)


def _invalid(name: str, what: str, line: int, column: int) -> ServiceError:
    where = f"line {line}, column {column}: {what}"
    return ServiceError(
        Reason.CONDITION_INVALID,
        f"{name}: {where}",
        {"field": name, "line": str(line), "column": str(column)},
        (FieldViolation(name, where),),
    )
