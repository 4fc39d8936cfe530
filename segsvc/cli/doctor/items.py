"""What ``segsvc doctor`` finds."""

from __future__ import annotations

from collections.abc import Callable, Sequence
from dataclasses import dataclass
from typing import Any

from segsvc.config import Settings


@dataclass(frozen=True, slots=True)
class Item:
    """One thing that was seen.

    Attributes:
        remedy: what to do about it; empty: it is only told, nothing is wrong.
    """

    text: str
    remedy: str = ""


@dataclass(frozen=True, slots=True)
class Result:
    """What one examination saw."""

    name: str
    items: Sequence[Item]

    @property
    def well(self) -> bool:
        return not any(item.remedy for item in self.items)

    def to_json(self) -> dict[str, Any]:
        return {
            "name": self.name,
            "ok": self.well,
            "findings": [{"text": item.text, "remedy": item.remedy} for item in self.items],
        }


Examination = Callable[[Settings], Sequence[Item]]
"""Bounded in time; does not raise for what it is there to find."""
