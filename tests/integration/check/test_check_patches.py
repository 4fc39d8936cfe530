"""The checker against patches: it reads the cache as a reader does, and names the patch or the epoch that is wrong."""

from __future__ import annotations

from dataclasses import replace

import numpy as np
import pytest
import redis

from segsvc.bootstrap import Check
from segsvc.cache.client import CacheClient
from segsvc.config import Settings
from segsvc.domain import bits
from segsvc.domain.patch import Patch
from segsvc.domain.sharding import BLOCK_SLOTS
from tests.integration.check.checking import run, texts
from tests.integration.check.world import World

SHARD = 0
CHECKOUT = 7
EPOCH = 2
"""In which segment 7 was rolled out; the entries are of the epoch before."""
CHANGED = (100, 102)
"""Users who changed in the epoch before."""


class Rollout:
    """Segment 7 has just been rolled out on shard 0, over a cache that holds the lists of before."""

    def __init__(self, world: World, cache: CacheClient) -> None:
        self.world = world
        self.cache = cache
        self.slots = world.slots(SHARD)
        self.lists = {user: world.listed(user) for user in self.slots}
        self.member = next(user for user in self.slots if CHECKOUT in self.lists[user])

        done = sorted(world.fences[SHARD])
        for epoch in (1, EPOCH):
            world.on_shard(
                SHARD,
                "UPDATE applied_operations SET epoch = :epoch WHERE operation_id = :id",
                epoch=epoch,
                id=done[epoch],
            )
        world.on_shard(SHARD, "INSERT INTO shard_epoch (epoch) VALUES (:epoch)", epoch=EPOCH)
        noted = b"".join(self.slots[user].to_bytes(4, "big") for user in CHANGED)
        world.on_shard(SHARD, "INSERT INTO changed_slots (epoch, xid, slots) VALUES (1, 7, :slots)", slots=noted)

        world.fill_users(cache, {user: self.before(user) for user in self.slots if user not in CHANGED}, epoch=1)
        members = [slot for user, slot in self.slots.items() if CHECKOUT in self.lists[user]]
        next_slot = len(world.users[SHARD])
        self.patch = Patch(
            epoch=EPOCH,
            segment_id=CHECKOUT,
            slots=next_slot,
            members=bits.at_slots(np.array(members, dtype=np.int64), 0, -(-next_slot // BLOCK_SLOTS)),
            changed=np.array(sorted(self.slots[user] for user in CHANGED), dtype=np.uint32),
        )

    def before(self, user: int) -> tuple[int, ...]:
        return tuple(segment for segment in self.lists[user] if segment != CHECKOUT)

    def publish(self, patch: Patch | None = None) -> None:
        patch = patch or self.patch
        self.cache.append_patch(SHARD, patch, self.cache.write_patch(SHARD, patch))


@pytest.fixture
def rollout(world: World, cache: CacheClient) -> Rollout:
    return Rollout(world, cache)


def test_what_a_reader_makes_of_entries_and_patches_is_compared(
    rollout: Rollout, service: Check, check_settings: Settings
) -> None:
    rollout.publish()
    report = run(service, check_settings)
    assert (texts(report), report.entries) == ([], len(rollout.slots) - len(CHANGED))


def test_entries_without_their_patch_are_named(rollout: Rollout, service: Check, check_settings: Settings) -> None:
    report = run(service, check_settings)
    assert report.total > 100
    assert all("it lists segments" in text for text in texts(report))


def test_a_wrong_patch_bit_is_named(rollout: Rollout, service: Check, check_settings: Settings) -> None:
    slot = rollout.slots[rollout.member]
    members = rollout.patch.members.copy()
    members[slot // 1024, slot % 1024 // 8] ^= 1 << slot % 8
    rollout.publish(replace(rollout.patch, members=members))
    assert texts(run(service, check_settings)) == [
        f"shard 0, patch of epoch 2, segment 7, user {rollout.member} (slot {slot}): bit is 0, the shard says 1"
    ]


def test_a_user_whose_change_a_patch_does_not_name(rollout: Rollout, service: Check, check_settings: Settings) -> None:
    rollout.publish(replace(rollout.patch, changed=rollout.patch.changed[1:]))
    slot = rollout.patch.changed[0]
    assert texts(run(service, check_settings)) == [
        f"shard 0, patch of epoch 2, slot {slot}: it does not say that the user changed, the shard has noted a change"
    ]


def test_a_user_who_did_not_change(rollout: Rollout, service: Check, check_settings: Settings) -> None:
    slot = rollout.slots[rollout.member]
    changed = np.union1d(rollout.patch.changed, [slot]).astype(np.uint32)
    rollout.publish(replace(rollout.patch, changed=changed))
    assert texts(run(service, check_settings)) == [
        f"shard 0, patch of epoch 2, slot {slot}: it says that the user changed, the shard has noted no change"
    ]


def test_a_change_after_the_operation_may_be_in_its_patch_or_not(
    rollout: Rollout, service: Check, check_settings: Settings
) -> None:
    slot = rollout.slots[rollout.member]
    rollout.world.on_shard(
        SHARD, "INSERT INTO changed_slots (epoch, xid, slots) VALUES (2, 8, :slots)", slots=slot.to_bytes(4, "big")
    )
    rollout.publish()
    assert texts(run(service, check_settings)) == []


def test_an_entry_that_says_to_be_newer_than_the_patch(
    rollout: Rollout, service: Check, check_settings: Settings
) -> None:
    user = rollout.member
    rollout.cache.drop_entries(SHARD, [user])
    rollout.world.fill_users(rollout.cache, {user: rollout.before(user)}, epoch=EPOCH)
    rollout.publish()
    [text] = texts(run(service, check_settings))
    assert text.startswith(f"shard 0, cache entry of user {user}: its epoch is 2, so the patch of epoch 2 is not laid")


def test_an_epoch_that_the_shard_has_not_reached(rollout: Rollout, service: Check, check_settings: Settings) -> None:
    user = rollout.member
    rollout.cache.drop_entries(SHARD, [user])
    rollout.world.fill_users(rollout.cache, {user: rollout.lists[user]}, epoch=99)
    rollout.publish()
    assert texts(run(service, check_settings)) == [
        f"shard 0, cache entry of user {user}: its epoch is 99, the shard is in epoch 2"
    ]


def test_a_generation_from_the_future(rollout: Rollout, service: Check, check_settings: Settings) -> None:
    rollout.publish()
    rollout.publish(replace(rollout.patch, epoch=3))
    assert texts(run(service, check_settings)) == [
        "shard 0, cache generation: its newest patch is of epoch 3, the shard is in epoch 2"
    ]


def test_a_wrong_slot_is_named(rollout: Rollout, service: Check, check_settings: Settings) -> None:
    rollout.publish()
    user, slot = rollout.member, rollout.slots[rollout.member]
    grant = rollout.cache.acquire(SHARD, [user])
    right = (2**63 - 1, 0, 1, EPOCH, slot + 1, *rollout.lists[user])
    assert rollout.cache.fill(SHARD, grant, [(user, right)]) == 1
    assert texts(run(service, check_settings)) == [
        f"shard 0, cache entry of user {user}: its slot is {slot + 1}, the shard says {slot}"
    ]


def test_lost_chunks_are_no_difference(
    rollout: Rollout, cache: CacheClient, service: Check, check_settings: Settings
) -> None:
    rollout.publish()
    with redis.Redis.from_url(check_settings.cache_url) as raw:
        raw.delete(*raw.keys(b"*:c:*"))
    report = run(service, check_settings)
    assert (texts(report), report.entries) == ([], 0)
