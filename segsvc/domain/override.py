"""Overrides: single users put into or kept out of segments by hand, whatever the rules say."""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from datetime import datetime
from enum import IntEnum

from segsvc.domain.errors import invalid_field
from segsvc.domain.segment import ShardSegment, check_slug
from segsvc.domain.user import AttributeValue

CHANGES_MAX = 1000


class Effect(IntEnum):
    """Numbers as in the protos and in the tables."""

    INCLUDE = 1
    EXCLUDE = 2


@dataclass(frozen=True, slots=True)
class WantedOverride:
    """An override to set. ``expire_time`` None: it never expires."""

    slug: str
    effect: Effect
    expire_time: datetime | None


@dataclass(frozen=True, slots=True)
class Override:
    """An override that has not expired.

    Attributes:
        expire_time: None: it never expires.
        creator: name of the principal that has set it; empty: nobody had a name.
    """

    slug: str
    effect: Effect
    expire_time: datetime | None
    create_time: datetime
    creator: str = ""


@dataclass(frozen=True, slots=True)
class OverrideChanges:
    """The changes of one call: all of them are made, or none.

    Attributes:
        actor: name of the principal that makes them; empty: nobody has a name.
    """

    put: Sequence[WantedOverride]
    clear: Sequence[str]
    actor: str = ""

    @property
    def slugs(self) -> list[str]:
        return [*(wanted.slug for wanted in self.put), *self.clear]


@dataclass(frozen=True, slots=True)
class UserOverrides:
    """A user after a change.

    Attributes:
        slugs: segments the user is in, sorted.
        read_time_us: when the shard was read, microseconds since 1970.
        overrides: the unexpired ones, by slug.
    """

    slugs: Sequence[str]
    read_time_us: int
    overrides: Sequence[Override]


@dataclass(frozen=True, slots=True)
class MembershipFacts:
    """All that one membership depends on, as of one moment.

    Attributes:
        bit: the stored bit, which is the rule's result.
        override: the unexpired one; None: there is none.
    """

    segment: ShardSegment
    attributes: Mapping[str, AttributeValue]
    bit: bool
    override: Override | None


class UnknownSlug(Exception):
    """The shard has no segment of this slug. Nothing was changed."""

    def __init__(self, slug: str) -> None:
        super().__init__(slug)
        self.slug = slug


class ExpiryPassed(Exception):
    """Override number ``index`` of the call would already have expired, by the shard's clock. Nothing was changed."""

    def __init__(self, index: int) -> None:
        super().__init__(index)
        self.index = index


def check_changes(changes: OverrideChanges) -> None:
    """Check a call's changes against their limits.

    Raises:
        ServiceError: FIELD_REQUIRED, FIELD_INVALID.
    """
    if len(changes.slugs) > CHANGES_MAX:
        raise invalid_field("set", f"must be at most {CHANGES_MAX} changes with clear, are {len(changes.slugs)}")

    seen: set[str] = set()
    names = [
        *(f"set[{n}].slug" for n in range(len(changes.put))),
        *(f"clear[{n}]" for n in range(len(changes.clear))),
    ]

    for name, slug in zip(names, changes.slugs, strict=True):
        check_slug(slug, name)
        if slug in seen:
            raise invalid_field(name, f"{slug!r} comes twice")
        seen.add(slug)
