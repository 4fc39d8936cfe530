"""A change of one user's overrides that is cut off at each of its points is made or not, and never half visible."""

from __future__ import annotations

import contextlib
from concurrent.futures import ThreadPoolExecutor
from datetime import UTC, datetime, timedelta
from uuid import UUID

import pytest

from segsvc.cache import scripts
from segsvc.domain.errors import Reason, ServiceError
from segsvc.domain.operation import RequestKey
from segsvc.domain.override import Effect, OverrideChanges, WantedOverride
from segsvc.failpoints import FailpointError
from segsvc.postgres.catalog.segments import PostgresSegmentCatalog
from segsvc.postgres.engine import Databases, Pool
from segsvc.postgres.shard import overrides
from segsvc.postgres.shard.operation_transaction import lock_exclusive
from segsvc.postgres.shard.overrides import PostgresOverrideStore
from segsvc.services.overrides import OverrideService
from segsvc.services.segments import SegmentService
from tests.eventually import eventually
from tests.installation import KEYS
from tests.integration.cache.conftest import SHARDS, World

USER = 4
SHARD = USER % SHARDS
REQUEST = RequestKey("ModifyUserOverrides", UUID(int=1), b"content")
EXCLUDE_ALPHA = OverrideChanges((WantedOverride("alpha", Effect.EXCLUDE, None),), ())


class FailsAt:
    """Crash points, one of which fails once."""

    def __init__(self, point: str = "") -> None:
        self.point = point
        self.reached: list[str] = []

    def reach(self, point: str, **_: object) -> None:
        self.reached.append(point)
        if point == self.point:
            self.point = ""
            raise FailpointError(point)


def service(world: World, crash: FailsAt) -> OverrideService:
    store = PostgresOverrideStore(world.databases)
    return OverrideService(store, world.client, SegmentService(PostgresSegmentCatalog(world.databases)), crash)


def on_the_shard(world: World) -> set[int]:
    (row,) = world.memberships.load(SHARD, [USER])
    return set(row.segment_ids)


@pytest.fixture
def alpha(world: World) -> int:
    """A segment of which the user is a member by the rule, with the user's entry in the cache."""
    world.add_users(6)
    made = world.add_segment("alpha", [USER])
    world.fill(USER)
    assert world.cached_segments(USER) == (made,)
    return made


@pytest.mark.parametrize("point", ["override-not-blocked", "override-blocked"])
def test_cut_off_before_the_commit_nothing_has_changed(world: World, alpha: int, point: str) -> None:
    with pytest.raises(FailpointError):
        service(world, FailsAt(point)).modify(USER, EXCLUDE_ALPHA, REQUEST)

    assert on_the_shard(world) == {alpha}
    if point == "override-not-blocked":
        assert world.cached_segments(USER) == (alpha,)
        return
    # The crashed call left its bar: reads of the user go to the shard until the bar ends by itself.
    assert world.cached_segments(USER) is None
    assert not world.client.acquire(SHARD, [USER]).user_ids
    left_ms = world.raw.pttl(KEYS.user(SHARD, USER))
    assert 0 < left_ms <= scripts.BAR_MS

    # The bar does not hinder another call.
    assert list(service(world, FailsAt()).modify(USER, EXCLUDE_ALPHA, REQUEST).slugs) == []
    assert world.client.acquire(SHARD, [USER]).user_ids == {USER}


def test_cut_off_after_the_commit_no_old_entry_is_left_and_a_repetition_ends_it(world: World, alpha: int) -> None:
    with pytest.raises(FailpointError):
        service(world, FailsAt("override-committed")).modify(USER, EXCLUDE_ALPHA, REQUEST)

    assert on_the_shard(world) == set()
    assert world.cached_segments(USER) is None, "the bar keeps the old entry away"

    crash = FailsAt()
    repeated = service(world, crash).modify(USER, EXCLUDE_ALPHA, REQUEST)
    assert list(repeated.slugs) == []
    assert [own.slug for own in repeated.overrides] == ["alpha"]

    # The request was applied already, so the repetition changed nothing and set no bar. The crashed call's bar ends by
    # itself.
    assert crash.reached == ["override-committed"]
    assert on_the_shard(world) == set()


def test_a_reader_between_bar_and_commit_fills_nothing(world: World, alpha: int) -> None:
    lease = world.client.acquire(SHARD, [USER])
    assert not lease.user_ids, "it is cached"
    world.raw.delete(KEYS.user(SHARD, USER))
    slow = world.client.acquire(SHARD, [USER])
    assert slow.user_ids == {USER}
    (old,) = world.memberships.load(SHARD, [USER])

    service(world, FailsAt()).modify(USER, EXCLUDE_ALPHA, None)

    entry = (old.valid_until_us, old.row_version, old.read_time_us, old.epoch, old.slot, *sorted(old.segment_ids))
    assert world.client.fill(SHARD, slow, [(USER, entry)]) == 0
    assert world.cached_segments(USER) is None


def test_without_the_cache_nothing_changes(own_world: World) -> None:
    own_world.add_users(6)
    alpha = own_world.add_segment("alpha", [USER])
    own_world.server.kill()
    with pytest.raises(ServiceError) as refused:
        service(own_world, FailsAt()).modify(USER, EXCLUDE_ALPHA, REQUEST)
    assert refused.value.reason is Reason.CACHE_UNAVAILABLE
    assert on_the_shard(own_world) == {alpha}
    own_world.server.start()

    def changes() -> bool:
        with contextlib.suppress(ServiceError):
            return not service(own_world, FailsAt()).modify(USER, EXCLUDE_ALPHA, REQUEST).slugs
        return False

    eventually(changes)  # the client tries the server again a few times a second
    assert on_the_shard(own_world) == set()


def test_an_override_that_ends_while_its_user_is_waited_for_is_not_answered(world: World, alpha: int) -> None:
    beta = world.add_segment("beta")
    soon = datetime.now(UTC) + timedelta(seconds=1.5)
    service(world, FailsAt()).modify(
        USER, OverrideChanges((WantedOverride("beta", Effect.INCLUDE, soon),), ()), REQUEST
    )
    assert on_the_shard(world) == {alpha, beta}

    waits = "SELECT FROM pg_stat_activity WHERE datname = current_database() AND wait_event_type = 'Lock'"

    with ThreadPoolExecutor(1) as thread, world.databases.shards[SHARD].begin() as operation:
        lock_exclusive(operation)
        answer = thread.submit(service(world, FailsAt()).modify, USER, EXCLUDE_ALPHA, None)
        eventually(lambda: world.installation.execute(SHARD, waits))
        eventually(lambda: on_the_shard(world) == {alpha})
        operation.rollback()
        changed = answer.result(10)

    assert list(changed.slugs) == []
    assert [own.slug for own in changed.overrides] == ["alpha"]


def test_an_override_may_end_with_the_last_second_there_is(world: World, alpha: int) -> None:
    """So it may where this second is in the year 10000 by the server's own time zone."""
    last = datetime(9999, 12, 31, 23, 59, 59, 999_999, tzinfo=UTC)
    [[database]] = world.installation.execute(SHARD, "SELECT quote_ident(current_database())")
    world.installation.execute(SHARD, f"ALTER DATABASE {database} SET timezone = 'Asia/Tokyo'")

    databases = Databases(world.settings, "test", Pool(1))

    try:
        store = PostgresOverrideStore(databases)
        ours = OverrideService(store, world.client, SegmentService(PostgresSegmentCatalog(world.databases)), FailsAt())

        wanted = WantedOverride("alpha", Effect.EXCLUDE, last)
        changed = ours.modify(USER, OverrideChanges((wanted,), ()), None)
        assert [own.expire_time for own in changed.overrides] == [last]
        assert [own.expire_time for own in ours.list(USER, page_size=5, page_token="").overrides] == [last]
    finally:
        databases.close()
        world.installation.execute(SHARD, f"ALTER DATABASE {database} RESET timezone")

    assert on_the_shard(world) == set()


class Stuck(FailsAt):
    """A process that is frozen between its bar and its COMMIT until PostgreSQL has ended its session."""

    def __init__(self, world: World) -> None:
        super().__init__()
        self._world = world

    def reach(self, point: str, **where: object) -> None:
        super().reach(point, **where)
        if point == "override-blocked":
            assert self._open()
            eventually(lambda: not self._open())

    def _open(self) -> bool:
        rows = self._world.installation.execute(
            SHARD,
            "SELECT pid FROM pg_stat_activity WHERE datname = current_database() AND state = 'idle in transaction'",
        )
        return bool(rows)


def test_a_stuck_call_cannot_commit_after_its_bar_has_ended(
    world: World, alpha: int, monkeypatch: pytest.MonkeyPatch
) -> None:
    assert overrides.STUCK_MAX_S * 1000 <= scripts.BAR_MS / 2
    monkeypatch.setattr(overrides, "STUCK_MAX_S", 1)
    with pytest.raises(ServiceError) as refused:
        service(world, Stuck(world)).modify(USER, EXCLUDE_ALPHA, REQUEST)
    assert refused.value.reason is Reason.SHARD_UNAVAILABLE
    assert on_the_shard(world) == {alpha}
