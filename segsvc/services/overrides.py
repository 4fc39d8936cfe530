"""Overrides of one user: changed all together or not at all, and visible to every read after the acknowledgement."""

from __future__ import annotations

import time
from collections.abc import Callable, Sequence
from dataclasses import dataclass
from typing import Protocol

from segsvc.domain.access import NOBODY
from segsvc.domain.errors import (
    LockTimeout,
    Reason,
    ServiceError,
    UserLockTimeout,
    invalid_field,
    segment_deleting,
    segment_not_found,
    user_not_found,
)
from segsvc.domain.operation import RequestKey
from segsvc.domain.override import (
    ExpiryPassed,
    Override,
    OverrideChanges,
    UnknownSlug,
    UserOverrides,
    check_changes,
)
from segsvc.domain.paging import decode_token, encode_token
from segsvc.domain.segment import SegmentState
from segsvc.domain.sharding import check_user_id, shard_of
from segsvc.failpoints import CrashPoints
from segsvc.log import get_logger
from segsvc.services.segments import SegmentService

LOCK_PATIENCE_S = 10.0
"""How long a change waits for a shard that an operation holds, if the caller has no deadline."""

LOCK_WAIT_MIN_S = 0.05
"""With less time than this left, the change does not wait again."""


class OverrideStore(Protocol):
    """The shards, as far as overrides need them. All methods raise SHARD_UNAVAILABLE, DEADLINE_EXCEEDED."""

    @property
    def shard_count(self) -> int: ...

    def modify(
        self,
        user_id: int,
        changes: OverrideChanges,
        request: RequestKey | None,
        before_commit: Callable[[], None],
        *,
        timeout_s: float | None,
    ) -> UserOverrides | None:
        """Change a user's overrides in one transaction, or find that this request did so before.

        Args:
            before_commit: called with the user's row locked, everything written and nothing committed.
            timeout_s: bound of each statement. A wait for a lock ends a little earlier, so that the error can name the
                lock as the cause. None: the session's bound.

        Returns:
            The user's overrides afterwards (for a repeated request: as it was answered); None: there is no such user.

        Raises:
            UnknownSlug, ExpiryPassed; ServiceError REQUEST_ID_REUSED; LockTimeout: an operation holds the shard;
            UserLockTimeout: another change holds the user.
        """

    def page(self, user_id: int, after: str, limit: int, *, timeout_s: float | None) -> list[Override] | None:
        """Overrides in force, by slug, those after slug ``after``; None: there is no such user."""


class UserBars(Protocol):
    """The cache, as far as a change of one user needs it. Both raise CACHE_UNAVAILABLE."""

    def bar(self, shard: int, user_id: int) -> bytes: ...

    def drop_entries(self, shard: int, user_ids: Sequence[int], token: bytes | None = None) -> None: ...


log = get_logger(__name__)


@dataclass(frozen=True, slots=True)
class OverridePage:
    """``next_page_token`` is empty on the last page."""

    overrides: Sequence[Override]
    next_page_token: str


class OverrideService:
    def __init__(
        self, store: OverrideStore, cache: UserBars, segments: SegmentService, crash_points: CrashPoints
    ) -> None:
        self._store = store
        self._cache = cache
        self._segments = segments
        self._crash = crash_points

    def modify(
        self, user_id: int, changes: OverrideChanges, request: RequestKey | None, *, timeout_s: float | None = None
    ) -> UserOverrides:
        """Put a user in and out of segments: all of the changes, or none.

        Raises:
            ServiceError: FIELD_REQUIRED, FIELD_INVALID, USER_NOT_FOUND, SEGMENT_NOT_FOUND, SEGMENT_DELETING,
                REQUEST_ID_REUSED, SHARD_UNAVAILABLE, CACHE_UNAVAILABLE (the change may have been made, and is not
                visible to every read yet: repeat it), DEADLINE_EXCEEDED.
        """
        check_user_id(user_id)
        check_changes(changes)

        give_up = time.monotonic() + (LOCK_PATIENCE_S if timeout_s is None else timeout_s)
        shard = shard_of(user_id, self._store.shard_count)
        token: bytes | None = None

        def bar() -> None:
            # Before COMMIT: from here on the user's key holds our bar, so no fill succeeds and no read hits, until
            # drop_entries below; if this process dies, until the bar expires. If the cache refuses the bar, nothing is
            # committed.
            nonlocal token
            self._crash.reach("override-not-blocked", shard=shard)
            token = self._cache.bar(shard, user_id)
            self._crash.reach("override-blocked", shard=shard)

        left_s = timeout_s
        while True:
            try:
                changed = self._store.modify(user_id, changes, request, bar, timeout_s=left_s)
                break
            except LockTimeout as held:
                # Nothing was done, and the holder of the lock ends by itself: an operation that is in doubt on this
                # shard, or another change of this user, which may have to wait for the cache.
                if timeout_s is not None:
                    left_s = give_up - time.monotonic()
                if give_up - time.monotonic() < LOCK_WAIT_MIN_S:
                    raise _held_up(held, user_id, shard) from None
            except UnknownSlug as unknown:
                raise self._refusal(unknown.slug, timeout_s) from None
            except ExpiryPassed as passed:
                raise invalid_field(f"set[{passed.index}].expire_time", "must be in the future") from None

        if changed is None:
            raise user_not_found(user_id)

        self._crash.reach("override-committed", shard=shard)
        # After COMMIT, before the answer. A repeated request comes here without a bar of its own: the first one may
        # have died between its COMMIT and drop_entries.
        self._cache.drop_entries(shard, [user_id], token)
        log.info("overrides_changed", user_id=user_id, slugs=list(changes.slugs), actor=changes.actor or NOBODY)
        return changed

    def list(self, user_id: int, *, page_size: int, page_token: str, timeout_s: float | None = None) -> OverridePage:
        """Overrides of a user that are in force now, by slug.

        Raises:
            ServiceError: FIELD_INVALID, PAGE_TOKEN_INVALID, USER_NOT_FOUND, SHARD_UNAVAILABLE, DEADLINE_EXCEEDED.
        """
        check_user_id(user_id)
        scope = f"overrides of {user_id}"
        after = decode_token(scope, page_token, "page_token")[0] if page_token else ""
        found = self._store.page(user_id, after, page_size + 1, timeout_s=timeout_s)
        if found is None:
            raise user_not_found(user_id)
        page = found[:page_size]
        return OverridePage(page, encode_token(scope, [page[-1].slug]) if len(found) > page_size else "")

    def _refusal(self, slug: str, timeout_s: float | None) -> ServiceError:
        """Why a segment that the shard does not have cannot be changed. The shard's lock was held, so no creation of it
        is in flight: at most a deletion that is committed on this shard."""
        segment = self._segments.get(slug, timeout_s=timeout_s)
        return segment_deleting(slug) if segment.state is SegmentState.DELETING else segment_not_found(slug)


def _held_up(held: LockTimeout, user_id: int, shard: int) -> ServiceError:
    """Why a change that waited for a lock was not made."""
    if isinstance(held, UserLockTimeout):
        message = f"user {user_id} is being changed by another call or event; nothing was changed"
        return ServiceError(Reason.OVERLOADED, message, {"user_id": str(user_id)}, retry_after_s=1.0)
    message = f"shard {shard} is being changed by an operation; nothing was changed"
    return ServiceError(Reason.SHARD_UNAVAILABLE, message, {"shard": str(shard)}, retry_after_s=1.0)
