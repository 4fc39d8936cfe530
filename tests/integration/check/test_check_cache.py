"""The checker against the cache: stale entries are named, changes in progress are not."""

from __future__ import annotations

import threading
from typing import Any

import numpy as np

from segsvc.bootstrap import Check
from segsvc.cache.client import CacheClient
from segsvc.config import Settings
from segsvc.domain.bits import pack
from segsvc.domain.membership import Entry
from segsvc.domain.patch import Patch
from segsvc.domain.sharding import BLOCK_SLOTS
from segsvc.services.check.check import Checker
from segsvc.twophase.ports import Published
from tests.integration.check.checking import SETTLE_S, run, texts
from tests.integration.check.world import World


def test_a_stale_entry_is_named(world: World, cache: CacheClient, service: Check, check_settings: Settings) -> None:
    world.fill(cache)
    right = world.listed(42)
    wrong = tuple(segment for segment in right if segment != 8)
    cache.drop_entries(0, [42])
    world.fill_users(cache, {42: wrong})

    report = run(service, check_settings)
    assert texts(report) == [
        f"shard 0, cache entry of user 42: it lists segments {list(wrong)}, the shard says {list(right)}"
    ]
    assert report.entries == 2997


def test_an_entry_in_the_wrong_order_is_named(
    world: World, cache: CacheClient, service: Check, check_settings: Settings
) -> None:
    right = next(listed for user in range(100, 200) if len(listed := world.listed(user)) > 1)
    user = next(user for user in range(100, 200) if world.listed(user) == right)
    world.fill_users(cache, {user: right[::-1]})
    [text] = texts(run(service, check_settings))
    assert text.endswith(f"it lists segments {list(right[::-1])}, the shard says {list(right)}")


def test_an_entry_under_a_patch_is_in_the_right_order(
    world: World, cache: CacheClient, service: Check, check_settings: Settings
) -> None:
    """A patch puts its segment among the segments of an older entry: by the slugs, as a shard does, not by the ids."""
    user = next(user for user in range(100, 300, 2) if (listed := world.listed(user)) and listed[-1] != max(listed))
    right = world.listed(user)
    late = max(right)  # its id is the last one, and its slug is not
    world.fill_users(cache, {user: tuple(segment for segment in right if segment != late)})
    world.on_shard(0, "INSERT INTO shard_epoch (epoch) VALUES (1)")
    members = pack(np.ones((1, BLOCK_SLOTS), dtype=np.bool_))
    patch = Patch(1, late, BLOCK_SLOTS, members, np.zeros(0, dtype=np.uint32))
    assert cache.append_patch(0, patch, cache.write_patch(0, patch)) is Published.APPENDED
    report = run(service, check_settings)
    assert (texts(report), report.entries) == ([], 1)


def test_an_entry_of_a_deleted_user_is_named(
    world: World, cache: CacheClient, service: Check, check_settings: Settings
) -> None:
    world.fill_users(cache, {10: (8,)})
    assert texts(run(service, check_settings)) == [
        "shard 0, cache entry of user 10: it lists segments [8], the shard says there is no such user"
    ]


def test_an_entry_that_is_no_hit_does_not_count(
    world: World, cache: CacheClient, service: Check, check_settings: Settings
) -> None:
    world.fill_users(cache, {42: (7, 8, 9)})
    cache.drop_generations([0])
    report = run(service, check_settings)
    assert (texts(report), report.entries) == ([], 0)


def test_a_change_between_commit_and_acknowledgement_is_waited_for(
    world: World, cache: CacheClient, service: Check, check_settings: Settings
) -> None:
    world.fill_users(cache, {42: (9,)})
    looked = threading.Event()

    class Reader:
        def lookup(self, user_ids: Any) -> list[Entry | None]:
            found = service.reader.lookup(user_ids)
            if 42 in user_ids:
                looked.set()
            return found

    def acknowledge() -> None:
        looked.wait(10)
        cache.drop_entries(0, [42])

    thread = threading.Thread(target=acknowledge)
    thread.start()

    checker = Checker(service.reads, Reader(), cluster="check", shard_count=2, fence_ttl_s=3600, settle_s=30)
    report = checker.run()
    thread.join()

    assert texts(report) == []
    assert report.duration_s < 20


def test_an_entry_newer_than_the_snapshot_is_no_difference(
    world: World, cache: CacheClient, service: Check, check_settings: Settings
) -> None:
    class Reader:
        """Changes user 42 after the shard's snapshot, before the checker reads the user's entry."""

        changed = False

        def lookup(self, user_ids: Any) -> list[Entry | None]:
            if 42 in user_ids and not self.changed:
                self.changed = True
                world.overrides.append((42, 9, 1, None))
                world.on_shard(0, "INSERT INTO overrides (user_id, segment_id, effect) VALUES (42, 9, 1)")
                world.fill_users(cache, {42: world.listed(42)})
            return service.reader.lookup(user_ids)

    reader = Reader()
    checker = Checker(service.reads, reader, cluster="check", shard_count=2, fence_ttl_s=3600, settle_s=SETTLE_S)
    assert texts(checker.run()) == []
    assert reader.changed
