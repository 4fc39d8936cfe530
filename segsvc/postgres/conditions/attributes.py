"""Where a condition's SQL finds a user's attributes."""

from __future__ import annotations

from collections.abc import Mapping
from typing import Protocol

import sqlalchemy as sa
from sqlalchemy.dialects.postgresql import JSONB, JSONPATH

from segsvc.conditions.tree import Comparison, Scalar
from segsvc.postgres.conditions.literals import decimal
from segsvc.postgres.conditions.values import Sql, ordered_to_literal, text


class Attributes(Protocol):
    """What the compiler needs of attributes; each implementation looks values up in its own way."""

    def has(self, name: str) -> Sql:
        """Whether the attribute exists; never NULL."""
        ...

    def json(self, name: str) -> Sql:
        """Its value as jsonb; NULL: it is absent."""
        ...

    def text(self, name: str) -> Sql:
        """Its value as text, whatever its type; NULL: it is absent."""
        ...

    def ordered(self, op: Comparison, name: str, number: Scalar) -> Sql:
        """Its comparison with a number whose size is below 2**53; NULL: it is absent, or not a number."""
        ...


class InObject:
    """The members of a JSONB object."""

    def __init__(self, attributes: Sql) -> None:
        self._attributes = attributes

    def has(self, name: str) -> Sql:
        return self._attributes.op("?", return_type=sa.Boolean())(name)

    def json(self, name: str) -> Sql:
        return self._attributes.op("->", return_type=JSONB())(sa.literal(name, sa.Text))

    def text(self, name: str) -> Sql:
        return self._attributes.op("->>", return_type=sa.Text())(sa.literal(name, sa.Text))

    def ordered(self, op: Comparison, name: str, number: Scalar) -> Sql:
        # A path checks the type and the value in one step, which halves the time. In strict mode, a missing member and
        # another type are "unknown", for which the operator returns NULL.
        path = f'strict $."{name}" {op} {decimal(number):f}'
        return self._attributes.op("@@", return_type=sa.Boolean())(sa.literal(path, sa.Text).cast(JSONPATH))


class Named:
    """Columns of jsonb under new names, in addition to the attributes that existed before."""

    def __init__(self, attributes: Attributes, named: Mapping[str, Sql]) -> None:
        self._attributes = attributes
        self._named = named

    def has(self, name: str) -> Sql:
        return self._attributes.has(name)

    def json(self, name: str) -> Sql:
        return self._named[name] if name in self._named else self._attributes.json(name)

    def text(self, name: str) -> Sql:
        return text(self._named[name]) if name in self._named else self._attributes.text(name)

    def ordered(self, op: Comparison, name: str, number: Scalar) -> Sql:
        if name in self._named:
            return ordered_to_literal(op, self._named[name], number)
        return self._attributes.ordered(op, name, number)
