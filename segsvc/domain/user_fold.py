"""The life of a user: absent < created < deleted; deleted is final; the newest version of the attributes wins.

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
    """A user never goes back to an earlier phase."""

    ABSENT = 0
    CREATED = 1
    DELETED = 2


@dataclass(frozen=True, slots=True)
class StoredUser:
    """What a batch needs to know of an existing user."""

    slot: int
    version: int


class UserRow(NamedTuple):
    """A user to write. Only insertions use ``slot``: it never changes. ``attributes`` is JSON text."""

    user_id: int
    slot: int
    version: int
    attributes: str


@dataclass(slots=True)
class UserFold:
    """One user, while the events of a batch are applied to the state that the shard holds.

    Attributes:
        was: the phase before the batch.
        slot: place of the user's bits, for a user that was CREATED before the batch; None otherwise.
        version: version of the newest event; the next event is compared with it.
        attributes: compact JSON of the newest event of the batch; None: unchanged, or the user has none.
        repeated: whether an update or deletion without an effect came. It may repeat an event whose effect was
            committed and never made visible.
    """

    was: Phase = Phase.ABSENT
    slot: int | None = None
    version: int = 0
    phase: Phase = Phase.ABSENT
    attributes: str | None = None
    repeated: bool = False

    def apply(self, event: UserEvent) -> bool:
        """Apply one event. False: it had no effect."""
        effect = self._apply(event)
        if not effect and not isinstance(event, CreateUser):
            self.repeated = True
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
        """Absent before the batch, existing after it."""
        return self.was is Phase.ABSENT and self.phase is Phase.CREATED

    @property
    def is_changed(self) -> bool:
        """Existing before and after the batch, with new attributes."""
        return self.was is Phase.CREATED and self.phase is Phase.CREATED and self.attributes is not None

    @property
    def is_removed(self) -> bool:
        """Existing before the batch, deleted after it."""
        return self.was is Phase.CREATED and self.phase is Phase.DELETED

    @property
    def needs_tombstone(self) -> bool:
        """Deleted by the batch, whether it existed before or not: a tombstone keeps it deleted."""
        return self.was is not Phase.DELETED and self.phase is Phase.DELETED

    @property
    def may_be_cached_stale(self) -> bool:
        """Whether the cache may hold an outdated entry.

        A user who was absent is not in the cache: unknown users are never cached. An existing user whose events had no
        effect counts, too: the worker of an earlier delivery may have committed and died before it updated the cache.
        """
        return self.was is not Phase.ABSENT and (self.repeated or self.is_changed or self.is_removed)


def fold(users: dict[int, UserFold], events: Iterable[UserEvent]) -> int:
    """Apply events in order; users who are not in ``users`` were absent and are added.

    Returns:
        the number of events that had an effect.
    """
    applied = 0
    for event in events:
        user = users.get(event.user_id)
        if user is None:
            user = users[event.user_id] = UserFold()
        applied += user.apply(event)
    return applied
