"""A condition split at its ``&&`` and ``||``: all parts, which are evaluated for a user for whom no side decides early.

While the first comparison decides for all users, a condition is as cheap as that comparison: ``has(user.new) && …``
costs nothing until an event brings ``new``. So the cost of a condition is the sum of the costs of its parts.
"""

from __future__ import annotations

from segsvc.conditions import tree
from segsvc.conditions.tree import Node

_ANY = tree.Constant(True)
"""Replaces an ``&&`` or ``||`` inside another expression."""


def steps(root: Node) -> list[Node]:
    """The parts, none of which contains ``&&`` or ``||``. The operands of these operators are parts of their own."""
    found: list[Node] = []
    _add(root, found)
    return found


def _add(node: Node, found: list[Node]) -> None:
    apart = _apart(node, found)
    if apart is not _ANY:
        found.append(apart)


def _apart(node: Node, found: list[Node]) -> Node:
    if isinstance(node, tree.And | tree.Or):
        _add(node.left, found)
        _add(node.right, found)
        return _ANY
    return tree.rebuilt(node, [_apart(operand, found) for operand in tree.operands(node)])
