"""Conditions as SQL over JSONB attributes, so that a million users are asked where they are.

SQL's NULL plays CEL's error: ``NULL OR true`` is true, ``NOT NULL`` is NULL, as ``||`` and ``!`` have it. Every node
becomes an expression that cannot raise: a cast stands only inside a CASE that has looked at the type before, and
nothing constant is left for the planner to fold. Values are bound parameters.

Numbers: CEL compares an int with a double as doubles. Attributes keep the two apart by their scale (``domain.events``).
A literal below 2**53 in size needs no such care: around it, comparing exactly and comparing as doubles agree.
"""

from __future__ import annotations

import json
import math
import operator
from collections.abc import Callable
from decimal import Decimal
from functools import reduce
from typing import Any, Final, TypeGuard

import sqlalchemy as sa
from sqlalchemy.dialects.postgresql import ARRAY, JSONB, JSONPATH

from segsvc.conditions import Condition, tree
from segsvc.conditions.tree import Constant, ListOf, Node, Scalar
from segsvc.conditions.weight import EXACT_BELOW, is_bool, is_constant

Sql = sa.ColumnElement[Any]

_ARGUMENTS_MAX: Final = 100
"""PostgreSQL takes no more arguments of a function."""
_ORDER: Final[dict[str, Callable[[Any, Any], Any]]] = {
    "<": operator.lt, "<=": operator.le, ">": operator.gt, ">=": operator.ge,
}  # fmt: skip
_MIRRORED: Final = {"<": ">", "<=": ">=", ">": "<", ">=": "<="}
_OTHER_TYPES_START: Final = (*"0123456789-", "[", "{")
"""How the text of a number, a list or an object begins."""
_ERROR: Final = sa.null().cast(sa.Boolean)
_NO_TEXT: Final = sa.null().cast(sa.Text)


def condition_clause(condition: Condition, attributes: sa.ColumnElement[Any]) -> sa.ColumnElement[bool]:
    """True where the condition holds, false elsewhere; never NULL.

    Args:
        attributes: a JSONB object; what it lacks is absent.
    """
    return Compiler(attributes).clause(condition)


class Compiler:
    """Turns conditions into SQL; the four methods that reach for an attribute may be replaced."""

    def __init__(self, attributes: sa.ColumnElement[Any]) -> None:
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
                return self._has(name)
            case tree.Not(of):
                return sa.not_(self.truth(of))
            case tree.And(left, right):
                return sa.and_(self.truth(left), self.truth(right)).self_group()
            case tree.Or(left, right):
                return sa.or_(self.truth(left), self.truth(right)).self_group()
            case tree.Compare("==", left, right):
                return self._equal(left, right)
            case tree.Compare("!=", left, right):
                return sa.not_(self._equal(left, right))
            case tree.Compare(op, left, right):
                return self._ordered(op, left, right)
            case tree.In(item, container):
                return self._in(item, container)
            case tree.Test(function, text, part):
                return self._test(function, text, part)
            case tree.Attribute():
                flag = self._json(node)
                return _when(_is(flag, "boolean"), flag.cast(sa.Boolean))
            case _:
                return _ERROR

    # -- values -----------------------------------------------------------------------------------------------------

    def _json(self, node: Node) -> Sql:
        """The node's value as jsonb; NULL: an error."""
        match node:
            case tree.Attribute(name):
                return self._attribute(name)
            case Constant():
                return _literal(node)
            case ListOf(items):
                return self._list(items)
            case tree.Size(of):
                return sa.func.to_jsonb(self._size(of), type_=JSONB())
            case _:
                return sa.func.to_jsonb(self.truth(node), type_=JSONB())

    def _list(self, items: tuple[Node, ...]) -> Sql:
        if is_constant(ListOf(items)):
            return _literal(ListOf(items))
        values = [self._json(item) for item in items]
        parts = [
            sa.func.jsonb_build_array(*values[first : first + _ARGUMENTS_MAX], type_=JSONB())
            for first in range(0, len(values), _ARGUMENTS_MAX)
        ]
        return _when(sa.and_(*(value.is_not(None) for value in values)), reduce(_concatenated, parts))

    def _size(self, of: Node) -> Sql:
        if isinstance(of, Constant):
            return sa.literal(len(of.value)) if isinstance(of.value, str) else sa.null().cast(sa.Integer)
        value = self._json(of)
        return sa.case(
            (_is(value, "string"), sa.func.char_length(_text(value))),
            (_is(value, "array"), sa.func.jsonb_array_length(value)),
        )

    # -- equality ---------------------------------------------------------------------------------------------------

    def _equal(self, left: Node, right: Node) -> Sql:
        if isinstance(left, ListOf) and isinstance(right, ListOf):
            return self._lists_equal(left, right)
        if is_constant(left) and is_constant(right):
            return sa.literal(_same_constant(left, right))
        if _is_large_number(left):
            left, right = right, left
        for attribute, constant in ((left, right), (right, left)):
            if isinstance(attribute, tree.Attribute) and _is_plain_text(constant):
                return self._attribute_text(attribute) == sa.literal(constant.value, sa.Text)
        one = self._json(left)
        if isinstance(right, Constant) and _is_large_number(right) and not is_bool(left):
            return _equal_to_large(one, right.value)
        other = self._json(right)
        # Neither is ever two numbers that only a comparison by their types compares rightly.
        if any(is_constant(each) or is_bool(each) for each in (left, right)):
            return one == other
        return sa.case(
            (sa.and_(_is(one, "number"), _is(other, "number")), _numbers_equal(one, other)), else_=one == other
        )

    def _lists_equal(self, left: ListOf, right: ListOf) -> Sql:
        # Both sides are evaluated whole before they are compared, so an error in either is one of the comparison.
        sound = [self._json(item).is_not(None) for item in (*left.items, *right.items) if not is_constant(item)]
        if len(left.items) != len(right.items):
            equal: Sql = sa.false()
        else:
            equal = sa.and_(sa.true(), *(self._equal(a, b) for a, b in zip(left.items, right.items, strict=True)))
        return _when(sa.and_(sa.true(), *sound), equal)

    # -- order ------------------------------------------------------------------------------------------------------

    def _ordered(self, op: str, left: Node, right: Node) -> Sql:
        if isinstance(left, ListOf) or isinstance(right, ListOf):
            return _ERROR
        if isinstance(left, Constant):
            if isinstance(right, Constant):
                return _constants_ordered(op, left, right)
            return self._ordered(_MIRRORED[op], right, left)
        compare = _ORDER[op]
        if isinstance(left, tree.Attribute) and _is_small_number(right):
            return self._attribute_ordered(op, left, right.value)
        value = self._json(left)
        if isinstance(right, Constant):
            return _ordered_to_literal(compare, value, right.value)
        other = self._json(right)
        return sa.case(
            (
                sa.and_(_is(value, "number"), _is(other, "number")),
                sa.case(
                    (_is_double(value) == _is_double(other), compare(_numeric(value), _numeric(other))),
                    else_=compare(_double(value), _double(other)),
                ),
            ),
            (sa.and_(_is(value, "string"), _is(other, "string")), compare(_text(value), _text(other))),
            (
                sa.and_(_is(value, "boolean"), _is(other, "boolean")),
                compare(value.cast(sa.Boolean), other.cast(sa.Boolean)),
            ),
        )

    def _has(self, name: str) -> Sql:
        return self._attributes.op("?")(name)

    def _attribute(self, name: str) -> Sql:
        """An attribute as jsonb; NULL: it is absent."""
        return self._attributes.op("->", return_type=JSONB())(sa.literal(name, sa.Text))

    def _attribute_text(self, attribute: tree.Attribute) -> Sql:
        """An attribute as text, whatever its type; NULL: it is absent."""
        return self._attributes.op("->>", return_type=sa.Text())(sa.literal(attribute.name, sa.Text))

    def _attribute_ordered(self, op: str, attribute: tree.Attribute, number: Scalar) -> Sql:
        # A path looks at the type and the value in one go, which halves the time. In its strict mode a missing member
        # and another type are "unknown", and the operator's answer to that is NULL.
        path = f'strict $."{attribute.name}" {op} {Decimal(repr(number)):f}'
        return self._attributes.op("@@", return_type=sa.Boolean())(sa.literal(path, sa.Text).cast(JSONPATH))

    # -- membership and strings -------------------------------------------------------------------------------------

    def _in(self, item: Node, container: Node) -> Sql:
        if isinstance(container, ListOf):
            return self._in_list(item, container)
        if isinstance(container, Constant):
            return _ERROR
        values = self._json(container)
        # Lists of users hold strings only, so containment of the one-item list is equality with some item.
        if is_constant(item):
            return _when(_is(values, "array"), values.op("@>")(_literal(ListOf((item,)))))
        value = self._json(item)
        return _when(
            sa.and_(_is(values, "array"), value.is_not(None)),
            values.op("@>")(sa.func.jsonb_build_array(value, type_=JSONB())),
        )

    def _in_list(self, item: Node, container: ListOf) -> Sql:
        # What is equal exactly when it is equal as jsonb is looked up at once, however many there are.
        if isinstance(item, tree.Attribute) and container.items and all(map(_is_plain_text, container.items)):
            texts = sa.literal([each.value for each in container.items if isinstance(each, Constant)], ARRAY(sa.Text))
            return self._attribute_text(item) == sa.any_(texts)
        plain: list[Node] = []
        others: list[Node] = []
        for each in container.items:
            looked_up = is_constant(each) and not _is_large_number(each) and not is_constant(item)
            (plain if looked_up else others).append(each)
        clauses = [self._equal(item, each) for each in others]
        if plain:
            texts = sa.literal([_json_text(each) for each in plain], ARRAY(sa.Text))
            clauses.append(self._json(item) == sa.any_(texts.cast(ARRAY(JSONB))))
        # An error anywhere in the list, or in the item, is one of the whole, found or not.
        parts = [self._json(each).is_not(None) for each in (item, *others) if not is_constant(each)]
        return _when(sa.and_(sa.true(), *parts), sa.or_(sa.false(), *clauses))

    def _test(self, function: str, text: Node, part: Node) -> Sql:
        whole, piece = self._string(text), self._string(part)
        if function == "startsWith":
            return sa.func.starts_with(whole, piece)
        if function == "contains":
            return sa.func.strpos(whole, piece) > 0
        return sa.func.right(whole, sa.func.char_length(piece)) == piece

    def _string(self, node: Node) -> Sql:
        """The node as text; NULL: an error, or not a string."""
        if isinstance(node, Constant):
            return sa.literal(node.value, sa.Text).collate("C") if isinstance(node.value, str) else _NO_TEXT
        value = self._json(node)
        return _when(_is(value, "string"), _text(value))


def _when(check: Sql, value: Sql) -> Sql:
    """The value where the check is true, NULL elsewhere; the value is not looked at there."""
    return sa.case((check, value))


def _concatenated(one: Sql, other: Sql) -> Sql:
    return one.op("||", return_type=JSONB())(other)


def number_or_null(value: Sql) -> Sql:
    """A jsonb number as numeric; NULL: it is none."""
    return _when(_is(value, "number"), _numeric(value))


def _is(value: Sql, kind: str) -> Sql:
    return sa.func.jsonb_typeof(value) == kind


def _text(value: Sql) -> Sql:
    """A jsonb string's text; its order is that of code points."""
    return value.op("#>>", return_type=sa.Text())(sa.text("'{}'")).collate("C")


def _numeric(value: Sql) -> Sql:
    return value.cast(sa.Numeric)


def _double(value: Sql) -> Sql:
    return _numeric(value).cast(sa.Double)


def _is_double(value: Sql) -> Sql:
    return sa.func.scale(_numeric(value)) > 0


def _numbers_equal(one: Sql, other: Sql) -> Sql:
    return sa.case(
        (_is_double(one) == _is_double(other), _numeric(one) == _numeric(other)),
        else_=_double(one) == _double(other),
    )


# -- literals ----------------------------------------------------------------------------------------------------------


def _is_number(value: object) -> bool:
    return isinstance(value, int | float) and not isinstance(value, bool)


def _is_large_number(node: Node) -> bool:
    """Whether it is a literal that only a comparison by its type compares rightly."""
    return isinstance(node, Constant) and _is_number(node.value) and not -EXACT_BELOW < node.value < EXACT_BELOW  # type: ignore[operator]


def _is_small_number(node: Node) -> TypeGuard[Constant]:
    return isinstance(node, Constant) and _is_number(node.value) and not _is_large_number(node)


def _is_plain_text(node: Node) -> TypeGuard[Constant]:
    """Whether it is a literal string that no bool, number or list looks like as text.

    Equality with it needs no look at the type: an attribute with this text is this string.
    """
    if not isinstance(node, Constant) or not isinstance(node.value, str):
        return False
    return node.value not in ("true", "false") and not node.value.startswith(_OTHER_TYPES_START)


def _literal(node: Node) -> Sql:
    return sa.literal(_json_text(node), sa.Text).cast(JSONB)


def _json_text(node: Node) -> str:
    """A constant as JSON."""
    return json.dumps(_plain(node))


def _plain(node: Node) -> Any:
    if isinstance(node, ListOf):
        return [_plain(item) for item in node.items]
    assert isinstance(node, Constant)
    # No attribute is infinite, so it may be anything that no attribute is.
    return {"infinite": node.value > 0} if node.value in (math.inf, -math.inf) else node.value


def _same_constant(left: Node, right: Node) -> bool:
    """CEL's equality; Python's own compares an int with a double exactly, and True with 1."""
    if isinstance(left, ListOf) and isinstance(right, ListOf):
        return len(left.items) == len(right.items) and all(map(_same_constant, left.items, right.items))
    if not (isinstance(left, Constant) and isinstance(right, Constant)):
        return False
    one, other = left.value, right.value
    if _is_number(one) and _is_number(other) and type(one) is not type(other):
        return float(one) == float(other)
    return type(one) is type(other) and one == other


def _constants_ordered(op: str, left: Constant, right: Constant) -> Sql:
    one, other = left.value, right.value
    if _is_number(one) and _is_number(other):
        if type(one) is not type(other):
            one, other = float(one), float(other)
    elif type(one) is not type(other):
        return _ERROR
    return sa.literal(bool(_ORDER[op](one, other)))


def _equal_to_large(value: Sql, number: Scalar) -> Sql:
    """Equality with a literal number that is 2**53 or more in size. NULL only if the value is."""
    as_double = _double(value) == sa.literal(float(number), sa.Double)
    exactly = _numeric(value) == sa.literal(Decimal(number), sa.Numeric)
    equal = as_double if isinstance(number, float) else sa.case((_is_double(value), as_double), else_=exactly)
    return sa.case((_is(value, "number"), equal), (value.is_not(None), sa.false()))


def _ordered_to_literal(compare: Callable[[Any, Any], Any], value: Sql, literal: Scalar) -> Sql:
    if isinstance(literal, bool):
        return _when(_is(value, "boolean"), compare(value.cast(sa.Boolean), sa.literal(literal)))
    if isinstance(literal, str):
        return _when(_is(value, "string"), compare(_text(value), sa.literal(literal, sa.Text)))
    if not _is_large_number(Constant(literal)):
        return _when(_is(value, "number"), compare(_numeric(value), sa.literal(Decimal(repr(literal)), sa.Numeric)))
    as_double = compare(_double(value), sa.literal(float(literal), sa.Double))
    if isinstance(literal, float):
        return _when(_is(value, "number"), as_double)
    exactly = compare(_numeric(value), sa.literal(Decimal(literal), sa.Numeric))
    return _when(_is(value, "number"), sa.case((_is_double(value), as_double), else_=exactly))
