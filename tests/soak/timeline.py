"""Which values were true at which time, as far as the writers know; and which answers a read at that time may give.

A change is true at some moment between its begin (before it was sent) and its end (after it was acknowledged). A list
is right if it is the whole truth of one moment of its read: one version of the user, and for each segment a rule and an
override, all of which may have been true at that moment. Moments before the read add nothing: what they show beyond
acknowledged changes may be true at the beginning of the read as well.
"""

from __future__ import annotations

import math
import threading
from collections.abc import Mapping
from dataclasses import dataclass, field
from typing import Any, Generic, TypeVar

from segsvc.domain.bucketing import bucket
from tests.service_model import CONDITIONS, attributes_of

T = TypeVar("T")


@dataclass(slots=True)
class Change(Generic[T]):
    """A change; while it is not acknowledged, its ``end`` is infinite."""

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
        """Remove an aborted change: it was not true at any moment."""
        with self._lock:
            self._changes.remove(change)

    def possible(self, begin: float, end: float) -> list[T]:
        """Values that a read from ``begin`` to ``end`` may see."""
        with self._lock:
            changes = list(self._changes)
        settled = max(n for n, change in enumerate(changes) if change.end < begin or n == 0)
        return [change.value for change in changes[settled:] if change.begin <= end]

    def begins(self, begin: float, end: float) -> list[float]:
        """Begins of changes in this time, the first moment left out."""
        with self._lock:
            return [change.begin for change in self._changes if begin < change.begin <= end]

    def open_since(self) -> float:
        """Begin of the oldest change that is not acknowledged; infinite if every change is."""
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
"""The version of a user who does not exist."""


@dataclass(slots=True)
class History:
    """Everything that changes: rules by slug, versions by user, overrides by user and slug."""

    rules: Mapping[str, Timeline[SegmentRule]]
    users: dict[int, Timeline[int]] = field(default_factory=dict)
    overrides: dict[tuple[int, str], Timeline[bool | None]] = field(default_factory=dict)

    def forget(self, before: float) -> None:
        """Drop what no read that began at ``before`` or later can see."""
        # Loop over copies, because the writers add to these meanwhile.
        for timelines in (self.rules, self.users, self.overrides):
            for timeline in list(timelines.values()):
                timeline.forget(before)

    def wrong(self, user_id: int, answer: frozenset[str] | None, begin: float, end: float) -> str:
        """Return why an answer cannot be right, or '' if it can.

        Args:
            answer: the slugs; None means that the user was not found.
        """
        reasons = []
        for moment in self._moments(user_id, begin, end):
            reason = self._wrong_at(user_id, answer, moment)
            if not reason:
                return ""
            reasons.append(f"at {moment:.3f} {reason}")
        return "; ".join(reasons)

    def _moments(self, user_id: int, begin: float, end: float) -> list[float]:
        """The moments of a read that can differ in what may be true: between two of them changes only end."""
        timelines: list[Timeline[Any]] = [self.users[user_id], *self.rules.values()]
        timelines += [own for slug in self.rules if (own := self.overrides.get((user_id, slug)))]
        return sorted({begin, *(moment for timeline in timelines for moment in timeline.begins(begin, end))})

    def _wrong_at(self, user_id: int, answer: frozenset[str] | None, moment: float) -> str:
        """Return why an answer cannot be the truth of this moment, or '' if it can."""
        versions = self.users[user_id].possible(moment, moment)

        if answer is None:
            return "" if ABSENT in versions else f"not found, but its versions are {versions}"
        existing = [version for version in versions if version != ABSENT]
        if not existing:
            return "found, but there is no such user"

        misfits = [self._misfit(user_id, answer, version, moment) for version in existing]
        return "" if "" in misfits else " and ".join(misfits)

    def _misfit(self, user_id: int, answer: frozenset[str], version: int, moment: float) -> str:
        """The first segment with which a list cannot be that of this version of the user at this moment; '' if none."""
        for slug, timeline in self.rules.items():
            own = self.overrides.get((user_id, slug))
            forced = own.possible(moment, moment) if own else [None]
            rules = timeline.possible(moment, moment)
            may = {_member(user_id, version, rule, override) for rule in rules for override in forced}

            if (slug in answer) not in may:
                said = "in" if slug in answer else "not in"
                return f"{said} {slug}; rules {rules}, version {version}, overrides {forced}"

        return ""


def _member(user_id: int, version: int, rule: SegmentRule, override: bool | None) -> bool:
    if override is not None:
        return override
    if rule.threshold is None:
        return False
    holds = CONDITIONS[rule.condition].holds(attributes_of(user_id, version))
    return holds and bucket(user_id, rule.salt) < rule.threshold
