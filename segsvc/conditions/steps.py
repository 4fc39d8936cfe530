"""A condition taken apart at its ``&&`` and ``||``: what has to be evaluated for a user for whom no side decides early.

A condition is as cheap as its first comparison while that decides for everybody: ``has(user.new) && …`` costs nothing
until an event brings ``new``. So what a condition may cost is what its parts cost together.
"""

from __future__ import annotations

from segsvc.conditions import tree
from segsvc.conditions.tree import Node

_ANY = tree.Constant(True)
"""In place of an ``&&`` or ``||`` within something else."""


def steps(root: Node) -> list[Node]:
    """Parts without ``&&`` and ``||``. Each of those operators has its operands among them."""
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
