"""Literals of conditions: how they are written in SQL, and what can be computed from literals alone."""

from __future__ import annotations

import json
import math
import operator
from collections.abc import Callable
from decimal import Decimal
from typing import Any, Final, TypeGuard

import sqlalchemy as sa
from sqlalchemy.dialects.postgresql import JSONB

from segsvc.conditions.tree import Comparison, Constant, ListOf, Node, Scalar, StringTest

EXACT_BELOW: Final = 2**53
"""Below this size, comparing numbers exactly and comparing them as doubles agree. From here on, literals need more
SQL."""

ORDER: Final[dict[str, Callable[[Any, Any], Any]]] = {
    "<": operator.lt, "<=": operator.le, ">": operator.gt, ">=": operator.ge,
}  # fmt: skip
_TESTS: Final[dict[str, Callable[[str, str], bool]]] = {
    "startsWith": str.startswith, "endsWith": str.endswith, "contains": operator.contains,
}  # fmt: skip
_OTHER_TYPES_START: Final = (*"0123456789-", "[", "{")
"""The characters with which the text of a number, a list or an object starts."""


def is_constant(node: Node) -> bool:
    """Whether the node is a literal, or a list of literals only."""
    return isinstance(node, Constant) or (isinstance(node, ListOf) and all(map(is_constant, node.items)))


def is_large_number(node: Node) -> bool:
    """Whether the node is a literal number that is compared correctly only if its type is taken into account."""
    return isinstance(node, Constant) and _is_number(node.value) and not -EXACT_BELOW < node.value < EXACT_BELOW  # type: ignore[operator]


def is_small_number(node: Node) -> TypeGuard[Constant]:
    return isinstance(node, Constant) and _is_number(node.value) and not is_large_number(node)


def is_plain(node: Node) -> bool:
    """Whether the node is constant and equals an attribute, or a list of attributes, exactly when the two are equal as
    jsonb."""
    if isinstance(node, ListOf):
        return all(map(is_plain, node.items))
    return isinstance(node, Constant) and not is_large_number(node)


def is_plain_text(node: Node) -> TypeGuard[Constant]:
    """Whether the node is a literal string that cannot be the text of a bool, a number or a list.

    Equality with it needs no check of the type: an attribute with this text is this string.
    """
    if not isinstance(node, Constant) or not isinstance(node.value, str) or "\0" in node.value:
        return False
    return node.value not in ("true", "false") and not node.value.startswith(_OTHER_TYPES_START)


def literal(node: Node) -> sa.ColumnElement[Any]:
    """A constant as jsonb."""
    return sa.literal(json_text(node), sa.Text).cast(JSONB)


def json_text(node: Node) -> str:
    """A constant as JSON."""
    return json.dumps(_plain(node))


def _plain(node: Node) -> Any:
    if isinstance(node, ListOf):
        return [_plain(item) for item in node.items]
    assert isinstance(node, Constant)
    # No attribute is infinite or has a U+0000 in it, and jsonb cannot hold either. An object serves instead: no
    # attribute is one.
    if node.value in (math.inf, -math.inf):
        return {"infinite": node.value > 0}
    if isinstance(node.value, str) and "\0" in node.value:
        return {"escaped": json.dumps(node.value)}
    return node.value


def decimal(number: Scalar) -> Decimal:
    """A finite number, exactly as it is written."""
    return Decimal(repr(number))


# -- what literals alone determine -------------------------------------------------------------------------------------


def same(left: Node, right: Node) -> bool:
    """CEL's equality of constants; Python's own compares an int with a double exactly, and True with 1."""
    if isinstance(left, ListOf) and isinstance(right, ListOf):
        return len(left.items) == len(right.items) and all(map(same, left.items, right.items))
    if not (isinstance(left, Constant) and isinstance(right, Constant)):
        return False
    one, other = left.value, right.value
    if _is_number(one) and _is_number(other) and type(one) is not type(other):
        return float(one) == float(other)
    return type(one) is type(other) and one == other


def ordered(comparison: Comparison, left: Constant, right: Constant) -> bool | None:
    """CEL's order of literals; None: an error."""
    one, other = left.value, right.value
    if _is_number(one) and _is_number(other):
        if type(one) is not type(other):
            one, other = float(one), float(other)
    elif type(one) is not type(other):
        return None
    return bool(ORDER[comparison](one, other))


def tested(function: StringTest, text: Constant, part: Constant) -> bool | None:
    """CEL's test of a literal string with another one; None: an error."""
    if not (isinstance(text.value, str) and isinstance(part.value, str)):
        return None
    return _TESTS[function](text.value, part.value)


def _is_number(value: object) -> bool:
    return isinstance(value, int | float) and not isinstance(value, bool)
