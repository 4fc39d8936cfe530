"""Conditions that are valid and most probably not what their author means: strings in an order that is not theirs."""

from __future__ import annotations

import re
from collections.abc import Iterator
from itertools import islice
from typing import Final

from segsvc.conditions import times, tree, versions
from segsvc.conditions.tree import Constant, Node

_TIME: Final = re.compile(r"[0-9]{4}-[0-9]{1,2}(-[0-9]{1,2})?([Tt ][0-9:.]*.*)?\Z")
_VERSION: Final = re.compile(r"[vV]?[0-9]+(\.[0-9]+)+([-+.][0-9A-Za-z.+-]*)?\Z")


_SHOWN_MAX: Final = 120
"""Characters of a comparison that are shown."""
WARNINGS_MAX: Final = 8


def warnings(root: Node) -> list[str]:
    """One sentence for each trap, in the order in which they are written; at most ``WARNINGS_MAX``."""
    return list(islice(dict.fromkeys(_warnings(root)), WARNINGS_MAX))


def _warnings(node: Node) -> Iterator[str]:
    match node:
        case tree.Compare("<" | "<=" | ">" | ">=", left, right):
            for side in (left, right):
                if isinstance(side, Constant) and isinstance(side.value, str):
                    yield from _of_string(node, side.value)
        case tree.Time(Constant(str() as text)) if times.ticks_of(text) is None:
            yield f"{_shown(node)} is no time, so nothing that needs it holds"
        case tree.Version(Constant(str() as text)) if versions.key_of(text) is None:
            yield f"{_shown(node)} is no version, so nothing that needs it holds"

    for operand in tree.operands(node):
        yield from _warnings(operand)


def _of_string(node: tree.Compare, text: str) -> Iterator[str]:
    shown = _shown(node)
    if _VERSION.match(text):
        yield (
            f'{shown} compares strings letter by letter ("10.0" < "9.0"): '
            "for versions write semver(user.name).isLessThan(semver('1.2.3'))"
        )
    elif _TIME.match(text):
        yield (
            f"{shown} compares strings letter by letter, without their offsets: "
            "for times write timestamp(user.name) < timestamp('2026-01-31T00:00:00Z')"
        )


def _shown(node: Node) -> str:
    text = tree.render(node)
    return text if len(text) <= _SHOWN_MAX else f"{text[:_SHOWN_MAX]}…"
