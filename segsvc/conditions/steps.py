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
    match node:
        case tree.And(left, right) | tree.Or(left, right):
            _add(left, found)
            _add(right, found)
            return _ANY
        case tree.Not(of):
            return tree.Not(_apart(of, found))
        case tree.Size(of):
            return tree.Size(_apart(of, found))
        case tree.ListOf(items):
            return tree.ListOf(tuple(_apart(item, found) for item in items))
        case tree.Compare(operator, left, right):
            return tree.Compare(operator, _apart(left, found), _apart(right, found))
        case tree.In(item, container):
            return tree.In(_apart(item, found), _apart(container, found))
        case tree.Test(function, text, part):
            return tree.Test(function, _apart(text, found), _apart(part, found))
        case tree.Constant() | tree.Attribute() | tree.Has():
            return node
