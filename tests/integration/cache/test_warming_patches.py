"""The warmer beside bulk changes: a rollout makes no work for it at once, and no entry grows too old."""

from __future__ import annotations

import pytest

from tests.installation import KEYS
from tests.integration.cache.conftest import World
from tests.integration.cache.watched import SHARD, Watched, is_warm

USERS = list(range(2, 2 * 1500 + 1, 2))
BEHIND = 4
"""Half as many bulk changes as an entry may be behind."""


@pytest.fixture
def segment(world: World) -> int:
    world.add_users(2 * len(USERS))
    return world.add_segment("beta", [2])


def epoch_of(world: World, user: int) -> int:
    (entry,) = world.cached(user)
    assert entry is not None
    return entry[3]


def test_a_rollout_makes_no_work(world: World, watched: Watched, segment: int) -> None:
    warmer = watched.warmer(patches_max=2 * BEHIND)
    assert warmer.warm_shard(SHARD).entries == len(USERS)
    for _ in range(BEHIND - 1):
        world.publish(world.bulk_change(segment, [4]))
        watched.asked = 0
        assert (warmer.warm_shard(SHARD).entries, watched.asked) == (0, 0)
    assert is_warm(world, USERS)
    assert epoch_of(world, 2) == 0


def test_entries_are_renewed_before_they_are_older_than_the_list(world: World, watched: Watched, segment: int) -> None:
    warmer = watched.warmer(patches_max=2 * BEHIND)
    warmer.warm_shard(SHARD)
    for epoch in range(1, 3 * BEHIND + 1):
        world.publish(world.bulk_change(segment, [4]))
        # The run that finds them half the list behind writes all of them, except those that a read has renewed.
        if epoch == BEHIND:
            world.fill_again(2, 4, 6)
            assert warmer.warm_shard(SHARD).entries == len(USERS) - 3
        elif epoch % BEHIND:
            assert warmer.warm_shard(SHARD).entries == 0
        else:
            assert warmer.warm_shard(SHARD).entries == len(USERS)
        assert is_warm(world, USERS)
        assert epoch_of(world, 8) == epoch // BEHIND * BEHIND


def test_a_sweep_for_what_was_lost_leaves_older_entries_alone(world: World, watched: Watched, segment: int) -> None:
    warmer = watched.warmer(patches_max=2 * BEHIND)
    warmer.warm_shard(SHARD)
    world.publish(world.bulk_change(segment, [4]))
    world.raw.delete(KEYS.user(SHARD, 8))
    watched.now_s += 61
    assert warmer.warm_shard(SHARD).entries == 1
    assert (epoch_of(world, 6), epoch_of(world, 8)) == (0, 1)


def test_users_who_changed_are_renewed_first(world: World, watched: Watched, segment: int) -> None:
    warmer = watched.warmer(patches_max=2 * BEHIND)
    warmer.warm_shard(SHARD)
    world.publish(world.bulk_change(segment, [4, 8], changed=[8, 10]))
    world.publish(world.bulk_change(segment, [4, 8, 12], changed=[12]))
    assert [user for user in USERS if not is_warm(world, [user])] == [8, 10, 12]
    assert warmer.warm_shard(SHARD).entries == 3
    assert sorted(watched.renewed) == [8, 10, 12]
    assert (world.cached_segments(8), world.cached_segments(10)) == ((segment,), ())
    assert warmer.warm_shard(SHARD).entries == 0, "once"


def test_a_user_who_is_gone_leaves_no_lease(world: World, watched: Watched, segment: int) -> None:
    warmer = watched.warmer(patches_max=2 * BEHIND)
    warmer.warm_shard(SHARD)
    world.publish(world.bulk_change(segment, [4], changed=[8]))
    world.client.drop_entries(SHARD, [8])

    ask = watched.after_ask

    def delete() -> None:
        watched.after_ask = ask
        world.installation.execute(SHARD, "DELETE FROM users WHERE id = 8")

    watched.after_ask = delete
    assert warmer.warm_shard(SHARD).entries == 0
    assert not world.raw.exists(KEYS.user(SHARD, 8))


def test_a_generation_that_is_dropped_meanwhile_ends_the_run(world: World, watched: Watched, segment: int) -> None:
    warmer = watched.warmer(patches_max=2 * BEHIND)
    warmer.warm_shard(SHARD)
    world.publish(world.bulk_change(segment, [4], changed=[8]))
    ask = watched.after_ask

    def drop() -> None:
        watched.after_ask = ask
        world.client.drop_generations([SHARD])

    watched.after_ask = drop
    assert warmer.warm_shard(SHARD).entries == 0
    assert not world.raw.exists(KEYS.user(SHARD, 8)), "the lease is given back"
    assert warmer.warm_shard(SHARD).entries == len(USERS)
    assert is_warm(world, USERS)
