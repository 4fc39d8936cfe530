"""What a point of the matrix is, and the list of them."""

from __future__ import annotations

from collections.abc import Callable
from dataclasses import dataclass

from tests.failure.cell import Kind
from tests.failure.scene import Scene

Script = Callable[[Scene], None]


@dataclass(frozen=True, slots=True)
class Point:
    """Attributes:
    what: the point in words.
    on_shard: whether the point exists on each shard.
    itself: whether the point is a fault by itself: it is also played without another fault.
    impossible: operations that do not pass it, each with the reason.
    """

    name: str
    what: str
    script: Script
    on_shard: bool
    itself: bool
    impossible: dict[Kind, str]


POINTS: dict[str, Point] = {}


def point(
    name: str, what: str, *, on_shard: bool = False, itself: bool = False, impossible: dict[Kind, str] | None = None
) -> Callable[[Script], Script]:
    """Register a script."""

    def register(script: Script) -> Script:
        POINTS[name] = Point(name, what, script, on_shard, itself, impossible or {})
        return script

    return register
