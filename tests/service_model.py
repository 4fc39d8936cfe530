"""What the service should answer, as a pure model: users, segments, rules and overrides in dictionaries."""

from __future__ import annotations

import random
from collections.abc import Callable, Mapping
from dataclasses import dataclass, field

from segsvc.domain.bucketing import bucket

Attributes = Mapping[str, object]


@dataclass(frozen=True, slots=True)
class Condition:
    """A condition, and its meaning in Python."""

    text: str
    holds: Callable[[Attributes], bool]


def _is_number(value: object) -> bool:
    return isinstance(value, int | float) and not isinstance(value, bool)


def _tagged_beta(user: Attributes) -> bool:
    tags = user.get("tags")
    return isinstance(tags, list) and "beta" in tags


CONDITIONS = (
    Condition("", lambda user: True),
    Condition('user.country == "RU"', lambda user: user.get("country") == "RU"),
    Condition("user.age >= 18", lambda user: _is_number(user.get("age")) and user["age"] >= 18),  # type: ignore[operator]
    # An absent attribute is an error, which || absorbs if the other side is true.
    Condition('"beta" in user.tags || user.vip', lambda user: _tagged_beta(user) or user.get("vip") is True),
    Condition(
        '!(user.country == "RU") && has(user.age)',
        lambda user: "country" in user and user["country"] != "RU" and "age" in user,
    ),
)


def attributes_of(user_id: int, version: int) -> dict[str, object]:
    """The attributes in a user's event of this version: always the same, so that repetitions agree."""
    draw = random.Random(f"{user_id}/{version}")
    choices: dict[str, tuple[object, ...]] = {
        "country": ("RU", "DE", "RU\u0301", "%"),
        "age": (17, 18, 18.5, 64, "18", True),
        "vip": (True, False, "yes"),
        "tags": (["beta"], ["beta", "x"], [], ["alpha"], "beta"),
    }
    return {name: draw.choice(values) for name, values in choices.items() if draw.random() < 0.75}


@dataclass
class ModelUser:
    version: int

    # Overrides by slug: True in, False out.
    overrides: dict[str, bool] = field(default_factory=dict)


@dataclass
class ModelSegment:
    """``threshold`` None: never rolled out. ``frozen``: members a FROZEN rollout found; None: the rule is LIVE."""

    salt: int
    threshold: int | None = None
    condition: Condition = CONDITIONS[0]
    frozen: set[int] | None = None


class Model:
    def __init__(self) -> None:
        self.users: dict[int, ModelUser] = {}
        self.gone: set[int] = set()
        self.segments: dict[str, ModelSegment] = {}

    def create_or_update(self, user_id: int, version: int) -> None:
        """A create-user (version 0) or update-user event, in any order with other events."""
        if user_id in self.gone:
            return
        user = self.users.setdefault(user_id, ModelUser(version))
        user.version = max(user.version, version)

    def delete_user(self, user_id: int) -> None:
        """Final, even for a user whose creation has not arrived yet."""
        self.gone.add(user_id)
        self.users.pop(user_id, None)

    def roll_out(self, slug: str, threshold: int, condition: Condition, *, frozen: bool) -> None:
        segment = self.segments[slug]
        segment.threshold, segment.condition, segment.frozen = threshold, condition, None
        if frozen:
            segment.frozen = {user for user in self.users if self.by_rule(user, segment)}

    def by_rule(self, user_id: int, segment: ModelSegment) -> bool:
        if segment.threshold is None:
            return False
        if segment.frozen is not None:
            return user_id in segment.frozen
        attributes = attributes_of(user_id, self.users[user_id].version)
        return segment.condition.holds(attributes) and bucket(user_id, segment.salt) < segment.threshold

    def member(self, user_id: int, slug: str) -> bool:
        override = self.users[user_id].overrides.get(slug)
        return self.by_rule(user_id, self.segments[slug]) if override is None else override

    def slugs_of(self, user_id: int) -> list[str] | None:
        """Sorted; None: there is no such user."""
        if user_id not in self.users:
            return None
        return sorted(slug for slug in self.segments if self.member(user_id, slug))

    def delete_segment(self, slug: str) -> None:
        del self.segments[slug]
        for user in self.users.values():
            user.overrides.pop(slug, None)
