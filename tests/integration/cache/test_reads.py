"""What one statement reads of users and blocks: bits, overrides laid over them and expiry, all of one moment."""

from __future__ import annotations

import time

import numpy as np
import pytest

from segsvc.domain.errors import Reason, ServiceError
from segsvc.domain.membership import NEVER_US, LoadedUser
from segsvc.postgres.engine import Databases, Pool
from segsvc.postgres.shard.memberships import PostgresMemberships
from tests.eventually import eventually, quick
from tests.integration.cache.conftest import SHARDS, World

INCLUDE, EXCLUDE = 1, 2


def load(world: World, user_id: int) -> LoadedUser:
    (row,) = world.memberships.load(user_id % SHARDS, [user_id])
    return row


def segments(world: World, user_id: int) -> set[int]:
    return set(load(world, user_id).segment_ids)


def test_many_users_of_several_blocks(world: World) -> None:
    users = world.add_users(2 * 2100)
    even = world.add_segment("even-thirds", [u for u in users if u % 6 == 0])
    last = world.add_segment("last", [users[-2]])

    asked = [2, 6, 2048, 2050, 4198, 4199 - 1, 999_998]
    rows = {row.user_id: row for row in world.memberships.load(0, asked)}

    assert set(rows) == {2, 6, 2048, 2050, 4198}
    assert rows[2].segment_ids == ()
    assert rows[6].segment_ids == (even,)
    assert [rows[user].slot // 1024 for user in (2, 2048, 2050, 4198)] == [0, 0, 1, 2]
    assert set(load(world, 4199).segment_ids) == {last}
    assert rows[6].valid_until_us == NEVER_US


def test_row_version_is_the_users(world: World) -> None:
    world.add_users(4)
    world.installation.execute(0, "UPDATE users SET row_version = 41 WHERE id = 4")
    assert (load(world, 4).row_version, load(world, 2).row_version) == (41, 0)


def test_overrides_are_laid_over_the_bits(world: World) -> None:
    world.add_users(4)
    by_rule = world.add_segment("by-rule", [2, 4])
    other = world.add_segment("other", [2])
    world.override(4, by_rule, EXCLUDE)
    world.override(4, other, INCLUDE)
    world.override(2, by_rule, INCLUDE)
    assert segments(world, 4) == {other}
    assert segments(world, 2) == {by_rule, other}, "an inclusion of a member changes nothing"


def test_nearest_expiry_bounds_the_answer(world: World) -> None:
    world.add_users(4)
    ids = [world.add_segment(f"s{n}") for n in range(4)]
    world.override(4, ids[0], INCLUDE)
    world.override(4, ids[1], INCLUDE, 3600)
    world.override(4, ids[2], EXCLUDE, 60)
    world.override(4, ids[3], INCLUDE, -5)
    row = load(world, 4)
    assert set(row.segment_ids) == {ids[0], ids[1]}
    assert 55e6 < row.valid_until_us - row.read_time_us < 60e6


def test_override_ends_by_the_clock_alone(world: World) -> None:
    world.add_users(4)
    included = world.add_segment("included")
    excluded = world.add_segment("excluded", [4])
    world.override(4, included, INCLUDE, 2)
    world.override(4, excluded, EXCLUDE, 2)
    assert segments(world, 4) == {included}
    eventually(lambda: segments(world, 4) == {excluded})
    assert load(world, 4).valid_until_us == NEVER_US


def test_read_time_is_not_later_than_the_snapshot(world: World) -> None:
    """It must not promise what the snapshot does not hold: so it is the time before the statement, not after."""
    world.add_users(4)
    before_us = time.time_ns() // 1000
    row = load(world, 4)
    assert before_us - 1000 <= row.read_time_us <= time.time_ns() // 1000


def test_deadline_bounds_the_statement(world: World) -> None:
    world.add_users(4)
    with world.databases.shards[0].begin() as blocker:
        blocker.exec_driver_sql("LOCK TABLE users IN ACCESS EXCLUSIVE MODE")

        def load_late() -> None:
            with pytest.raises(ServiceError) as error:
                world.memberships.load(0, [4], timeout_s=0.1)
            assert error.value.reason is Reason.DEADLINE_EXCEEDED

        quick(load_late, within_s=1.5)  # the session's bound is 2 s


def test_block_is_what_its_users_are(world: World) -> None:
    users = world.add_users(2 * 1500)
    kept = world.add_segment("kept", [u for u in users if u % 10 < 4])
    other = world.add_segment("other", users[2500:])
    world.installation.execute(0, "UPDATE users SET row_version = id WHERE id % 3 = 0")
    world.override(2, other, INCLUDE, 100)
    world.override(4, kept, EXCLUDE)
    world.override(6, kept, EXCLUDE, -1)

    with world.memberships.warm_session(0) as session:
        assert session is not None
        listed = session.users_of([0, 1, 7])
        read = {block.block: block for block in session.read([1, 0, 7])}

    assert set(listed) == set(read) == {0, 1}
    assert listed[0] + listed[1] == [u for u in users if u % 2 == 0]

    for number, block in read.items():
        there = np.flatnonzero(block.user_ids)
        assert block.user_ids[there].tolist() == listed[number]
        assert block.row_versions[there].tolist() == [u if u % 3 == 0 else 0 for u in listed[number]]
        rows = {row.user_id: row for row in world.memberships.load(0, listed[number])}
        flags = np.unpackbits(block.packed, axis=1, bitorder="little").astype(bool)
        overridden = set(block.overrides[:, 0].tolist())
        for bit in there.tolist():
            if bit not in overridden:
                member = {int(s) for row, s in enumerate(block.segment_ids) if flags[row, bit]}
                assert member == set(rows[int(block.user_ids[bit])].segment_ids)

    overrides = sorted(map(tuple, read[0].overrides.tolist()))
    assert [override[:3] for override in overrides] == [(0, other, 1), (1, kept, 0)]
    assert 95e6 < overrides[0][3] - read[0].read_time_us <= 100e6
    assert overrides[1][3] == NEVER_US


def test_one_warmer_a_shard(world: World) -> None:
    with world.memberships.warm_session(0) as first, world.memberships.warm_session(0) as second:
        assert first is not None
        assert second is None
        with world.memberships.warm_session(1) as other:
            assert other is not None
    with world.memberships.warm_session(0) as again:
        assert again is not None


def test_a_dead_warmer_keeps_no_other_warmer_out(world: World) -> None:
    def run_into_a_restart() -> None:
        with world.memberships.warm_session(0) as session:
            assert session is not None
            world.installation.execute(
                0,
                "SELECT pg_terminate_backend(pid) FROM pg_stat_activity "
                "WHERE datname = current_database() AND pid <> pg_backend_pid()",
            )
            session.users_of([0])

    with pytest.raises(ServiceError):
        run_into_a_restart()

    with world.memberships.warm_session(0) as again:
        assert again is not None


def test_an_unreachable_shard_is_reported(world: World) -> None:
    settings = world.settings.model_copy(
        update={"shard_dsns": (world.settings.shard_dsns[0].replace("test_shard0", "no_such"),)}
    )
    databases = Databases(settings, "test", Pool(1))
    with pytest.raises(ServiceError) as error:
        PostgresMemberships(databases).load(0, [1])
    databases.close()
    assert error.value.reason is Reason.SHARD_UNAVAILABLE


def test_plan_made_on_empty_tables_looks_up_by_key(world: World) -> None:
    """Reads are planned once a connection. A plan made while the shard had no users must still be right with many."""
    databases = Databases(world.settings, "test", Pool(1, by_key=True))
    memberships = PostgresMemberships(databases)
    assert memberships.load(0, [2]) == []

    world.add_users(5000)
    segment_id = world.add_segment("even", [2])

    (row,) = memberships.load(0, [2], timeout_s=1.0)
    assert row.segment_ids == (segment_id,)

    with databases.shard_connection(0) as connection:
        plan = connection.exec_driver_sql("EXPLAIN EXECUTE segsvc_users (ARRAY[2])").scalars().all()
    databases.close()

    assert "pk_users" in " ".join(plan)
    assert "Seq Scan" not in " ".join(plan)
