"""What a user goes through: absent < created < deleted, deleted is final, the newest version of the attributes wins.

Each step either moves a user forward or has no effect. So the same events in any order, any number of times, end in
the same state (creations have version 0, and two events of one user and version are the same event).
"""

from __future__ import annotations

from collections.abc import Iterable
from dataclasses import dataclass
from enum import IntEnum
from typing import NamedTuple

from segsvc.domain.events import CreateUser, UpdateUser, UserEvent


class Phase(IntEnum):
    """A user never goes back."""

    ABSENT = 0
    CREATED = 1
    DELETED = 2


@dataclass(frozen=True, slots=True)
class StoredUser:
    """What a batch needs to know of a user who is there."""

    slot: int
    version: int


class UserRow(NamedTuple):
    """A user to write. ``slot`` is used by insertions alone: it never changes. ``attributes`` is JSON text."""

    user_id: int
    slot: int
    version: int
    attributes: str


@dataclass(slots=True)
class UserFold:
    """One user, while the events of a batch are applied to what the shard holds.

    Attributes:
        was: the phase before the batch.
        slot: where a user that was CREATED before the batch has its bits; None otherwise.
        version: of the newest event; what counts when the next one comes.
        attributes: compact JSON of the newest event of the batch; None: as stored, or none.
        renewed: whether an event without an effect came that is not a creation: perhaps a repetition of one whose
            effect was committed and never made visible.
    """

    was: Phase = Phase.ABSENT
    slot: int | None = None
    version: int = 0
    phase: Phase = Phase.ABSENT
    attributes: str | None = None
    renewed: bool = False

    def apply(self, event: UserEvent) -> bool:
        """Apply one event; False: it has no effect."""
        effect = self._apply(event)
        if not effect and not isinstance(event, CreateUser):
            self.renewed = True
        return effect

    def _apply(self, event: UserEvent) -> bool:
        if self.phase is Phase.DELETED:
            return False
        if isinstance(event, CreateUser):
            if self.phase is Phase.CREATED:
                return False
            self.phase, self.version, self.attributes = Phase.CREATED, 0, event.attributes
            return True
        if isinstance(event, UpdateUser):
            if self.phase is Phase.CREATED and event.version <= self.version:
                return False
            self.phase, self.version, self.attributes = Phase.CREATED, event.version, event.attributes
            return True
        self.phase, self.attributes = Phase.DELETED, None
        return True

    @property
    def is_new(self) -> bool:
        """Absent before the batch, there after it."""
        return self.was is Phase.ABSENT and self.phase is Phase.CREATED

    @property
    def is_changed(self) -> bool:
        """There before and after, with other attributes."""
        return self.was is Phase.CREATED and self.phase is Phase.CREATED and self.attributes is not None

    @property
    def is_removed(self) -> bool:
        """There before, gone after."""
        return self.was is Phase.CREATED and self.phase is Phase.DELETED

    @property
    def needs_tombstone(self) -> bool:
        """Deleted by the batch, whether there before or not: leaves a tombstone, so that it stays gone."""
        return self.was is not Phase.DELETED and self.phase is Phase.DELETED

    @property
    def may_be_cached_stale(self) -> bool:
        """Whether the cache may hold what is no longer true.

        A user who was absent is not in the cache: unknown users are never put there. Of the others, one whose events
        had no effect counts too: an earlier delivery may have committed and died before it told the cache.
        """
        return self.was is not Phase.ABSENT and (self.renewed or self.is_changed or self.is_removed)


def fold(users: dict[int, UserFold], events: Iterable[UserEvent]) -> int:
    """Apply events in order; users who are not in ``users`` were absent and are added.

    Returns:
        how many events had an effect.
    """
    applied = 0
    for event in events:
        user = users.get(event.user_id)
        if user is None:
            user = users[event.user_id] = UserFold()
        applied += user.apply(event)
    return applied
