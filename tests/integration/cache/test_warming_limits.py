"""The warmer within its memory, and while it loses the cache."""

from __future__ import annotations

import time

import pytest

import segsvc.services.warming
from segsvc.cache.client import CacheClient
from segsvc.domain.errors import ServiceError
from segsvc.services.warming import Warmer, WarmReport
from tests.integration.cache.conftest import World
from tests.integration.cache.watched import BLOCK_USERS, SHARD, Watched, is_warm, users_of_block

# -- memory ---------------------------------------------------------------------------------------------------------


def test_budget_of_nothing_warms_nothing(world: World, watched: Watched) -> None:
    world.add_users(20)
    assert watched.warmer(budget_bytes=0).warm_shard(SHARD) == WarmReport(SHARD)


@pytest.fixture
def full(world: World, watched: Watched) -> tuple[Watched, Warmer]:
    """Five blocks, of which the two most read ones found room."""
    world.add_users(2 * 5 * BLOCK_USERS)
    watched.notes.add_reads(SHARD, {1: 100, 2: 50})
    room = watched.notes.memory(SHARD).used_bytes + 1

    def take_the_rest() -> None:
        if watched.asked == 2 * BLOCK_USERS:
            world.raw.set("ballast", b"x" * 1_000_000)

    watched.after_ask = take_the_rest

    warmer = watched.warmer(budget_bytes=room + 900_000)
    report = warmer.warm_shard(SHARD)
    assert report.stopped_by_budget
    assert watched.filled == [1, 2]

    watched.after_ask = lambda: None
    watched.filled.clear()
    return watched, warmer


def test_nothing_is_added_beyond_the_budget(world: World, full: tuple[Watched, Warmer]) -> None:
    watched, warmer = full
    assert warmer.warm_shard(SHARD).blocks == 0, "no memory has come free, so there is nothing to look for yet"
    watched.now_s += 60
    report = warmer.warm_shard(SHARD)
    assert (report.entries, report.stopped_by_budget) == (0, True)
    assert not is_warm(world, users_of_block(4)[:1])


def test_entries_within_the_budget_are_renewed_after_a_bulk_change(world: World, full: tuple[Watched, Warmer]) -> None:
    """They take no more memory than the old entries; otherwise a full cache would be cold after each change."""
    watched, warmer = full
    world.client.drop_generations([SHARD])
    report = warmer.warm_shard(SHARD)
    assert (report.entries, report.stopped_by_budget) == (2 * BLOCK_USERS, True)
    assert watched.filled == [1, 2]
    assert is_warm(world, users_of_block(1) + users_of_block(2))


def test_servers_own_limit_is_kept_clear_of(own_world: World, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(segsvc.services.warming, "BLOCKS_AT_ONCE", 1)
    own_world.add_users(2 * 3 * BLOCK_USERS)
    watched = Watched(own_world)
    used = watched.notes.memory(SHARD).used_bytes
    own_world.raw.config_set("maxmemory", int(used / 0.95))
    report = watched.warmer().warm_shard(SHARD)
    assert (report.entries, report.stopped_by_budget) == (0, True)
    own_world.raw.config_set("maxmemory", 0)
    assert watched.notes.memory(SHARD).max_bytes is None


# -- outages --------------------------------------------------------------------------------------------------------


def test_cache_lost_during_a_run_is_warmed_by_the_next(own_world: World, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(segsvc.services.warming, "BLOCKS_AT_ONCE", 1)
    own_world.add_users(2 * 3000)
    watched = Watched(own_world)

    def lose() -> None:
        if len(watched.filled) == 2:
            watched.before_fill = lambda: None
            own_world.server.restart()

    watched.before_fill = lose
    warmer = watched.warmer()
    assert warmer.warm_shard(SHARD).entries < 3000
    assert warmer.warm_shard(SHARD).entries == 3000


def test_run_that_broke_off_is_taken_up_again(own_world: World, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(segsvc.services.warming, "BLOCKS_AT_ONCE", 1)
    users = own_world.add_users(2 * 3000)
    watched = Watched(own_world)

    def break_off() -> None:
        if len(watched.filled) == 1:
            watched.before_fill = lambda: None
            own_world.server.kill()

    watched.before_fill = break_off
    warmer = watched.warmer()
    with pytest.raises(ServiceError):
        warmer.warm_shard(SHARD)
    own_world.server.start()
    time.sleep(CacheClient.RETRY_S)  # beat sends the next run some seconds later
    assert warmer.warm_shard(SHARD).entries == 3000
    assert is_warm(own_world, [user for user in users if user % 2 == 0])
