"""What was true when, as far as those who changed it know; and which answers a read of that time may give.

A change is true at some moment between its begin (before it was sent) and its end (after it was acknowledged). So a
read may see every value whose change overlaps it, and the newest one acknowledged before it began. Nothing else.
"""

from __future__ import annotations

import math
import threading
from collections.abc import Mapping
from dataclasses import dataclass, field
from typing import Generic, TypeVar

from segsvc.domain.bucketing import bucket
from tests.service_model import CONDITIONS, attributes_of

T = TypeVar("T")


@dataclass(slots=True)
class Change(Generic[T]):
    """``end`` infinite: not acknowledged yet."""

    begin: float
    value: T
    end: float = math.inf


class Timeline(Generic[T]):
    """The values of one thing in the order of their changes, made by one writer. Times are of one monotonic clock."""

    def __init__(self, first: T) -> None:
        self._changes = [Change(-math.inf, first, -math.inf)]
        self._lock = threading.Lock()

    @property
    def last(self) -> T:
        return self._changes[-1].value

    def begin(self, value: T, now: float) -> Change[T]:
        change = Change(now, value)
        with self._lock:
            self._changes.append(change)
        return change

    def withdraw(self, change: Change[T]) -> None:
        """It was aborted: it has not been true at any moment."""
        with self._lock:
            self._changes.remove(change)

    def possible(self, begin: float, end: float) -> list[T]:
        """Values that a read from ``begin`` to ``end`` may see."""
        with self._lock:
            changes = list(self._changes)
        settled = max(n for n, change in enumerate(changes) if change.end < begin or n == 0)
        return [change.value for change in changes[settled:] if change.begin <= end]

    def open_since(self) -> float:
        """When the oldest change began that is not acknowledged; infinite if there is none."""
        with self._lock:
            return min((change.begin for change in self._changes if math.isinf(change.end) and change.end > 0),
                       default=math.inf)  # fmt: skip

    def forget(self, before: float) -> None:
        """Drop what no read that began at ``before`` or later can see."""
        with self._lock:
            settled = max(n for n, change in enumerate(self._changes) if change.end < before or n == 0)
            del self._changes[:settled]


@dataclass(frozen=True, slots=True)
class SegmentRule:
    """``threshold`` None: the segment does not exist or was never rolled out."""

    salt: int = 0
    threshold: int | None = None
    condition: int = 0


ABSENT = -1
"""A user's version where there is no user."""


@dataclass(slots=True)
class History:
    """Everything that changes: rules by slug, versions by user, overrides by user and slug."""

    rules: Mapping[str, Timeline[SegmentRule]]
    users: dict[int, Timeline[int]] = field(default_factory=dict)
    overrides: dict[tuple[int, str], Timeline[bool | None]] = field(default_factory=dict)

    def forget(self, before: float) -> None:
        """Drop what no read that began at ``before`` or later can see."""
        # Copies: the writers add to these meanwhile.
        for timelines in (self.rules, self.users, self.overrides):
            for timeline in list(timelines.values()):
                timeline.forget(before)

    def wrong(self, user_id: int, answer: frozenset[str] | None, begin: float, end: float) -> str:
        """Why an answer cannot be right; empty if it can.

        Args:
            answer: the slugs, None: there is no such user.
        """
        versions = self.users[user_id].possible(begin, end)
        if answer is None:
            return "" if ABSENT in versions else f"not found, but its versions are {versions}"
        existing = [version for version in versions if version != ABSENT]
        if not existing:
            return "found, but there is no such user"
        for slug, timeline in self.rules.items():
            own = self.overrides.get((user_id, slug))
            forced = own.possible(begin, end) if own else [None]
            rules = timeline.possible(begin, end)
            may = {
                _member(user_id, version, rule, override)
                for version in existing
                for rule in rules
                for override in forced
            }
            if (slug in answer) not in may:
                said = "in" if slug in answer else "not in"
                return f"{said} {slug}; rules {rules}, versions {existing}, overrides {forced}"
        return ""


def _member(user_id: int, version: int, rule: SegmentRule, override: bool | None) -> bool:
    if override is not None:
        return override
    if rule.threshold is None:
        return False
    holds = CONDITIONS[rule.condition].holds(attributes_of(user_id, version))
    return holds and bucket(user_id, rule.salt) < rule.threshold
