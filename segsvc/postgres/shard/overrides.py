"""Overrides of single users. Implements ``services.overrides.OverrideStore`` and ``services.explain.FactReader``."""

from __future__ import annotations

from collections.abc import Callable, Sequence
from datetime import UTC, datetime
from typing import Any

import sqlalchemy as sa

from segsvc.domain.errors import Reason, UserLockTimeout, invalid_field
from segsvc.domain.operation import RequestKey
from segsvc.domain.override import (
    Effect,
    ExpiryPassed,
    MembershipFacts,
    Override,
    OverrideChanges,
    UnknownSlug,
    UserOverrides,
    WantedOverride,
)
from segsvc.domain.sharding import BLOCK_SLOTS, shard_of
from segsvc.postgres import tables
from segsvc.postgres.engine import LOCK_NOT_AVAILABLE, QUERY_CANCELED, Databases, sqlstate
from segsvc.postgres.shard.memberships import select_users
from segsvc.postgres.shard.operation_transaction import PostgresShardTransaction
from segsvc.postgres.shard.override_expiry import holds_now
from segsvc.postgres.shard.user_bits import int_array
from segsvc.postgres.shard.user_transaction import lock_shared

_users = tables.users.c
_overrides = tables.overrides.c
_segments = tables.shard_segments.c
_requests = tables.user_requests.c


STUCK_MAX_S = 30
"""Half the life of a bar in the cache: a process that is frozen between its bar and its COMMIT, and dies before it
drops the entry, must not commit when the bar is gone and an old entry may be there again."""


LOCK_SHARE = 0.9
"""The share of a statement's time that it may wait for a lock."""


class PostgresOverrideStore:
    """The overrides of all shards."""

    def __init__(self, databases: Databases) -> None:
        self._databases = databases

    @property
    def shard_count(self) -> int:
        return self._databases.shard_count

    def modify(
        self,
        user_id: int,
        changes: OverrideChanges,
        request: RequestKey | None,
        before_commit: Callable[[], None],
        *,
        timeout_s: float | None,
    ) -> UserOverrides | None:
        """See ``services.overrides.OverrideStore.modify``."""
        shard = shard_of(user_id, self.shard_count)
        with self._databases.shard_tx(shard, timeout_s=timeout_s) as connection:
            connection.execute(
                sa.select(
                    sa.func.set_config("idle_in_transaction_session_timeout", f"{STUCK_MAX_S}s", True),
                    sa.func.set_config("lock_timeout", f"{self._lock_timeout_ms(timeout_s)}ms", True),
                )
            )

            # As for events: an operation that is in doubt on this shard ends first, and no deletion comes in between.
            lock_shared(connection)

            # The row's lock orders all changes of one user, events included.
            statement = sa.select(sa.func.clock_timestamp()).where(_users.id == user_id).with_for_update()
            try:
                now = connection.execute(statement).scalar_one_or_none()
            except sa.exc.DBAPIError as error:
                # One row by its key: only the wait for its lock can take long, whichever bound ends it first.
                if sqlstate(error) in (LOCK_NOT_AVAILABLE, QUERY_CANCELED):
                    raise UserLockTimeout from error
                raise
            if now is None:
                return None

            if request is not None:
                answered = _answer_of(connection, user_id, request)
                if answered is not None:
                    return answered

            _apply(connection, user_id, changes, now)
            connection.execute(
                sa.update(tables.users).where(_users.id == user_id).values(row_version=_users.row_version + 1)
            )
            changed = _user(connection, user_id)

            if request is not None:
                _keep_answer(connection, user_id, request, changed)
            before_commit()
        return changed

    def _lock_timeout_ms(self, timeout_s: float | None) -> int:
        """The lock timeout ends before the statement's own bound, which would not say what the statement waited for."""
        bound_s = self._databases.lock_timeout_s
        return int(1000 * bound_s) if timeout_s is None else max(1, int(1000 * min(bound_s, LOCK_SHARE * timeout_s)))

    def page(self, user_id: int, after: str, limit: int, *, timeout_s: float | None) -> list[Override] | None:
        """See ``services.overrides.OverrideStore.page``."""
        shard = shard_of(user_id, self.shard_count)
        with self._databases.shard_snapshot(shard, timeout_s=timeout_s) as connection:
            if connection.execute(sa.select(_users.id).where(_users.id == user_id)).one_or_none() is None:
                return None
            return _select(connection, user_id, _by_slug > after, limit)

    def facts(self, user_id: int, slug: str, *, timeout_s: float | None) -> tuple[bool, MembershipFacts | None]:
        """See ``services.explain.FactReader.facts``."""
        shard = shard_of(user_id, self.shard_count)
        with self._databases.shard_snapshot(shard, timeout_s=timeout_s) as connection:
            user = connection.execute(
                sa.select(_users.slot, _users.attributes).where(_users.id == user_id)
            ).one_or_none()
            if user is None:
                return False, None
            segment_id = connection.execute(sa.select(_segments.id).where(_segments.slug == slug)).scalar_one_or_none()
            if segment_id is None:
                return True, None

            segment = PostgresShardTransaction(connection, shard).segment(segment_id)
            if segment is None:
                raise AssertionError("a segment of a snapshot stays there")

            bits = tables.memberships.c
            bit = connection.execute(
                sa.select(sa.func.get_bit(bits.bits, user.slot % BLOCK_SLOTS)).where(
                    bits.block == user.slot // BLOCK_SLOTS, bits.segment_id == segment_id
                )
            ).scalar_one_or_none()
            found = _select(connection, user_id, _overrides.segment_id == segment_id, 1)
            return True, MembershipFacts(segment, user.attributes, bit == 1, found[0] if found else None)


_by_slug = _segments.slug.collate("C")


def _select(
    connection: sa.Connection, user_id: int, which: sa.ColumnElement[bool], limit: int | None = None
) -> list[Override]:
    """Overrides of a user that hold, by slug."""
    rows = connection.execute(
        sa.select(_segments.slug, _overrides.effect, _overrides.expire_time, _overrides.create_time, _overrides.creator)
        .join_from(tables.overrides, tables.shard_segments, _segments.id == _overrides.segment_id)
        .where(_overrides.user_id == user_id, holds_now(), which)
        .order_by(_by_slug)
        .limit(limit)
    )
    return [Override(row.slug, Effect(row.effect), row.expire_time, row.create_time, row.creator) for row in rows]


def _apply(connection: sa.Connection, user_id: int, changes: OverrideChanges, now: datetime) -> None:
    """Raises UnknownSlug, ExpiryPassed."""
    for index, wanted in enumerate(changes.put):
        if wanted.expire_time is not None and wanted.expire_time <= now:
            raise ExpiryPassed(index)

    rows = connection.execute(sa.select(_segments.slug, _segments.id).where(_segments.slug.in_(changes.slugs)))
    ids = {row.slug: row.id for row in rows}
    for slug in changes.slugs:
        if slug not in ids:
            raise UnknownSlug(slug)

    concerned = int_array(ids.values())
    connection.execute(
        sa.delete(tables.overrides).where(_overrides.user_id == user_id, _overrides.segment_id == sa.any_(concerned))
    )
    if changes.put:
        connection.execute(
            sa.insert(tables.overrides),
            [_row(user_id, ids[wanted.slug], wanted, changes.actor) for wanted in changes.put],
        )


def _row(user_id: int, segment_id: int, wanted: WantedOverride, creator: str) -> dict[str, Any]:
    return {
        "user_id": user_id,
        "segment_id": segment_id,
        "effect": int(wanted.effect),
        "expire_time": wanted.expire_time,
        "creator": creator,
    }


def _user(connection: sa.Connection, user_id: int) -> UserOverrides:
    [user] = select_users(connection, [user_id])
    slugs = connection.execute(sa.select(_segments.slug).where(_segments.id == sa.any_(int_array(user.segment_ids))))
    return UserOverrides(sorted(slugs.scalars()), user.read_time_us, _select(connection, user_id, sa.true()))


# -- repeated requests -------------------------------------------------------------------------------------------------


def _answer_of(connection: sa.Connection, user_id: int, request: RequestKey) -> UserOverrides | None:
    """The answer that this request got before; None: it is new. Raises ServiceError REQUEST_ID_REUSED."""
    row = connection.execute(
        sa.select(_requests.content_hash, _requests.answer).where(
            _requests.user_id == user_id, _requests.request_id == request.request_id
        )
    ).one_or_none()
    if row is None:
        return None
    if row.content_hash != request.content_hash:
        raise invalid_field(
            "request_id", "was used before with another content of the request", Reason.REQUEST_ID_REUSED
        )

    answer: dict[str, Any] = row.answer
    overrides = _from_json(answer["overrides"], answer.get("creators", ()))
    return UserOverrides(answer["slugs"], answer["read_time_us"], overrides)


def _keep_answer(connection: sa.Connection, user_id: int, request: RequestKey, answer: UserOverrides) -> None:
    connection.execute(
        sa.insert(tables.user_requests).values(
            user_id=user_id,
            request_id=request.request_id,
            content_hash=request.content_hash,
            answer={
                "slugs": list(answer.slugs),
                "read_time_us": answer.read_time_us,
                "overrides": [
                    [each.slug, int(each.effect), _text(each.expire_time), _text(each.create_time)]
                    for each in answer.overrides
                ],
                # Apart from the overrides, whose form the release before reads too.
                "creators": [each.creator for each in answer.overrides],
            },
        )
    )


def _from_json(rows: Sequence[Sequence[Any]], creators: Sequence[str]) -> list[Override]:
    """``creators``: of the overrides, in their order; empty: the release before wrote the answer."""
    return [
        Override(slug, Effect(effect), _time(expires), datetime.fromisoformat(created), creator)
        for (slug, effect, expires, created), creator in zip(rows, creators or [""] * len(rows), strict=True)
    ]


def _text(time: datetime | None) -> str | None:
    return None if time is None else time.astimezone(UTC).isoformat()


def _time(text: str | None) -> datetime | None:
    return None if text is None else datetime.fromisoformat(text)
