"""The checker names each single fault exactly, and finds nothing in a sound installation."""

from __future__ import annotations

from collections.abc import Callable

import pytest

from segsvc.bootstrap import Check
from segsvc.cache.client import CacheClient
from segsvc.config import Settings
from segsvc.domain.bucketing import bucket
from tests.integration.check.checking import ABSENT, flip, run, texts
from tests.integration.check.world import World, age


def test_a_sound_installation_has_no_difference(
    world: World, cache: CacheClient, service: Check, check_settings: Settings
) -> None:
    world.fill(cache)
    seen: list[tuple[int, int, int]] = []
    report = service.checker.run(lambda *step: seen.append(step))

    assert texts(report) == []
    assert report.total == 0
    assert report.users == 2997
    assert report.segments == 7
    assert report.entries == 2997
    assert report.memberships == sum(
        world.by_rule(segment, shard, user, slot)
        for shard in range(2)
        for user, slot in world.slots(shard).items()
        for segment in world.segments
    )
    assert seen == [(0, 0, 2), (0, 2, 2), (1, 0, 2), (1, 2, 2)]


def a_bit(world: World) -> list[str]:
    flip(world, 0, 7, 2998)
    member = int(world.by_rule(world.segments[0], 0, 2998, 1498))
    counted = sum(world.by_rule(world.segments[0], 0, user, slot) for user, slot in world.slots(0).items())
    return [
        f"shard 0, segment checkout (7), user 2998 (block 1, bit 474): bit is {1 - member}, the rule says {member}",
        f"shard 0, segment checkout (7): rule_count is {counted}, {counted + 1 - 2 * member} bits are set",
    ]


def a_bit_of_an_empty_slot(world: World) -> list[str]:
    world.on_shard(0, "UPDATE memberships SET bits = set_bit(bits, 4, 1) WHERE block = 0 AND segment_id = 8")
    world.on_shard(0, "UPDATE segments SET rule_count = rule_count + 1 WHERE id = 8")
    return ["shard 0, segment beta (8), block 0, bit 4: bit is 1, the slot has no user"]


def a_bit_after_the_frozen_roll_out(world: World) -> list[str]:
    world.on_shard(0, "UPDATE memberships SET bits = set_bit(bits, 300, 1) WHERE block = 1 AND segment_id = 11")
    world.on_shard(0, "UPDATE segments SET rule_count = rule_count + 1 WHERE id = 11")
    return [
        (
            "shard 0, segment frozen (11), user 2650 (block 1, bit 300): "
            "bit is 1, slot 1324 came after the frozen roll-out, which saw slots to 1200"
        )
    ]


def _flipped(world: World, slug: str, user: int) -> list[str]:
    """Flip a bit on shard 0. Returns the expected differences."""
    segment = next(segment for segment in world.segments if segment.slug == slug)
    slot = world.slots(0)[user]
    member = int(world.by_rule(segment, 0, user, slot))

    flip(world, 0, segment.id, user)
    counted = sum(world.by_rule(segment, 0, each, at) for each, at in world.slots(0).items())

    where = f"shard 0, segment {slug} ({segment.id})"
    return [
        (
            f"{where}, user {user} (block {slot // 1024}, bit {slot % 1024}): "
            f"bit is {1 - member}, the rule says {member}"
        ),
        f"{where}: rule_count is {counted}, {counted + 1 - 2 * member} bits are set",
    ]


def _first(world: World, slug: str, *, member: bool, grown_up: bool) -> int:
    segment = next(segment for segment in world.segments if segment.slug == slug)
    return next(
        user
        for user, slot in world.slots(0).items()
        if world.by_rule(segment, 0, user, slot) == member and (age(user) >= 18) == grown_up
    )


def a_member_lost_under_a_condition(world: World) -> list[str]:
    return _flipped(world, "adults", _first(world, "adults", member=True, grown_up=True))


def a_member_for_whom_the_condition_does_not_hold(world: World) -> list[str]:
    segment = next(segment for segment in world.segments if segment.slug == "adults")
    child = next(user for user in world.slots(0) if age(user) < 18 and bucket(user, segment.salt) < 60_000)
    return _flipped(world, "adults", child)


def a_member_lost_from_a_frozen_roll_out(world: World) -> list[str]:
    return _flipped(world, "frozen", _first(world, "frozen", member=True, grown_up=False))


def a_member_of_a_frozen_roll_out_whose_bucket_is_outside(world: World) -> list[str]:
    return _flipped(world, "kept", _first(world, "kept", member=False, grown_up=True))


def a_bit_of_a_segment_without_a_rule(world: World) -> list[str]:
    world.on_shard(1, "INSERT INTO memberships VALUES (0, 10, set_bit(decode(repeat('00', 128), 'hex'), 3, 1))")
    return [
        "shard 1, segment unrolled (10), user 7 (block 0, bit 3): bit is 1, the segment was never rolled out",
        "shard 1, segment unrolled (10): rule_count is 0, 1 bits are set",
    ]


def a_row_of_zeros(world: World) -> list[str]:
    world.on_shard(1, "INSERT INTO memberships VALUES (0, 9, decode(repeat('00', 128), 'hex'))")
    return ["shard 1, memberships of segment 9, block 0: the row has no bit set, such a row is not kept"]


def bits_of_an_unknown_segment(world: World) -> list[str]:
    world.on_shard(1, "INSERT INTO memberships VALUES (0, 999, decode(repeat('ff', 128), 'hex'))")
    return ["shard 1, memberships of segment 999, block 0: the row is there, the shard has no such segment"]


def bits_beyond_the_last_block(world: World) -> list[str]:
    world.on_shard(1, "INSERT INTO memberships VALUES (2, 8, decode(repeat('ff', 128), 'hex'))")
    return ["shard 1, memberships of segment 8, block 2: block 2 is stored, there are 2 blocks"]


def a_short_row_of_bits(world: World) -> list[str]:
    world.on_shard(1, "INSERT INTO memberships VALUES (0, 9, '\\x00')")
    return ["shard 1, memberships of segment 9, block 0: the row has 1 bytes, it must have 128"]


def an_id_of_the_directory(world: World) -> list[str]:
    world.on_shard(
        0,
        "UPDATE directory SET user_ids = overlay(user_ids PLACING decode('0500000000000000', 'hex') FROM 8*100+1) "
        "WHERE block = 1",
    )
    return ["shard 0, directory, block 1, slot 100: it names user 5, the users' rows say user 2250"]


def a_deleted_user_in_the_directory(world: World) -> list[str]:
    world.on_shard(
        0,
        "UPDATE directory SET user_ids = overlay(user_ids PLACING decode('0a00000000000000', 'hex') FROM 8*4+1) "
        "WHERE block = 0",
    )
    return ["shard 0, directory, block 0, slot 4: it names user 10, the users' rows say no user"]


def a_short_directory_row(world: World) -> list[str]:
    world.on_shard(0, "INSERT INTO directory VALUES (2, '\\x00')")
    return ["shard 0, directory, block 2: the row has 1 bytes, it must have 8192"]


def the_counter_of_a_segment(world: World) -> list[str]:
    world.on_shard(1, "UPDATE segments SET rule_count = rule_count + 1 WHERE id = 8")
    return ["shard 1, segment beta (8): rule_count is 1500, 1499 bits are set"]


def the_counter_of_the_users(world: World) -> list[str]:
    world.on_shard(1, "UPDATE shard_state SET user_count = user_count - 1")
    return ["shard 1, shard_state: user_count is 1498, there are 1499 users"]


def a_slot_never_given_out(world: World) -> list[str]:
    world.on_shard(0, "INSERT INTO users (id, slot, attributes, version) VALUES (4000, 5000, '{}', 0)")
    world.on_shard(0, "UPDATE shard_state SET user_count = user_count + 1")
    return ["shard 0, user 4000: slot is 5000, slots given out are 0 to 1499"]


def a_tombstone_of_a_living_user(world: World) -> list[str]:
    world.on_shard(0, "INSERT INTO deleted_users (id, version) VALUES (42, 0)")
    return ["shard 0, user 42: is deleted and exists, a deleted user is nowhere else"]


def an_override_of_a_deleted_user(world: World) -> list[str]:
    world.on_shard(0, "INSERT INTO overrides (user_id, segment_id, effect) VALUES (10, 8, 1)")
    return ["shard 0, override of user 10 for segment 8: the user or the segment does not exist, it goes with them"]


def a_user_on_the_wrong_shard(world: World) -> list[str]:
    # The user is in the slot of a deleted user, with the bits by the rules: only the shard is wrong.
    world.on_shard(0, "INSERT INTO users (id, slot, attributes, version) VALUES (5001, 4, '{}', 0)")
    world.on_shard(0, "UPDATE shard_state SET user_count = user_count + 1")
    world.on_shard(
        0,
        "UPDATE directory SET user_ids = overlay(user_ids PLACING decode('8913000000000000', 'hex') FROM 8*4+1) "
        "WHERE block = 0",
    )
    world.on_shard(0, f"""UPDATE users SET attributes = '{{"age": {age(5001)}}}' WHERE id = 5001""")

    for segment in world.segments:
        if world.by_rule(segment, 0, 5001, 4):
            world.on_shard(
                0,
                "UPDATE memberships SET bits = set_bit(bits, 4, 1) WHERE block = 0 AND segment_id = :id",
                id=segment.id,
            )
            world.on_shard(0, "UPDATE segments SET rule_count = rule_count + 1 WHERE id = :id", id=segment.id)

    return ["shard 0, user 5001: is here, the shard is 5001 mod 2 = 1"]


def a_tombstone_on_the_wrong_shard(world: World) -> list[str]:
    world.on_shard(0, "INSERT INTO deleted_users (id, version) VALUES (5001, 0)")
    return ["shard 0, deleted user 5001: is here, the shard is 5001 mod 2 = 1"]


def a_missing_fence(world: World) -> list[str]:
    done = next(item for item in world.operations if item["state"] == "DONE" and item["slug"] == "beta")
    world.on_shard(1, "DELETE FROM applied_operations WHERE operation_id = :id", id=done["id"])
    return [f"shard 1, operation {done['id']} (CREATE beta, DONE): its fence is missing, every shard has it once done"]


def a_fence_of_an_aborted_operation(world: World) -> list[str]:
    aborted = next(item for item in world.operations if item["state"] == "ABORTED")
    world.on_shard(0, "INSERT INTO applied_operations (operation_id, kind) VALUES (:id, 2)", id=aborted["id"])
    return [
        (
            f"shard 0, operation {aborted['id']} (DELETE checkout, ABORTED): "
            "its fence is there, only a committed operation has one"
        )
    ]


def a_fence_of_nothing(world: World) -> list[str]:
    world.on_shard(0, "INSERT INTO applied_operations (operation_id, kind) VALUES (:id, 2)", id=ABSENT)
    return [f"shard 0, operation {ABSENT}: its fence is there, the ledger does not know it"]


def an_epoch_behind_its_fences(world: World) -> list[str]:
    done = next(item for item in world.operations if item["state"] == "DONE" and item["slug"] == "beta")
    world.on_shard(1, "UPDATE applied_operations SET epoch = 4 WHERE operation_id = :id", id=done["id"])
    world.on_shard(1, "INSERT INTO shard_epoch (epoch) VALUES (3)")
    return ["shard 1, epoch: is 3, the newest fence has begun 4"]


def an_epoch_that_is_lost(world: World) -> list[str]:
    done = next(item for item in world.operations if item["state"] == "DONE" and item["slug"] == "beta")
    world.on_shard(0, "UPDATE applied_operations SET epoch = 1 WHERE operation_id = :id", id=done["id"])
    return ["shard 0, epoch: is 0, the newest fence has begun 1"]


def a_segment_missing_on_a_shard(world: World) -> list[str]:
    world.on_shard(1, "DELETE FROM overrides WHERE segment_id = 9")
    world.on_shard(1, "DELETE FROM segments WHERE id = 9")
    return ["shard 1, segment alpha (9): is not there, the catalog has it"]


def a_segment_missing_in_the_catalog(world: World) -> list[str]:
    world.on_catalog("DELETE FROM segments WHERE id = 9")
    return [f"shard {shard}, segment alpha (9): is there, the catalog does not have it" for shard in range(2)]


def another_rule_on_a_shard(world: World) -> list[str]:
    world.on_catalog("UPDATE segments SET rule_threshold = 12500 WHERE id = 9")
    return [f"shard {shard}, segment alpha (9): rule is 0 %, LIVE, the catalog has 12.5 %, LIVE" for shard in range(2)]


def another_slug_on_a_shard(world: World) -> list[str]:
    world.on_shard(1, "UPDATE segments SET slug = 'alphabet' WHERE id = 9")
    return ["shard 1, segment alphabet (9): slug is alphabet, salt 5, the catalog has slug alpha, salt 5"]


def a_slug_reserved_by_nobody(world: World) -> list[str]:
    world.on_catalog("UPDATE segments SET state = 0 WHERE id = 10")
    world.on_shard(0, "DELETE FROM segments WHERE id = 10")
    world.on_shard(0, "DELETE FROM overrides WHERE segment_id = 10")
    world.on_shard(1, "DELETE FROM segments WHERE id = 10")
    return ["catalog, segment unrolled (10): is reserved, no creation of it is in flight"]


def a_deletion_by_nobody(world: World) -> list[str]:
    world.on_catalog("UPDATE segments SET state = 2 WHERE id = 9")
    return ["catalog, segment alpha (9): is being deleted, no deletion of it is in flight"]


FAULTS: list[Callable[[World], list[str]]] = [
    a_member_lost_under_a_condition, a_member_for_whom_the_condition_does_not_hold,
    a_member_lost_from_a_frozen_roll_out, a_member_of_a_frozen_roll_out_whose_bucket_is_outside, a_bit,
    a_bit_of_an_empty_slot, a_bit_after_the_frozen_roll_out, a_bit_of_a_segment_without_a_rule, a_row_of_zeros,
    bits_of_an_unknown_segment, bits_beyond_the_last_block, a_short_row_of_bits, an_id_of_the_directory,
    a_deleted_user_in_the_directory, a_short_directory_row, the_counter_of_a_segment, the_counter_of_the_users,
    a_slot_never_given_out, a_tombstone_of_a_living_user, an_override_of_a_deleted_user,
    a_user_on_the_wrong_shard, a_tombstone_on_the_wrong_shard, a_missing_fence, a_fence_of_an_aborted_operation,
    a_fence_of_nothing, an_epoch_behind_its_fences, an_epoch_that_is_lost, a_segment_missing_on_a_shard,
    a_segment_missing_in_the_catalog, another_rule_on_a_shard,
    another_slug_on_a_shard, a_slug_reserved_by_nobody, a_deletion_by_nobody,
]  # fmt: skip


@pytest.mark.parametrize("fault", FAULTS, ids=lambda fault: fault.__name__)
def test_a_fault_is_named_exactly(
    fault: Callable[[World], list[str]], world: World, service: Check, check_settings: Settings
) -> None:
    expected = fault(world)
    report = run(service, check_settings, cache=False)
    assert sorted(texts(report)) == sorted(expected)
    assert report.total == len(expected)


def test_a_million_differences_are_counted_and_a_hundred_kept(
    world: World, service: Check, check_settings: Settings
) -> None:
    world.on_shard(0, "UPDATE memberships SET bits = decode(repeat('00', 128), 'hex') WHERE segment_id = 8")
    report = run(service, check_settings, cache=False)
    assert len(report.differences) == 100
    # A difference for each bit, for two rows of zeros, and for the counter.
    assert report.total == len(world.slots(0)) + 2 + 1
