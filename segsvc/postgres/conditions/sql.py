"""Conditions as SQL over JSONB attributes, so that conditions of a million users are evaluated where the users are
stored.

SQL's NULL stands for CEL's error: ``NULL OR true`` is true and ``NOT NULL`` is NULL, as with CEL's ``||`` and ``!``.
Every node becomes an expression that cannot raise: a cast occurs only inside a CASE that has checked the type before,
and no constant expression is left that the planner could fold. Values are bound parameters.

Numbers: CEL compares an int with a double as doubles. Attributes distinguish the two by their scale
(``domain.events``). A literal below 2**53 in size needs no such care: there, comparing exactly and comparing as doubles
agree.

Length: to check a value's type and then use the value, its expression is written twice or more. That is short for an
attribute, but a comparison within a comparison would multiply it. SQL can name only the columns of a subquery, so what
is computed within a comparison becomes such a column, and is written once.
"""

from __future__ import annotations

from collections.abc import Iterator
from functools import reduce
from typing import Any, Final

import sqlalchemy as sa
from sqlalchemy.dialects.postgresql import ARRAY, JSONB

from segsvc.conditions import Condition, tree
from segsvc.conditions.tree import Constant, ListOf, Node
from segsvc.postgres.conditions.attributes import Attributes, InObject, Named
from segsvc.postgres.conditions.literals import (
    ORDER,
    decimal,
    is_constant,
    is_large_number,
    is_plain,
    is_plain_text,
    is_small_number,
    json_text,
    literal,
    ordered,
    same,
    tested,
)
from segsvc.postgres.conditions.times import as_json, time_of, time_of_literal, time_of_text
from segsvc.postgres.conditions.values import (
    FENCE,
    Sql,
    concatenated,
    double,
    equal_to_large,
    is_double,
    is_type,
    numbers_equal,
    numeric,
    ordered_to_literal,
    text,
    when,
)
from segsvc.postgres.conditions.versions import is_version, key_of_literal, key_of_text, order_of

_ARGUMENTS_MAX: Final = 100
"""PostgreSQL's limit of a function's arguments."""
_MIRRORED: Final[dict[tree.Comparison, tree.Comparison]] = {"<": ">", "<=": ">=", ">": "<", ">=": "<="}
_ERROR: Final = sa.null().cast(sa.Boolean)
_NO_TEXT: Final = sa.null().cast(sa.Text)
_UPPER: Final = "ABCDEFGHIJKLMNOPQRSTUVWXYZ"


def condition_clause(condition: Condition, attributes: sa.ColumnElement[Any]) -> sa.ColumnElement[bool]:
    """True where the condition holds, false elsewhere; never NULL.

    Args:
        attributes: a JSONB object; a member that it lacks is an absent attribute.
    """
    return Compiler(InObject(attributes)).clause(condition)


class Compiler:
    """Turns conditions into SQL."""

    def __init__(self, attributes: Attributes) -> None:
        self._attributes = attributes

    def clause(self, condition: Condition) -> sa.ColumnElement[bool]:
        """See ``condition_clause``."""
        return sa.func.coalesce(self.truth(condition.root), sa.false())

    def truth(self, node: Node) -> Sql:
        """The node as boolean; NULL: an error, or not a bool."""
        match node:
            case Constant(bool() as value):
                return sa.literal(value)
            case tree.Has(name):
                return self._attributes.has(name)
            case tree.Not(of):
                return sa.not_(self.truth(of))
            case tree.And(left, right):
                return sa.and_(self.truth(left), self.truth(right)).self_group()
            case tree.Or(left, right):
                return sa.or_(self.truth(left), self.truth(right)).self_group()
            case tree.Compare() | tree.In():
                return self._related(node)
            case tree.Test(function, of, part):
                return self._test(function, of, part)
            case tree.CompareVersions(function, left, right):
                order = order_of(self._version(left), self._version(right))
                return order < 0 if function == "isLessThan" else order > 0
            case tree.IsVersion(of):
                return is_version(self._string(of))
            case tree.Attribute():
                flag = self._json(node)
                return when(is_type(flag, "boolean"), flag.cast(sa.Boolean))
            case _:
                return _ERROR

    def _related(self, node: tree.Compare | tree.In) -> Sql:
        parts: list[Node] = []
        if not _writes_once(node):
            node = _without_parts(node, parts)
        if not parts:
            return self._relation(node)

        columns = [self._json(part).label(f"v{number}") for number, part in enumerate(parts)]
        # Correlated: attributes are columns of the query around it.
        named = sa.select(*columns).correlate_except().offset(FENCE).subquery()
        names = map(_name, range(len(parts)))
        inner = Compiler(Named(self._attributes, dict(zip(names, named.c, strict=True))))
        return sa.select(inner.truth(node)).correlate_except(named).scalar_subquery()

    def _relation(self, node: tree.Compare | tree.In) -> Sql:
        match node:
            case tree.Compare("==", left, right):
                return self._equal(left, right)
            case tree.Compare("!=", left, right):
                return sa.not_(self._equal(left, right))
            case tree.Compare(op, left, right):
                return self._ordered(op, left, right)
            case tree.In(item, container):
                return self._in(item, container)

    # -- values -----------------------------------------------------------------------------------------------------

    def _json(self, node: Node) -> Sql:
        """The node's value as jsonb; NULL: an error."""
        match node:
            case tree.Attribute(name):
                return self._attributes.json(name)
            case Constant():
                return literal(node)
            case ListOf():
                return literal(node) if is_constant(node) else when(self._sound(node), self._built(node))
            case tree.Size(of):
                return sa.func.to_jsonb(self._size(of), type_=JSONB())
            case tree.OrderOfVersions(left, right):
                order = order_of(self._version(left), self._version(right))
                return sa.func.to_jsonb(order, type_=JSONB())
            case tree.Lower():
                return sa.func.to_jsonb(self._string(node), type_=JSONB())
            case tree.Time():
                return as_json(self._time(node))
            case _:
                return sa.func.to_jsonb(self.truth(node), type_=JSONB())

    def _sound(self, *nodes: Node) -> Sql:
        """Whether none of these nodes is an error or contains one."""
        return sa.and_(sa.true(), *(self._json(leaf).is_not(None) for node in nodes for leaf in _leaves(node)))

    def _built(self, node: ListOf) -> Sql:
        """A sound list as jsonb."""
        if is_constant(node):
            return literal(node)
        values = [self._built(item) if isinstance(item, ListOf) else self._json(item) for item in node.items]
        parts = [
            sa.func.jsonb_build_array(*values[first : first + _ARGUMENTS_MAX], type_=JSONB())
            for first in range(0, len(values), _ARGUMENTS_MAX)
        ]
        return reduce(concatenated, parts)

    def _size(self, of: Node) -> Sql:
        if isinstance(of, Constant):
            return sa.literal(len(of.value)) if isinstance(of.value, str) else sa.null().cast(sa.Integer)
        if isinstance(of, ListOf):
            return when(self._sound(of), sa.literal(len(of.items)))
        value = self._json(of)
        return sa.case(
            (is_type(value, "string"), sa.func.char_length(text(value))),
            (is_type(value, "array"), sa.func.jsonb_array_length(value)),
        )

    # -- equality ---------------------------------------------------------------------------------------------------

    def _equal(self, left: Node, right: Node) -> Sql:
        if isinstance(left, ListOf) and isinstance(right, ListOf):
            # Both sides are evaluated completely before they are compared, so an error in either is an error of the
            # comparison.
            return when(self._sound(left, right), self._items_equal(left, right))
        if is_constant(left) and is_constant(right):
            return sa.literal(same(left, right))
        if isinstance(left, tree.Time) or isinstance(right, tree.Time):
            return self._times_equal(left, right)
        for lowered, constant in ((left, right), (right, left)):
            if isinstance(lowered, tree.Lower) and is_plain_text(constant):
                return self._string(lowered) == sa.literal(constant.value, sa.Text)

        if is_large_number(left):
            left, right = right, left
        for attribute, constant in ((left, right), (right, left)):
            if isinstance(attribute, tree.Attribute) and is_plain_text(constant):
                return self._attributes.text(attribute.name) == sa.literal(constant.value, sa.Text)

        one = self._json(left)
        if isinstance(right, Constant) and is_large_number(right) and not _is_bool(left):
            return equal_to_large(one, right.value)
        other = self._json(right)
        # If one side is a constant or a bool, the two are never numbers that must be compared by their types.
        if any(is_constant(each) or _is_bool(each) for each in (left, right)):
            return one == other
        return sa.case(
            (sa.and_(is_type(one, "number"), is_type(other, "number")), numbers_equal(one, other)), else_=one == other
        )

    def _times_equal(self, left: Node, right: Node) -> Sql:
        """Equality of two nodes, one of which at least is a time. Only a time equals a time."""
        if isinstance(left, tree.Time) and isinstance(right, tree.Time):
            return self._time(left) == self._time(right)
        return when(self._sound(left, right), sa.false())

    def _items_equal(self, left: Node, right: Node) -> Sql:
        """Equality of nodes that are sound."""
        if not (isinstance(left, ListOf) and isinstance(right, ListOf)):
            return self._equal(left, right)
        if len(left.items) != len(right.items):
            return sa.false()
        return sa.and_(sa.true(), *map(self._items_equal, left.items, right.items))

    # -- order ------------------------------------------------------------------------------------------------------

    def _ordered(self, op: tree.Comparison, left: Node, right: Node) -> Sql:
        if isinstance(left, ListOf) or isinstance(right, ListOf):
            return _ERROR
        if isinstance(left, tree.Time) or isinstance(right, tree.Time):
            return self._times_ordered(op, left, right)
        if isinstance(left, Constant):
            if isinstance(right, Constant):
                return _known(ordered(op, left, right))
            return self._ordered(_MIRRORED[op], right, left)

        if isinstance(left, tree.Attribute) and is_small_number(right):
            return self._attributes.ordered(op, left.name, right.value)
        if isinstance(left, tree.Size) and is_small_number(right):
            size: Sql = ORDER[op](self._size(left.of), sa.literal(decimal(right.value), sa.Numeric))
            return size

        value = self._json(left)
        if isinstance(right, Constant):
            return ordered_to_literal(op, value, right.value)
        compare = ORDER[op]
        other = self._json(right)
        return sa.case(
            (
                sa.and_(is_type(value, "number"), is_type(other, "number")),
                sa.case(
                    (is_double(value) == is_double(other), compare(numeric(value), numeric(other))),
                    else_=compare(double(value), double(other)),
                ),
            ),
            (sa.and_(is_type(value, "string"), is_type(other, "string")), compare(text(value), text(other))),
            (
                sa.and_(is_type(value, "boolean"), is_type(other, "boolean")),
                compare(value.cast(sa.Boolean), other.cast(sa.Boolean)),
            ),
        )

    def _times_ordered(self, op: tree.Comparison, left: Node, right: Node) -> Sql:
        """Order of two nodes, one of which at least is a time. Between types there is no order."""
        if not (isinstance(left, tree.Time) and isinstance(right, tree.Time)):
            return _ERROR
        compared: Sql = ORDER[op](self._time(left), self._time(right))
        return compared

    # -- membership and strings -------------------------------------------------------------------------------------

    def _in(self, item: Node, container: Node) -> Sql:
        if isinstance(container, ListOf):
            return self._in_list(item, container)
        if isinstance(container, Constant):
            return _ERROR
        values = self._json(container)

        # Lists in users' attributes hold only strings, so containment of the one-item list is equality with some item.
        if is_constant(item):
            return when(is_type(values, "array"), values.op("@>")(literal(ListOf((item,)))))
        value = self._json(item)
        return when(
            sa.and_(is_type(values, "array"), value.is_not(None)),
            values.op("@>")(sa.func.jsonb_build_array(value, type_=JSONB())),
        )

    def _in_list(self, item: Node, container: ListOf) -> Sql:
        # Items that are equal exactly when they are equal as jsonb are looked up at once, however many there are.
        if isinstance(item, tree.Attribute) and container.items and all(map(is_plain_text, container.items)):
            texts = sa.literal([each.value for each in container.items if isinstance(each, Constant)], ARRAY(sa.Text))
            return self._attributes.text(item.name) == sa.any_(texts)

        plain: list[Node] = []
        others: list[Node] = []
        for each in container.items:
            (plain if is_plain(each) and not is_constant(item) else others).append(each)
        clauses = [self._items_equal(item, each) for each in others]
        if plain:
            texts = sa.literal(list(map(json_text, plain)), ARRAY(sa.Text))
            clauses.append(self._json(item) == sa.any_(texts.cast(ARRAY(JSONB))))
        # An error anywhere in the list, or in the item, is an error of the whole, whether the item is found or not.
        return when(self._sound(item, *others), sa.or_(sa.false(), *clauses))

    def _test(self, function: tree.StringTest, of: Node, part: Node) -> Sql:
        if isinstance(of, Constant) and isinstance(part, Constant):
            return _known(tested(function, of, part))

        # No attribute has a U+0000 in it, and PostgreSQL's text cannot: so the pieces between them are tested.
        if isinstance(part, Constant) and "\0" in str(part.value):
            return when(self._string(of).is_not(None), sa.false())
        if isinstance(of, Constant) and "\0" in str(of.value):
            pieces = str(of.value).split("\0")
            tested_pieces = {"startsWith": pieces[:1], "endsWith": pieces[-1:], "contains": pieces}[function]
            return sa.or_(*(self._test(function, Constant(piece), part) for piece in dict.fromkeys(tested_pieces)))

        whole, piece = self._string(of), self._string(part)
        if function == "startsWith":
            return sa.func.starts_with(whole, piece)
        if function == "contains":
            return sa.func.strpos(whole, piece) > 0
        return sa.func.right(whole, sa.func.char_length(piece)) == piece

    def _string(self, node: Node) -> Sql:
        """The node as text; NULL: an error, or not a string."""
        if isinstance(node, Constant):
            return sa.literal(node.value, sa.Text).collate("C") if isinstance(node.value, str) else _NO_TEXT
        if isinstance(node, tree.Lower):
            return sa.func.translate(self._string(node.of), _UPPER, _UPPER.lower(), type_=sa.Text).collate("C")
        value = self._json(node)
        return when(is_type(value, "string"), text(value))

    # -- times and versions -----------------------------------------------------------------------------------------

    def _time(self, node: tree.Time) -> Sql:
        """The moment in ticks; NULL: an error."""
        if isinstance(node.of, Constant):
            return time_of_literal(str(node.of.value))
        return (
            time_of(self._json(node.of)) if isinstance(node.of, tree.Attribute) else time_of_text(self._string(node.of))
        )

    def _version(self, node: tree.Version) -> Sql:
        """The version's key; NULL: an error."""
        if isinstance(node.of, Constant):
            return key_of_literal(str(node.of.value))
        return key_of_text(self._string(node.of))


# -- the tree ----------------------------------------------------------------------------------------------------------


def _is_bool(node: Node) -> bool:
    """Whether the node is always a bool or an error."""
    return isinstance(
        node,
        tree.Compare
        | tree.In
        | tree.Test
        | tree.Has
        | tree.IsVersion
        | tree.CompareVersions
        | tree.And
        | tree.Or
        | tree.Not,
    )


def _writes_once(node: tree.Compare | tree.In) -> bool:
    """Whether each operand will be written only once, however it is computed; see ``Compiler._equal``."""
    if not isinstance(node, tree.Compare) or node.operator not in ("==", "!="):
        return False
    operands = (node.left, node.right)
    return any(map(_is_bool, operands)) and not any(isinstance(each, ListOf) for each in operands)


def _without_parts(node: tree.Compare | tree.In, parts: list[Node]) -> tree.Compare | tree.In:
    """The node with attributes of new names in place of its computed parts, which are appended to ``parts``."""
    if isinstance(node, tree.Compare):
        return tree.Compare(node.operator, _named(node.left, parts), _named(node.right, parts))
    return tree.In(_named(node.item, parts), _named(node.container, parts))


def _named(node: Node, parts: list[Node]) -> Node:
    match node:
        # A part that is named is jsonb, and only this compiler knows that an object in it is a time: so a time stays.
        case Constant() | tree.Attribute() | tree.Size(Constant() | tree.Attribute()) | tree.Time():
            return node
        case ListOf(items):
            return ListOf(tuple(_named(item, parts) for item in items))
        case _:
            parts.append(node)
            return tree.Attribute(_name(len(parts) - 1))


def _name(number: int) -> str:
    """The name of a part; no attribute has such a name."""
    return f"#{number}"


def _leaves(node: Node) -> Iterator[Node]:
    """The nodes of which a node consists, lists taken apart, that may be an error."""
    if isinstance(node, ListOf):
        for item in node.items:
            yield from _leaves(item)
    elif not isinstance(node, Constant):
        yield node


def _known(value: bool | None) -> Sql:
    return _ERROR if value is None else sa.literal(value)
