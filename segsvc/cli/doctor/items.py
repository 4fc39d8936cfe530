"""The results of ``segsvc doctor``."""

from __future__ import annotations

from collections.abc import Callable, Sequence
from dataclasses import dataclass
from typing import Any

from segsvc.config import Settings


@dataclass(frozen=True, slots=True)
class Item:
    """One observation.

    Attributes:
        remedy: what to do about it; empty: for information, nothing is wrong.
    """

    text: str
    remedy: str = ""


@dataclass(frozen=True, slots=True)
class Result:
    """What one check observed."""

    name: str
    items: Sequence[Item]

    @property
    def passed(self) -> bool:
        """Whether nothing is wrong."""
        return not any(item.remedy for item in self.items)

    def to_json(self) -> dict[str, Any]:
        return {
            "name": self.name,
            "ok": self.passed,
            "findings": [{"text": item.text, "remedy": item.remedy} for item in self.items],
        }


DoctorCheck = Callable[[Settings], Sequence[Item]]
"""One check of the doctor. Bounded in time; does not raise for the problems that it checks for."""
