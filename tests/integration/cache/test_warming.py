"""The warmer on a real cache and real shards: what it fills, in which order, within which memory, and when it rests."""

from __future__ import annotations

import time
from collections.abc import Callable, Sequence

import pytest

import segsvc.services.warming
from segsvc.cache import keys
from segsvc.cache.client import CacheClient
from segsvc.cache.warm_notes import WarmNotes
from segsvc.domain.errors import ServiceError
from segsvc.domain.membership import FIRST_SEGMENT, ROW_VERSION, VALID_UNTIL, EntryColumns, Grant
from segsvc.services.slug_map import SlugMap
from segsvc.services.warming import Warmer, WarmReport
from tests.integration.cache.conftest import World

SHARD = 0
BLOCK_USERS = 1024


class Watched:
    """The world's cache and shards, with notes of what is asked and filled; and a clock."""

    def __init__(self, world: World) -> None:
        self.world = world
        self.notes = WarmNotes(world.client)
        self.filled: list[int] = []
        self.asked = 0
        self.now_s = 1_800_000_000.0
        self.before_fill: Callable[[], None] = lambda: None
        self.after_ask: Callable[[], None] = lambda: None

    def acquire(self, shard: int, user_ids: Sequence[int]) -> Grant:
        self.asked += len(user_ids)
        self.after_ask()
        return self.world.client.acquire(shard, user_ids)

    def fill_columns(self, shard: int, grant: Grant, columns: EntryColumns) -> int:
        self.before_fill()
        self.filled += list(dict.fromkeys(columns.blocks.tolist()))
        return self.world.client.fill_columns(shard, grant, columns)

    def release(self, shard: int, grant: Grant, user_ids: Sequence[int]) -> None:
        self.world.client.release(shard, grant, user_ids)

    def warmer(self, budget_bytes: int = 1 << 40) -> Warmer:
        return Warmer(
            reads=self.world.memberships,
            cache=self,
            notes=self.notes,
            slugs=SlugMap(self.world.memberships.slugs),
            budget_bytes=budget_bytes,
            now_s=lambda: self.now_s,
        )


@pytest.fixture
def watched(world: World, monkeypatch: pytest.MonkeyPatch) -> Watched:
    monkeypatch.setattr(segsvc.services.warming, "BLOCKS_AT_ONCE", 1)
    return Watched(world)


def users_of_block(block: int) -> list[int]:
    """With two shards and users 1, 2, 3 …: those of shard 0."""
    return [2 * (slot + 1) for slot in range(block * BLOCK_USERS, (block + 1) * BLOCK_USERS)]


def is_warm(world: World, users: Sequence[int]) -> bool:
    return None not in world.cached(*users)


# -- what it fills --------------------------------------------------------------------------------------------------


def test_entries_are_what_a_miss_would_fill(world: World, watched: Watched) -> None:
    users = world.add_users(2 * 1500)
    first = world.add_segment("first", users[::3])
    second = world.add_segment("second", users[::5])
    world.override(4, first, 1, 100)
    world.override(2, second, 2)
    world.override(6, second, 1, -1)
    world.installation.execute(0, "UPDATE users SET row_version = id")
    report = watched.warmer().warm_shard(SHARD)
    mine = [user for user in users if user % 2 == 0]
    assert (report.entries, report.blocks, report.stopped_by_budget) == (1500, 2, False)
    slugs = {first: "first", second: "second"}
    rows = {row.user_id: row for row in world.memberships.load(SHARD, mine)}
    for user, entry in zip(mine, world.cached(*mine), strict=True):
        assert entry is not None
        assert list(entry[FIRST_SEGMENT:]) == sorted(rows[user].segment_ids, key=slugs.__getitem__)
        assert (entry[VALID_UNTIL], entry[ROW_VERSION]) == (rows[user].valid_until_us, user)
    assert not is_warm(world, [1]), "the other shard is another run's"


def test_users_who_are_not_there_are_not_filled(world: World, watched: Watched) -> None:
    world.add_users(20)
    world.installation.execute(0, "DELETE FROM users WHERE id = 4")
    directory = bytearray(world.installation.execute(0, "SELECT user_ids FROM directory")[0][0])  # type: ignore[call-overload]
    directory[8:16] = bytes(8)
    world.installation.execute(0, "UPDATE directory SET user_ids = :ids", ids=bytes(directory))
    assert watched.warmer().warm_shard(SHARD).entries == 9
    assert world.raw.get(keys.user(SHARD, 4)) is None


def test_user_deleted_while_the_block_is_warmed_leaves_no_lease(
    world: World, watched: Watched, monkeypatch: pytest.MonkeyPatch
) -> None:
    world.add_users(20)
    warmer = watched.warmer()
    acquire = watched.acquire

    def delete_then(shard: int, user_ids: Sequence[int]) -> Grant:
        grant = acquire(shard, user_ids)
        world.installation.execute(
            0, "UPDATE directory SET user_ids = overlay(user_ids placing :no from 9)", no=bytes(8)
        )
        return grant

    monkeypatch.setattr(watched, "acquire", delete_then)
    assert warmer.warm_shard(SHARD).entries == 9
    assert world.raw.get(keys.user(SHARD, 4)) is None


def test_user_changed_while_the_block_is_warmed_is_not_filled(world: World, watched: Watched) -> None:
    """The change takes the lease away: what was read before it must not become a hit."""
    world.add_users(20)
    segment = world.add_segment("beta", [4])

    def change() -> None:
        world.installation.execute(0, "DELETE FROM memberships WHERE segment_id = :id", id=segment)
        world.client.unblock(SHARD, [4])

    watched.before_fill = change
    assert watched.warmer().warm_shard(SHARD).entries == 9
    assert world.cached(4) == [None]
    assert world.cached_segments(6) == ()


def test_bulk_change_while_warming_ends_the_run_and_the_next_does_all_again(world: World, watched: Watched) -> None:
    world.add_users(2 * 3000)
    segment = world.add_segment("beta", [4])
    changed = False

    def change() -> None:
        nonlocal changed
        if not changed and len(watched.filled) == 1:
            changed = True
            world.set_members(segment, [6])
            world.client.drop_generations([SHARD])

    watched.before_fill = change
    warmer = watched.warmer()
    assert warmer.warm_shard(SHARD).blocks < 4
    report = warmer.warm_shard(SHARD)
    assert (report.blocks, report.entries) == (3, 3000)
    assert world.cached_segments(4) == ()
    assert world.cached_segments(6) == (segment,)
    assert warmer.warm_shard(SHARD) == WarmReport(SHARD)


def test_sweep_that_found_many_users_busy_is_made_again(world: World, watched: Watched) -> None:
    world.add_users(2 * BLOCK_USERS)
    users = users_of_block(0)
    held = world.client.acquire(SHARD, users[:512])  # somebody's loads, about to be given up
    assert watched.warmer().warm_shard(SHARD).entries == 512
    world.client.release(SHARD, held, users[:512])
    assert watched.warmer().warm_shard(SHARD).entries == 512
    assert is_warm(world, users)


def test_what_reads_filled_is_left_alone(world: World, watched: Watched) -> None:
    world.add_users(20)
    world.fill(4)
    value = world.raw.get(keys.user(SHARD, 4))
    assert watched.warmer().warm_shard(SHARD).entries == 9
    assert world.raw.get(keys.user(SHARD, 4)) == value


# -- order ----------------------------------------------------------------------------------------------------------


def test_most_read_blocks_first_then_the_newest(world: World, watched: Watched) -> None:
    world.add_users(2 * 5 * BLOCK_USERS)
    watched.notes.add_reads(SHARD, {1: 5, 3: 50, 77: 1000})
    watched.notes.add_reads(SHARD, {1: 7})
    watched.warmer().warm_shard(SHARD)
    assert watched.filled == [3, 1, 4, 2, 0]


def test_old_reads_fade(world: World, watched: Watched) -> None:
    watched.notes.add_reads(SHARD, {1: 100, 2: 3})
    for _ in range(3):
        watched.notes.fade(SHARD)
    assert watched.notes.hottest(SHARD) == [1]
    assert 0 < world.raw.ttl(keys.hot(SHARD)) <= 3600
    watched.notes.add_reads(SHARD, {2: 20})
    assert watched.notes.hottest(SHARD) == [2, 1]


def test_only_the_most_read_blocks_are_reported(world: World, watched: Watched) -> None:
    watched.notes.add_reads(SHARD, {block: block + 1 for block in range(5000)})
    hottest = watched.notes.hottest(SHARD)
    assert (len(hottest), hottest[0], hottest[-1]) == (4096, 4999, 904)
    watched.notes.add_reads(SHARD, {})


# -- when it rests --------------------------------------------------------------------------------------------------


def test_warm_shard_costs_nothing(world: World, watched: Watched) -> None:
    world.add_users(2 * 3000)
    warmer = watched.warmer()
    assert warmer.warm_shard(SHARD).entries == 3000
    commands = world.raw.info("stats")["total_commands_processed"]
    for _ in range(10):
        assert warmer.warm_shard(SHARD) == WarmReport(SHARD)
    assert world.raw.info("stats")["total_commands_processed"] - commands <= 11, "one look each, and this one"


def test_another_process_knows_that_a_shard_is_warm(world: World, watched: Watched) -> None:
    world.add_users(20)
    watched.warmer().warm_shard(SHARD)
    assert watched.warmer().warm_shard(SHARD).blocks == 0


def test_empty_shard_needs_nothing(world: World, watched: Watched) -> None:
    assert watched.warmer().warm_shard(SHARD) == WarmReport(SHARD)
    assert not world.raw.exists(keys.generation(SHARD))


def test_new_users_are_warmed_before_anybody_reads_them(world: World, watched: Watched) -> None:
    world.add_users(2 * 1500)
    warmer = watched.warmer()
    warmer.warm_shard(SHARD)
    watched.filled.clear()
    directory = bytearray(
        bytes(world.installation.execute(0, "SELECT user_ids FROM directory WHERE block = 1")[0][0])  # type: ignore[call-overload]
    )
    directory[8 * 476 : 8 * 477] = (90_000).to_bytes(8, "little")
    world.installation.execute(0, "UPDATE directory SET user_ids = :ids WHERE block = 1", ids=bytes(directory))
    world.installation.execute(0, "INSERT INTO users (id, slot, attributes, version) VALUES (90000, 1500, '{}', 0)")
    world.installation.execute(0, "UPDATE shard_state SET next_slot = 1501")
    report = warmer.warm_shard(SHARD)
    assert (report.entries, watched.filled) == (1, [1])
    assert is_warm(world, [90_000])
    assert warmer.warm_shard(SHARD).blocks == 0


@pytest.mark.parametrize("read_since", [False, True])
def test_dropped_generation_means_everything_again(world: World, watched: Watched, read_since: bool) -> None:
    users = world.add_users(2 * 1500)
    warmer = watched.warmer()
    warmer.warm_shard(SHARD)
    world.client.drop_generations([SHARD])
    if read_since:
        world.fill(4)  # under a new generation
    assert warmer.warm_shard(SHARD).entries == 1500 - read_since
    assert is_warm(world, [user for user in users if user % 2 == 0])


def test_flushed_cache_means_everything_again(world: World, watched: Watched) -> None:
    world.add_users(2 * 1500)
    warmer = watched.warmer()
    warmer.warm_shard(SHARD)
    world.raw.flushall()
    assert warmer.warm_shard(SHARD).entries == 1500


def test_lost_entries_come_back_within_a_minute(world: World, watched: Watched) -> None:
    world.add_users(2 * 3000)
    warmer = watched.warmer()
    warmer.warm_shard(SHARD)
    watched.filled.clear()
    watched.asked = 0
    world.client.unblock(SHARD, [4, 8])
    watched.now_s += 59
    assert warmer.warm_shard(SHARD).blocks == 0
    watched.now_s += 1
    report = warmer.warm_shard(SHARD)
    assert (report.blocks, report.entries, watched.filled) == (3, 2, [0]), "only what is missing is read"
    assert watched.asked == BLOCK_USERS, "blocks that have all their keys are not even asked for"
    assert is_warm(world, [4, 8])
    watched.now_s += 30
    assert warmer.warm_shard(SHARD).blocks == 0


def test_looking_over_a_large_shard_takes_a_small_part_of_the_time(
    world: World, watched: Watched, monkeypatch: pytest.MonkeyPatch
) -> None:
    world.add_users(20)
    monkeypatch.setattr(segsvc.services.warming, "SWEEP_SHARE", 1e-9)
    warmer = watched.warmer()
    warmer.warm_shard(SHARD)
    world.raw.delete(keys.user(SHARD, 4))
    watched.now_s += 120
    assert warmer.warm_shard(SHARD).blocks == 0


def test_two_warmers_do_not_do_the_same(world: World, watched: Watched) -> None:
    world.add_users(20)
    with world.memberships.warm_session(SHARD):
        assert watched.warmer().warm_shard(SHARD) == WarmReport(SHARD)
    assert watched.warmer().warm_shard(SHARD).entries == 10


# -- memory ---------------------------------------------------------------------------------------------------------


def test_budget_of_nothing_warms_nothing(world: World, watched: Watched) -> None:
    world.add_users(20)
    assert watched.warmer(budget_bytes=0).warm_shard(SHARD) == WarmReport(SHARD)


@pytest.fixture
def full(world: World, watched: Watched) -> tuple[Watched, Warmer]:
    """Five blocks, of which two found room: the most read ones."""
    world.add_users(2 * 5 * BLOCK_USERS)
    watched.notes.add_reads(SHARD, {1: 100, 2: 50})
    room = watched.notes.memory().used_bytes + 1

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
    """They take no more memory than their forerunners; otherwise a full cache would be cold after each change."""
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
    used = watched.notes.memory().used_bytes
    own_world.raw.config_set("maxmemory", int(used / 0.95))
    report = watched.warmer().warm_shard(SHARD)
    assert (report.entries, report.stopped_by_budget) == (0, True)
    own_world.raw.config_set("maxmemory", 0)
    assert watched.notes.memory().max_bytes is None


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
