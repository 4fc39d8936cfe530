"""The checker names every single fault exactly, finds nothing in a sound installation, and is not misled by changes
in progress."""

from __future__ import annotations

import json
import os
import subprocess
import sys
import threading
from collections.abc import Callable
from dataclasses import replace
from typing import Any

import pytest
import sqlalchemy as sa

from segsvc.bootstrap import Check
from segsvc.cache.client import CacheClient
from segsvc.config import Settings
from segsvc.domain.membership import Entry
from segsvc.domain.operation import Gid, OperationKind, OperationState
from segsvc.domain.segment import Rule
from segsvc.services.check import Checker
from segsvc.services.check_report import Report
from tests.integration.check.world import World

SETTLE_S = 0.3
ABSENT = "00000000-0000-4000-8000-000000000000"


def run(service: Check, settings: Settings, *, cache: bool = True, settle_s: float = SETTLE_S) -> Report:
    """The check as ``segsvc check`` runs it, but less patient with the cache."""
    checker = Checker(
        service.reads,
        service.reader if cache else None,
        cluster=settings.cluster,
        shard_count=settings.shard_count,
        fence_ttl_s=settings.fence_ttl_s,
        settle_s=settle_s,
    )
    return checker.run()


def texts(report: Report) -> list[str]:
    return [str(difference) for difference in report.differences]


def test_a_sound_installation_has_no_difference(
    world: World, cache: CacheClient, service: Check, check_settings: Settings
) -> None:
    world.fill(cache)
    seen: list[tuple[int, int, int]] = []
    report = service.checker.run(lambda *step: seen.append(step))
    assert texts(report) == []
    assert report.total == 0
    assert report.users == 2997
    assert report.segments == 5
    assert report.entries == 2997
    assert report.memberships == sum(
        world.by_rule(segment, shard, user, slot)
        for shard in range(2)
        for user, slot in world.slots(shard).items()
        for segment in world.segments
    )
    assert seen == [(0, 0, 2), (0, 2, 2), (1, 0, 2), (1, 2, 2)]


def flip(world: World, shard: int, segment: int, user: int) -> None:
    slot = world.slots(shard)[user]
    world.on_shard(
        shard,
        "UPDATE memberships SET bits = set_bit(bits, :bit, 1 - get_bit(bits, :bit)) "
        "WHERE block = :block AND segment_id = :segment",
        bit=slot % 1024, block=slot // 1024, segment=segment,
    )  # fmt: skip


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
    return ["shard 0, directory, block 0, slot 4: it names user 10, the users' rows say nobody"]


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
    # In the slot of a deleted user, with the bits that the rules give: only the place is wrong.
    world.on_shard(0, "INSERT INTO users (id, slot, attributes, version) VALUES (5001, 4, '{}', 0)")
    world.on_shard(0, "UPDATE shard_state SET user_count = user_count + 1")
    world.on_shard(
        0,
        "UPDATE directory SET user_ids = overlay(user_ids PLACING decode('8913000000000000', 'hex') FROM 8*4+1) "
        "WHERE block = 0",
    )
    for segment in world.segments:
        if world.by_rule(segment, 0, 5001, 4) and segment.id != 11:
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
    a_bit, a_bit_of_an_empty_slot, a_bit_after_the_frozen_roll_out, a_bit_of_a_segment_without_a_rule, a_row_of_zeros,
    bits_of_an_unknown_segment, bits_beyond_the_last_block, a_short_row_of_bits, an_id_of_the_directory,
    a_deleted_user_in_the_directory, a_short_directory_row, the_counter_of_a_segment, the_counter_of_the_users,
    a_slot_never_given_out, a_tombstone_of_a_living_user, an_override_of_a_deleted_user, a_user_on_the_wrong_shard,
    a_tombstone_on_the_wrong_shard, a_missing_fence, a_fence_of_an_aborted_operation, a_fence_of_nothing,
    a_segment_missing_on_a_shard, a_segment_missing_in_the_catalog, another_rule_on_a_shard, another_slug_on_a_shard,
    a_slug_reserved_by_nobody, a_deletion_by_nobody,
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
    # Each bit, two rows of zeros, and the counter.
    assert report.total == len(world.slots(0)) + 2 + 1


# -- the cache ------------------------------------------------------------------------------------------------------


def test_a_stale_entry_is_named(world: World, cache: CacheClient, service: Check, check_settings: Settings) -> None:
    world.fill(cache)
    right = world.listed(42)
    wrong = tuple(segment for segment in right if segment != 8)
    cache.unblock(0, [42])
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
        cache.unblock(0, [42])

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
        """Changes user 42 after the shard's snapshot was taken, before its entry is looked at."""

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


# -- operations in flight -------------------------------------------------------------------------------------------


def test_an_operation_half_committed_is_no_difference(
    world: World, cache: CacheClient, service: Check, check_settings: Settings
) -> None:
    """Committed in the ledger and on shard 0, not yet on shard 1, and no cache dropped yet."""
    world.fill(cache)
    checkout = world.segments[0]
    new_rule = Rule(60_000)
    operation = world.add_operation(
        OperationKind.ROLL_OUT, checkout, OperationState.COMMITTED, rule=new_rule, fenced_on=[0], age_s=1
    )
    old = World(check_settings)
    old.segments = [replace(segment) for segment in world.segments]
    old.operations, old.fences = world.operations, world.fences
    checkout.rule = new_rule
    world.write()
    old._write_shard(1)
    report = run(service, check_settings)
    assert texts(report) == []
    assert report.entries == 2997

    # Once it is said to be done, all three are.
    world.on_catalog("UPDATE operations SET state = 'DONE', end_time = now() WHERE id = :id", id=operation)
    counts = run(service, check_settings).counts
    assert {kind.value for kind in counts} == {"segment", "fence", "cache"}


def test_a_creation_and_a_deletion_half_committed_are_no_difference(
    world: World, service: Check, check_settings: Settings
) -> None:
    alpha, unrolled = world.segments[2:4]
    world.add_operation(OperationKind.DELETE, alpha, OperationState.COMMITTED, fenced_on=[0], age_s=1)
    world.write()
    world.on_catalog("UPDATE segments SET state = 2 WHERE id = 9")
    world.on_shard(0, "DELETE FROM segments WHERE id = 9")
    assert (
        texts(run(service, check_settings, cache=False))
        == ["shard 1, override of user 23 for segment 9: the user or the segment does not exist, it goes with them"] * 0
    )

    world.operations.pop()
    for fences in world.fences:
        fences.clear()
    world.operations.clear()
    world.add_operation(OperationKind.CREATE, unrolled, OperationState.COMMITTED, fenced_on=[1], age_s=1)
    world.write()
    world.on_shard(0, "DELETE FROM segments WHERE id = 10")
    world.on_shard(0, "DELETE FROM overrides WHERE segment_id = 10")
    assert texts(run(service, check_settings, cache=False)) == []


def prepare(world: World, gid: str) -> None:
    with world.shards[1].connect() as connection:
        connection.execute(sa.text("UPDATE shard_state SET next_slot = next_slot"))
        assert connection.connection.driver_connection is not None
        connection.exec_driver_sql(f"PREPARE TRANSACTION '{gid}'")


def finish(world: World, gid: str) -> None:
    with world.shards[1].connect().execution_options(isolation_level="AUTOCOMMIT") as connection:
        connection.exec_driver_sql(f"ROLLBACK PREPARED '{gid}'")


@pytest.mark.parametrize(
    ("state", "expected"),
    [
        (OperationState.PREPARING, None),
        (OperationState.COMMITTED, "its operation is COMMITTED: recovery ends it within 0 s"),
        (OperationState.ABORTED, "its operation is ABORTED: recovery ends it within 0 s"),
    ],
)
def test_a_prepared_transaction_without_a_reason_is_named(
    world: World,
    service: Check,
    check_settings: Settings,
    monkeypatch: pytest.MonkeyPatch,
    state: OperationState,
    expected: str | None,
) -> None:
    operation = world.add_operation(OperationKind.ROLL_OUT, world.segments[1], state, rule=world.segments[1].rule)
    world.write()
    gid = str(Gid("check", operation, 1))
    prepare(world, gid)
    try:
        assert texts(run(service, check_settings, cache=False)) == []  # not for long enough
        monkeypatch.setattr("segsvc.services.check_ledger.IN_DOUBT_MAX_S", 0.0)
        found = texts(run(service, check_settings, cache=False))
        wanted = [f"shard 1, prepared transaction {gid}: it is prepared for 0 s, {expected}"] if expected else []
        assert found == wanted
    finally:
        finish(world, gid)


@pytest.mark.parametrize(
    ("gid", "expected"),
    [
        (f"segsvc:check:{ABSENT}:1", "the ledger does not know its operation; nobody will end it"),
        (f"segsvc:check:{ABSENT}:0", "it is not this shard's; nobody will end it"),
        (f"segsvc:other:{ABSENT}:1", "it is not this shard's; nobody will end it"),
        ("segsvc:nonsense", "it is not this shard's; nobody will end it"),
        ("somebody-else's".replace("'", ""), None),
    ],
)
def test_a_prepared_transaction_of_nobody_is_named(
    world: World, service: Check, check_settings: Settings, gid: str, expected: str | None
) -> None:
    prepare(world, gid)
    try:
        found = texts(run(service, check_settings, cache=False))
        wanted = [f"shard 1, prepared transaction {gid}: it is prepared for 0 s, {expected}"] if expected else []
        assert found == wanted
    finally:
        finish(world, gid)


# -- the command ----------------------------------------------------------------------------------------------------


def command(settings: Settings, *arguments: str) -> subprocess.CompletedProcess[str]:
    environment = {key: value for key, value in os.environ.items() if not key.startswith("SEGSVC_")}
    environment |= {
        "SEGSVC_ENV_FILE": "",
        "SEGSVC_CLUSTER": settings.cluster,
        "SEGSVC_CATALOG_DSN": settings.catalog_dsn,
        "SEGSVC_SHARD_DSNS": " ".join(settings.shard_dsns),
        "SEGSVC_CACHE_URL": settings.cache_url,
    }
    return subprocess.run(
        [sys.executable, "-m", "segsvc", "check", *arguments],
        env=environment, capture_output=True, text=True, check=False, timeout=60,
    )  # fmt: skip


def test_the_command_ends_with_0_on_a_sound_installation(
    world: World, cache: CacheClient, check_settings: Settings
) -> None:
    world.fill(cache)
    done = command(check_settings)
    assert (done.returncode, done.stderr) == (0, "")
    assert done.stdout.startswith("no difference in 2,997 users, 5 segments, ")
    done = command(check_settings, "--json")
    assert done.returncode == 0
    report = json.loads(done.stdout)
    assert (report["ok"], report["differences"], report["entries"]) == (True, [], 2997)


def test_the_command_names_each_of_four_faults_and_ends_with_1(
    world: World, cache: CacheClient, check_settings: Settings
) -> None:
    """One bit, one id of the directory, one counter, one cache entry."""
    world.fill(cache)
    cache.unblock(1, [43])
    world.fill_users(cache, {43: ()})
    flip(world, 1, 8, 2001)
    world.on_shard(1, "UPDATE segments SET rule_count = rule_count - 1 WHERE id = 8")
    an_id_of_the_directory(world)
    the_counter_of_the_users(world)
    done = command(check_settings)
    assert done.returncode == 1
    lines = done.stdout.splitlines()
    assert lines[-1].startswith("4 differences in 2,997 users")
    assert set(lines[:-1]) == {
        "shard 0, directory, block 1, slot 100: it names user 5, the users' rows say user 2250",
        "shard 1, shard_state: user_count is 1498, there are 1499 users",
        "shard 1, segment beta (8), user 2001 (block 0, bit 1000): bit is 0, the rule says 1",
        f"shard 1, cache entry of user 43: it lists segments [], the shard says {list(world.listed(43))}",
    }
    done = command(check_settings, "--json")
    assert done.returncode == 1
    report = json.loads(done.stdout)
    assert report["difference_counts"] == {"directory": 1, "bit": 1, "counter": 1, "cache": 1}


def test_the_command_says_what_cannot_be_reached(world: World, check_settings: Settings) -> None:
    gone = check_settings.model_copy(update={"cache_url": "redis://127.0.0.1:1/0"})
    done = command(gone)
    assert done.returncode == 1
    assert done.stderr.startswith("CACHE_UNAVAILABLE: ")
    assert command(gone, "--without-cache").returncode == 0
    gone = check_settings.model_copy(update={"shard_dsns": (check_settings.shard_dsns[0], "postgresql+psycopg2:///no")})
    done = command(gone)
    assert (done.returncode, done.stderr) == (1, "SHARD_UNAVAILABLE: shard 1 cannot be reached now\n")
