"""How large a condition becomes as SQL, told from its tree.

SQL has no name for an intermediate value: to look at its type and then at itself, it is written down twice or more. Of
attributes and literals that is little. But a comparison within a comparison within a comparison multiplies, and a few
hundred bytes of CEL would become gigabytes.
"""

from __future__ import annotations

from typing import Final

from segsvc.conditions import tree
from segsvc.conditions.tree import Constant, ListOf, Node

WEIGHT_MAX: Final = 20_000
"""Whatever is not nested stays far below, at all the length that a condition may have. About 2 MB of SQL."""

_EQUAL, _ORDERED, _SIZE, _LISTED = 6, 8, 4, 2
"""How often each operand is written down; see ``postgres.condition_sql``. A test holds the weights against its text."""
EXACT_BELOW: Final = 2**53
"""Smaller numbers are compared alike as they are and as doubles; from here on literals need more SQL."""


def weight(node: Node) -> int:
    """About how many attributes and literals the condition's SQL has; never far too few."""
    if is_constant(node):
        return 1
    match node:
        case ListOf(items):
            return 1 + _LISTED * sum(map(weight, items))
        case tree.Size(of):
            return 1 + _SIZE * weight(of)
        case tree.Not(of):
            return 1 + weight(of)
        case tree.And(left, right) | tree.Or(left, right) | tree.Test(_, left, right):
            return 1 + weight(left) + weight(right)
        case tree.Compare("==" | "!=", left, right):
            return _of_equal(weight(left), weight(right), is_bool(left) or is_bool(right))
        case tree.Compare(_, left, right):
            return 1 + _ORDERED * (weight(left) + weight(right))
        case tree.In(item, ListOf(items)):
            one = weight(item)
            each = [weight(other) for other in items if _is_compared_alone(other)]
            others = sum(_of_equal(one, other, is_bool(item)) + other for other in each)
            return 1 + _LISTED * one + len(items) - len(each) + others
        case tree.In(item, container):
            return 1 + _LISTED * (weight(item) + weight(container))
        case _:
            return 1


def is_bool(node: Node) -> bool:
    """Whether it is a bool or an error, never anything else."""
    return isinstance(node, tree.Compare | tree.In | tree.Test | tree.Has | tree.And | tree.Or | tree.Not)


def is_constant(node: Node) -> bool:
    """Whether it is a literal, or a list of literals alone."""
    return isinstance(node, Constant) or (isinstance(node, ListOf) and all(map(is_constant, node.items)))


def _of_equal(left: int, right: int, plain: bool) -> int:
    return 1 + (1 if plain else _EQUAL) * (left + right)


def _is_compared_alone(item: Node) -> bool:
    """Whether it is not looked up together with the other items of its list."""
    if not isinstance(item, Constant):
        return not is_constant(item)
    return isinstance(item.value, int | float) and abs(item.value) >= EXACT_BELOW
