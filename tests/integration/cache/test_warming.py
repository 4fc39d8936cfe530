"""The warmer on a real cache and real shards: the entries that it fills, their order, and when it rests."""

from __future__ import annotations

from collections.abc import Sequence

import pytest

import segsvc.services.warming
from segsvc.domain.membership import FIRST_SEGMENT, ROW_VERSION, VALID_UNTIL, Grant
from segsvc.services.warming import WarmReport
from tests.installation import KEYS
from tests.integration.cache.conftest import World
from tests.integration.cache.watched import BLOCK_USERS, SHARD, Watched, is_warm, users_of_block

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


def test_unknown_users_are_not_filled(world: World, watched: Watched) -> None:
    world.add_users(20)
    world.installation.execute(0, "DELETE FROM users WHERE id = 4")

    directory = bytearray(world.installation.execute(0, "SELECT user_ids FROM directory")[0][0])  # type: ignore[call-overload]
    directory[8:16] = bytes(8)
    world.installation.execute(0, "UPDATE directory SET user_ids = :ids", ids=bytes(directory))

    assert watched.warmer().warm_shard(SHARD).entries == 9
    assert world.raw.get(KEYS.user(SHARD, 4)) is None


def test_user_deleted_while_the_block_is_warmed_leaves_no_lease(
    world: World, watched: Watched, monkeypatch: pytest.MonkeyPatch
) -> None:
    world.add_users(20)
    warmer = watched.warmer()
    acquire = watched.acquire

    def delete_then(shard: int, user_ids: Sequence[int], *, enough: int | None = None) -> Grant:
        grant = acquire(shard, user_ids, enough=enough)
        world.installation.execute(
            0, "UPDATE directory SET user_ids = overlay(user_ids placing :no from 9)", no=bytes(8)
        )
        return grant

    monkeypatch.setattr(watched, "acquire", delete_then)
    assert warmer.warm_shard(SHARD).entries == 9
    assert world.raw.get(KEYS.user(SHARD, 4)) is None


def test_user_changed_while_the_block_is_warmed_is_not_filled(world: World, watched: Watched) -> None:
    """The change takes the lease away: a value that was read before it must not become a hit."""
    world.add_users(20)
    segment = world.add_segment("beta", [4])

    def change() -> None:
        world.installation.execute(0, "DELETE FROM memberships WHERE segment_id = :id", id=segment)
        world.client.drop_entries(SHARD, [4])

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
    held = world.client.acquire(SHARD, users[:512])  # loads that are going to be given up
    assert watched.warmer().warm_shard(SHARD).entries == 512
    world.client.release(SHARD, held, users[:512])
    assert watched.warmer().warm_shard(SHARD).entries == 512
    assert is_warm(world, users)


def test_what_reads_filled_is_left_alone(world: World, watched: Watched) -> None:
    world.add_users(20)
    world.fill(4)
    value = world.raw.get(KEYS.user(SHARD, 4))
    assert watched.warmer().warm_shard(SHARD).entries == 9
    assert world.raw.get(KEYS.user(SHARD, 4)) == value


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
    assert 0 < world.raw.ttl(KEYS.hot(SHARD)) <= 3600
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
    assert not world.raw.exists(KEYS.generation(SHARD))


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
    world.client.drop_entries(SHARD, [4, 8])

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
    world.raw.delete(KEYS.user(SHARD, 4))
    watched.now_s += 120
    assert warmer.warm_shard(SHARD).blocks == 0


def test_two_warmers_do_not_do_the_same(world: World, watched: Watched) -> None:
    world.add_users(20)
    with world.memberships.warm_session(SHARD):
        assert watched.warmer().warm_shard(SHARD) == WarmReport(SHARD)
    assert watched.warmer().warm_shard(SHARD).entries == 10
