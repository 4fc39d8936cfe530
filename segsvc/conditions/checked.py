"""The runtime's checked expression (``cel.expr.CheckedExpr``), as far as the tree needs it.

The messages are described here, because the runtime's wheel has no Python classes for them. The field numbers are
those of cel-spec's checked.proto and syntax.proto.
"""

from __future__ import annotations

from typing import Any, Final, TypeGuard

from google.protobuf import any_pb2, descriptor_pb2, descriptor_pool, message_factory

from segsvc.conditions import tree
from segsvc.domain.event_limits import ATTRIBUTE_NAME

LIST_MAX: Final = 1000
_F: Final = descriptor_pb2.FieldDescriptorProto
_SCALARS: Final = {
    "int64": _F.TYPE_INT64,
    "double": _F.TYPE_DOUBLE,
    "bool": _F.TYPE_BOOL,
    "string": _F.TYPE_STRING,
    "bytes": _F.TYPE_BYTES,
    "uint64": _F.TYPE_UINT64,
    "int32": _F.TYPE_INT32,
}
_PACKAGE: Final = "segsvc.conditions.checked"
# message → (name, type, number). Before a type: "*" repeated, "?" member of a oneof, so that its presence is known.
_MESSAGES: Final = {
    "Checked": (("expr", "Expr", 4), ("source", "Source", 5)),
    "Source": (("positions", "*Position", 4),),
    "Position": (("key", "int64", 1), ("value", "int32", 2)),
    "Expr": (
        ("id", "int64", 2),
        ("constant", "?Const", 3),
        ("ident", "?Ident", 4),
        ("select", "?Select", 5),
        ("call", "?Call", 6),
        ("list", "?List", 7),
    ),
    "Const": (
        ("null", "?int32", 1),
        ("bool", "?bool", 2),
        ("int", "?int64", 3),
        ("uint", "?uint64", 4),
        ("double", "?double", 5),
        ("string", "?string", 6),
        ("bytes", "?bytes", 7),
    ),
    "Ident": (("name", "string", 1),),
    "Select": (("operand", "Expr", 1), ("field", "string", 2), ("test_only", "bool", 3)),
    "Call": (("target", "Expr", 1), ("function", "string", 2), ("args", "*Expr", 3)),
    "List": (("elements", "*Expr", 1),),
}


def _describe() -> descriptor_pb2.FileDescriptorProto:
    file = descriptor_pb2.FileDescriptorProto(name="segsvc/conditions/checked.proto", package=_PACKAGE, syntax="proto3")
    for message, fields in _MESSAGES.items():
        described = file.message_type.add(name=message)
        one_of = [name for name, kind, _ in fields if kind.startswith("?")]
        if one_of:
            described.oneof_decl.add(name="kind")

        for name, kind, number in fields:
            bare = kind.lstrip("*?")
            field = described.field.add(name=name, number=number)
            field.label = _F.LABEL_REPEATED if kind.startswith("*") else _F.LABEL_OPTIONAL
            field.type = _SCALARS.get(bare, _F.TYPE_MESSAGE)
            if bare not in _SCALARS:
                field.type_name = f".{_PACKAGE}.{bare}"
            if name in one_of:
                field.oneof_index = 0

    return file


_pool: Final = descriptor_pool.DescriptorPool()
_pool.Add(_describe())
_Checked: Final = message_factory.GetMessageClass(_pool.FindMessageTypeByName(f"{_PACKAGE}.Checked"))

_COMPARISONS: Final[dict[str, tree.Comparison]] = {
    "_==_": "==", "_!=_": "!=", "_<_": "<", "_<=_": "<=", "_>_": ">", "_>=_": ">=",
}  # fmt: skip
_TESTS: Final[dict[str, tree.StringTest]] = {
    "startsWith": "startsWith", "endsWith": "endsWith", "contains": "contains",
}  # fmt: skip
_VERSION_TESTS: Final[dict[str, tree.VersionTest]] = {"isLessThan": "isLessThan", "isGreaterThan": "isGreaterThan"}
_ARITY: Final = {
    "!_": 1, "size": 1, "lowerAscii": 1, "timestamp": 1, "semver": 1, "isSemver": 1,
    **dict.fromkeys(("_&&_", "_||_", "@in", "_[_]", "compareTo", *_COMPARISONS, *_TESTS, *_VERSION_TESTS), 2),
}  # fmt: skip
_ALLOWED: Final = (
    "allowed are == != < <= > >= in && || ! has() startsWith endsWith contains size lowerAscii timestamp semver "
    "isSemver isLessThan isGreaterThan compareTo, parentheses, and literals of string, int, double, bool and list"
)
_UPPER: Final = {ord(letter): ord(letter.lower()) for letter in "ABCDEFGHIJKLMNOPQRSTUVWXYZ"}


class NotInSubset(Exception):
    """Valid CEL with no equivalent in SQL, or with too long a list. ``position``: offset of the offending node, in
    characters."""

    def __init__(self, what: str, position: int) -> None:
        super().__init__(what)
        self.what = what
        self.position = position


def to_tree(serialized: bytes) -> tree.Node:
    """The tree of a checked expression, as the runtime serialises it.

    Raises:
        NotInSubset: it contains something that conditions must not contain.
    """
    wrapped = any_pb2.Any.FromString(serialized)
    checked: Any = _Checked.FromString(wrapped.value)
    positions = {entry.key: entry.value for entry in checked.source.positions}
    return _Builder(positions).build(checked.expr)


class _Builder:
    def __init__(self, positions: dict[int, int]) -> None:
        self._positions = positions

    def _refuse(self, what: str, expr: Any) -> NotInSubset:
        return NotInSubset(f"{what}; {_ALLOWED}", self._position(expr))

    def _position(self, expr: Any) -> int:
        return self._positions.get(expr.id, 0)

    def build(self, expr: Any) -> tree.Node:
        kind = expr.WhichOneof("kind")

        if kind == "constant":
            return self._constant(expr)
        if kind == "select":
            return self._select(expr)
        if kind == "list":
            if len(expr.list.elements) > LIST_MAX:
                what = f"a list must have at most {LIST_MAX} items, has {len(expr.list.elements)}"
                raise NotInSubset(what, self._position(expr))
            return tree.ListOf(tuple(map(self.build, expr.list.elements)))
        if kind == "call":
            return self._call(expr)

        if kind == "ident":
            raise self._refuse("user is not a value here, only its attributes are (user.name)", expr)
        raise self._refuse("maps, macros and comprehensions are not allowed", expr)

    def _constant(self, expr: Any) -> tree.Constant:
        kind = expr.constant.WhichOneof("kind")
        if kind not in ("bool", "int", "double", "string"):
            raise self._refuse(f"a literal of type {kind} is not allowed", expr)
        return tree.Constant(getattr(expr.constant, kind))

    def _select(self, expr: Any) -> tree.Attribute | tree.Has:
        select = expr.select
        if not _is_user(select.operand):
            raise self._refuse("attributes have no fields: only user.name is allowed", expr)
        name = self._name(select.field, expr)
        return tree.Has(name) if select.test_only else tree.Attribute(name)

    def _name(self, name: str, expr: Any) -> str:
        if not ATTRIBUTE_NAME.fullmatch(name):
            raise self._refuse(f"names of attributes match {ATTRIBUTE_NAME.pattern}", expr)
        return name

    def _call(self, expr: Any) -> tree.Node:
        call = expr.call
        function = call.function
        operands = [call.target, *call.args] if call.HasField("target") else list(call.args)
        if _ARITY.get(function) != len(operands):
            raise self._refuse(f"{_spelled(function)} is not allowed", expr)
        if function == "_[_]":
            return self._index(operands, expr)
        if function in ("timestamp", "semver", "isSemver", "lowerAscii"):
            return self._of_text(function, operands[0], expr)
        if function == "compareTo":
            return tree.OrderOfVersions(*self._versions(function, operands))
        if function in _VERSION_TESTS:
            return tree.CompareVersions(_VERSION_TESTS[function], *self._versions(function, operands))

        if function == "@in" and _is_user(operands[1]) and operands[0].constant.WhichOneof("kind") == "string":
            # "name" in user: another way to write has(user.name).
            return tree.Has(self._name(operands[0].constant.string, operands[0]))

        built = [self.build(operand) for operand in operands]
        if function in _COMPARISONS:
            return tree.Compare(_COMPARISONS[function], *built)
        if function in _TESTS:
            return tree.Test(_TESTS[function], *built)
        plain = {"_&&_": tree.And, "_||_": tree.Or, "!_": tree.Not, "@in": tree.In, "size": tree.Size}
        made: tree.Node = plain[function](*built)
        return made

    def _index(self, operands: list[Any], expr: Any) -> tree.Attribute:
        """``user["name"]``: another way to write user.name."""
        index = operands[1].constant
        if not _is_user(operands[0]) or index.WhichOneof("kind") != "string":
            raise NotInSubset('only user["name"] has an index, and its name is a literal', self._position(expr))
        return tree.Attribute(self._name(index.string, operands[1]))

    def _of_text(self, function: str, operand: Any, expr: Any) -> tree.Node:
        of = self.build(operand)
        if function == "semver":
            raise NotInSubset(
                "a version is only compared, by isLessThan, isGreaterThan or compareTo", self._position(expr)
            )
        self._require_text(function, of, operand)

        if function == "lowerAscii":
            return tree.Constant(str(of.value).translate(_UPPER)) if _is_string(of) else tree.Lower(of)
        return tree.Time(of) if function == "timestamp" else tree.IsVersion(of)

    def _versions(self, function: str, operands: list[Any]) -> tuple[tree.Version, tree.Version]:
        return self._version(function, operands[0]), self._version(function, operands[1])

    def _version(self, function: str, expr: Any) -> tree.Version:
        """An operand of a comparison of versions. One that is an attribute would be an error for every user."""
        call = expr.call
        if expr.WhichOneof("kind") != "call" or call.function != "semver" or len(call.args) != 1:
            what = f"{function} compares versions: write semver(user.name) or semver('1.2.3')"
            raise NotInSubset(what, self._position(expr))
        of = self.build(call.args[0])
        self._require_text("semver", of, call.args[0])
        return tree.Version(of)

    def _require_text(self, function: str, of: tree.Node, expr: Any) -> None:
        if not (_is_string(of) or isinstance(of, tree.Attribute | tree.Lower)):
            what = f"{function} takes a string: a literal, an attribute, or lowerAscii() of one"
            raise NotInSubset(what, self._position(expr))


def _is_string(node: tree.Node) -> TypeGuard[tree.Constant]:
    return isinstance(node, tree.Constant) and isinstance(node.value, str)


def _is_user(expr: Any) -> bool:
    return bool(expr.WhichOneof("kind") == "ident" and expr.ident.name == "user")


def _spelled(function: str) -> str:
    """An operator as authors of conditions write it."""
    return {"_?_:_": "?:", "_[_]": "[…]", "-_": "- before anything but a number"}.get(
        function, function.strip("_@")
    ) or function
