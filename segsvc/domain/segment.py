"""Segments and rules: values and their limits."""

from __future__ import annotations

import re
import secrets
from collections.abc import Mapping
from dataclasses import dataclass, field
from datetime import datetime
from decimal import Decimal
from enum import IntEnum
from typing import Any
from uuid import UUID

from segsvc.domain.errors import invalid_field, required_field

SLUG = re.compile(r"[a-z0-9][a-z0-9._-]{0,62}")
SLUG_ALLOWED = f"must match {SLUG.pattern}"
SEGMENTS_MAX = 4096
DISPLAY_NAME_MAX = 200
DESCRIPTION_MAX = 4000
LABELS_MAX = 32
LABEL_VALUE_MAX = 63
CONDITION_BYTES_MAX = 4096


class Policy(IntEnum):
    """What a rule means for users who arrive or change after the rollout; numbers as in the protos."""

    LIVE = 1
    FROZEN = 2


class SegmentState(IntEnum):
    """Numbers as in the protos, except RESERVED: it holds a slug for a creation that has started and is not decided."""

    RESERVED = 0
    ACTIVE = 1
    DELETING = 2


@dataclass(frozen=True, slots=True)
class Rule:
    """The members, apart from overrides: users for whom the condition holds and whose bucket is below ``threshold``.

    Attributes:
        threshold: number of buckets that are in, 0 … 100,000: percent × 1000.
        condition: CEL over ``user``; empty: everyone.
        policy: for users who arrive or change later.
    """

    threshold: int
    condition: str = ""
    policy: Policy = Policy.LIVE

    @property
    def percent(self) -> float:
        return self.threshold / 1000

    def to_json(self) -> dict[str, Any]:
        """The rule as the catalog keeps it in an operation's plan and in a segment as it was at a commit."""
        return {"threshold": self.threshold, "condition": self.condition, "policy": self.policy.name}

    @classmethod
    def from_json(cls, value: Mapping[str, Any]) -> Rule:
        """The rule that ``to_json`` wrote."""
        return cls(value["threshold"], value["condition"], Policy[value["policy"]])


@dataclass(frozen=True, slots=True)
class Segment:
    """A segment as the catalog knows it.

    Attributes:
        id: number used on the shards and in the cache; never reused.
        uid: distinguishes it from an earlier segment with the same slug.
        salt: 0 … 2**64 - 1; input of its bucket hash.
        rule: the rule in force; None until the first rollout.
        member_count: members at member_count_time; a count for lists, not for decisions.
        last_operation: id of the operation that last changed it; None: none was recorded.
    """

    id: int
    slug: str
    uid: UUID
    salt: int
    display_name: str
    description: str
    labels: Mapping[str, str]
    rule: Rule | None
    state: SegmentState
    etag: str
    create_time: datetime
    update_time: datetime
    member_count: int
    member_count_time: datetime | None
    last_operation: UUID | None


@dataclass(frozen=True, slots=True)
class SegmentText:
    """The texts of a segment, for people: the part that can be edited without a change of memberships."""

    display_name: str = ""
    description: str = ""
    labels: Mapping[str, str] = field(default_factory=dict)


@dataclass(frozen=True, slots=True)
class ShardSegment:
    """A segment as a shard knows it: user events are evaluated against this.

    Attributes:
        rule: None until the first rollout.
        rule_count: members on this shard by the rule, without overrides.
        frozen_slot: for a FROZEN rule, the highest slot that the rollout saw; None otherwise.
    """

    id: int
    slug: str
    salt: int
    rule: Rule | None
    rule_count: int
    frozen_slot: int | None = None


def new_etag() -> str:
    """A new etag: opaque and random, so that no two states of a segment share one."""
    return secrets.token_hex(8)


def check_slug(slug: str, name: str = "slug") -> str:
    """Raises ServiceError FIELD_REQUIRED or FIELD_INVALID; returns the slug."""
    if not slug:
        raise required_field(name)
    if not SLUG.fullmatch(slug):
        raise invalid_field(name, f"{SLUG_ALLOWED}, is {slug[:80]!r}")
    return slug


def check_text(text: SegmentText, prefix: str = "segment") -> None:
    """Check display name, description and labels against their limits. Raises ServiceError FIELD_INVALID."""
    for name, value, limit in (
        ("display_name", text.display_name, DISPLAY_NAME_MAX),
        ("description", text.description, DESCRIPTION_MAX),
    ):
        if len(value) > limit:
            raise invalid_field(f"{prefix}.{name}", f"must be at most {limit} characters, is {len(value)}")
        if "\0" in value:
            raise invalid_field(f"{prefix}.{name}", "must not contain U+0000")

    check_labels(text.labels, f"{prefix}.labels")


def check_labels(labels: Mapping[str, str], name: str) -> None:
    """Check labels against their limits. Raises ServiceError FIELD_INVALID."""
    if len(labels) > LABELS_MAX:
        raise invalid_field(name, f"must be at most {LABELS_MAX} labels, are {len(labels)}")

    for key, value in labels.items():
        if not SLUG.fullmatch(key):
            raise invalid_field(f"{name}[{key[:80]!r}]", f"key {SLUG_ALLOWED}")
        if len(value) > LABEL_VALUE_MAX or "\0" in value:
            raise invalid_field(
                f"{name}[{key!r}]", f"value must be at most {LABEL_VALUE_MAX} characters without U+0000"
            )


def make_rule(percent: float | None, condition: str, policy: Policy, prefix: str = "rule") -> Rule:
    """Build a rule from a request, exact in decimal. The condition is not parsed here: the code that puts the rule in
    force does that.

    Raises:
        ServiceError: FIELD_REQUIRED without a percent; FIELD_INVALID outside 0 to 100 or with more than three decimals.
    """
    if percent is None:
        raise required_field(f"{prefix}.percent")
    if not 0 <= percent <= 100:  # also refuses NaN
        raise invalid_field(f"{prefix}.percent", f"must be 0 to 100, is {percent!r}")

    # repr() is the shortest text that gives this double. That is what the caller wrote, so the check is exact.
    thousandths = Decimal(repr(percent)) * 1000
    if thousandths != thousandths.to_integral_value():
        raise invalid_field(f"{prefix}.percent", f"must have at most three decimals, is {percent!r}")

    return Rule(int(thousandths), condition, policy)
