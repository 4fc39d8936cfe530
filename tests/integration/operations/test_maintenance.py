"""Upkeep beside operations counts members for lists and deletes old rows, and no process waits for it."""

from __future__ import annotations

from collections.abc import Callable, Iterator
from datetime import datetime

import pytest
import sqlalchemy as sa

from segsvc.bootstrap import make_rule_costs
from segsvc.domain.operation import OperationState
from segsvc.postgres import forgetting
from segsvc.postgres.catalog.maintenance import PostgresMaintainedCatalog
from segsvc.postgres.engine import Databases, Pool
from segsvc.postgres.shard.maintenance import PostgresMaintainedShards
from segsvc.services.maintenance import MaintenanceService
from tests.integration.operations.conftest import SHARDS, USERS, Rig, roll_out

DAY_S = 86_400


def upkeep(rig: Rig, databases: Databases | None = None) -> MaintenanceService:
    databases = databases or rig.databases
    return MaintenanceService(
        catalog=PostgresMaintainedCatalog(databases),
        shards=PostgresMaintainedShards(databases),
        costs=make_rule_costs(rig.installation.settings, databases),
        shard_numbers=range(SHARDS),
        request_id_ttl_s=DAY_S,
        tombstone_ttl_s=2 * DAY_S,
        fence_ttl_s=3 * DAY_S,
        entries_gone_after_s=DAY_S,
        operation_deadline_s=30,
    )


def stored(rig: Rig, slug: str = "checkout") -> tuple[int, datetime | None]:
    """The member count that lists show, and its time."""
    segment = rig.ledger.segment(slug)
    assert segment is not None
    return segment.member_count, segment.member_count_time


def override(rig: Rig, user_id: int, segment_id: int, effect: int, expires: str | None) -> None:
    rig.installation.execute(
        user_id % SHARDS,
        "INSERT INTO overrides (user_id, segment_id, effect, expire_time) "
        "VALUES (:user, :segment, :effect, now() + CAST(:expires AS interval))",
        user=user_id,
        segment=segment_id,
        effect=effect,
        expires=expires,
    )


# -- counting -------------------------------------------------------------------------------------------------------


def test_members_are_counted_again(rig: Rig) -> None:
    segment_id = rig.create()
    roll_out(rig, 40_000)
    rig.settle()

    members = sorted(rig.expected("checkout", 40_000))
    others = sorted(set(USERS) - set(members))

    for user_id in others[:5]:
        override(rig, user_id, segment_id, 1, None)
    for user_id in members[:3]:
        override(rig, user_id, segment_id, 2, "1 hour")
    override(rig, members[3], segment_id, 2, "-1 second")
    override(rig, members[4], segment_id, 1, None)  # a member by the rule as well

    _, before = stored(rig)
    upkeep(rig).run()

    count, time = stored(rig)

    assert count == len(members) + 5 - 3
    assert before is not None
    assert time is not None
    assert time > before


@pytest.mark.parametrize("threshold", [30_000, 0])
def test_a_count_from_before_the_shards_commit_does_not_replace_the_operations(
    rig: Rig, arm: Callable[[str, str], None], threshold: int
) -> None:
    rig.create()
    roll_out(rig, 10_000)
    rig.settle()
    upkeep(rig).run()

    arm("decided", "fail")  # decided, and not committed on any shard yet
    operation = roll_out(rig, threshold)
    rig.deliver()
    assert rig.state(operation) is OperationState.COMMITTED
    upkeep(rig).run()

    expected = len(rig.expected("checkout", threshold))
    assert stored(rig)[0] == expected
    arm("decided", "")
    rig.settle()
    assert stored(rig)[0] == expected
    upkeep(rig).run()
    assert stored(rig)[0] == expected


def test_a_count_that_an_operation_has_overtaken_is_dropped(rig: Rig, arm: Callable[[str, str], None]) -> None:
    segment_id = rig.create()
    arm("decided", "fail")
    operation = roll_out(rig, 30_000)
    rig.deliver()

    catalog = PostgresMaintainedCatalog(rig.databases)
    shards = PostgresMaintainedShards(rig.databases)
    began = catalog.now()  # after the decision
    counts = [shards.member_counts(shard)[segment_id] for shard in range(SHARDS)]
    assert counts == [0] * SHARDS

    arm("decided", "")
    rig.settle()
    assert rig.state(operation) is OperationState.DONE

    catalog.put_member_counts({segment_id: sum(counts)}, began)
    assert stored(rig)[0] == len(rig.expected("checkout", 30_000))


def test_a_segment_that_is_being_changed_is_counted_the_next_time(rig: Rig) -> None:
    first, second = rig.create("first"), rig.create("second")
    catalog = PostgresMaintainedCatalog(rig.databases)
    with rig.databases.catalog.begin() as editing:
        editing.execute(sa.text("SELECT FROM segments WHERE id = :id FOR UPDATE"), {"id": first})
        catalog.put_member_counts({first: 1, second: 2}, catalog.now())
    assert (stored(rig, "first")[0], stored(rig, "second")[0]) == (0, 2)
    catalog.put_member_counts({first: 1, second: 2}, catalog.now())
    assert (stored(rig, "first")[0], stored(rig, "second")[0]) == (1, 2)


# -- forgetting -----------------------------------------------------------------------------------------------------

_OLD_AND_NEW = {
    "deleted_users": "INSERT INTO deleted_users (id, version, delete_time) "
    "SELECT 900000000 + n, 1, now() - make_interval(hours => n) FROM generate_series(1, 60) n",
    "user_requests": "INSERT INTO user_requests (user_id, request_id, content_hash, answer, create_time) "
    "SELECT 1, gen_random_uuid(), '', '{}', now() - make_interval(hours => n) FROM generate_series(1, 60) n",
    "applied_operations": "INSERT INTO applied_operations (operation_id, kind, apply_time) "
    "SELECT gen_random_uuid(), 1, now() - make_interval(hours => n) FROM generate_series(1, 80) n",
    "overrides": "INSERT INTO overrides (user_id, segment_id, effect, expire_time) "
    "SELECT n, 7, 1, now() + make_interval(mins => 30 - n) FROM generate_series(1, 120) n "
    "UNION ALL SELECT 900, 7, 1, NULL",
}
_LEFT = {"deleted_users": 47, "user_requests": 23, "applied_operations": 71, "overrides": 90}
"""Rows younger than two days, a day and three days; and all overrides that did not end more than an hour ago."""


@pytest.fixture
def old_rows(rig: Rig) -> Rig:
    for shard in range(SHARDS):
        for statement in _OLD_AND_NEW.values():
            rig.installation.execute(shard, statement)
    return rig


@pytest.fixture(autouse=True)
def clean(rig: Rig) -> Iterator[None]:
    yield
    for shard in range(SHARDS):
        for table in _OLD_AND_NEW:
            rig.installation.execute(shard, f"DELETE FROM {table}")


def left(rig: Rig, shard: int) -> dict[str, int]:
    return {table: int(str(rig.installation.execute(shard, f"SELECT count(*) FROM {table}")[0][0])) for table in _LEFT}


@pytest.mark.parametrize("at_once", [10_000, 7, 1])
def test_what_is_old_is_forgotten_and_nothing_else(
    old_rows: Rig, monkeypatch: pytest.MonkeyPatch, at_once: int
) -> None:
    monkeypatch.setattr(forgetting, "ROWS_AT_ONCE", at_once)
    upkeep(old_rows).run()
    assert [left(old_rows, shard) for shard in range(SHARDS)] == [_LEFT] * SHARDS


def test_the_fence_of_an_operation_that_does_not_end_stays(rig: Rig, arm: Callable[[str, str], None]) -> None:
    """Without the fence the shard would seem to have lost the operation, and the work would be done again."""
    rig.create()
    arm("committed-not-invalidated", "fail")
    operation = roll_out(rig, 30_000)
    rig.deliver()

    for shard in range(SHARDS):
        rig.installation.execute(shard, "UPDATE applied_operations SET apply_time = apply_time - interval '9 days'")

    upkeep(rig).run()
    fences = [rig.installation.execute(shard, "SELECT operation_id FROM applied_operations") for shard in range(SHARDS)]
    assert [[row.operation_id for row in rows] for rows in fences] == [[operation.id]] * SHARDS

    arm("committed-not-invalidated", "")
    rig.settle()
    assert rig.state(operation) is OperationState.DONE


def test_requests_are_forgotten_and_their_operations_stay(rig: Rig) -> None:
    rig.create()
    insert = (
        "INSERT INTO requests (method, request_id, content_hash, operation_id, create_time) "
        "SELECT 'm', gen_random_uuid(), '', o.id, now() - CAST(:age AS interval) FROM operations o"
    )
    rig.installation.execute(None, insert, age="23 hours")
    rig.installation.execute(None, insert, age="25 hours")
    upkeep(rig).run()
    assert len(rig.installation.execute(None, "SELECT FROM requests")) == 1
    assert len(rig.installation.execute(None, "SELECT FROM operations")) == 1


def test_a_row_that_somebody_has_locked_is_forgotten_the_next_time(old_rows: Rig) -> None:
    with old_rows.databases.shards[0].begin() as deleting:  # as a prepared operation locks it
        held = len(deleting.execute(sa.text("SELECT FROM overrides WHERE user_id > 115 FOR UPDATE")).all())
        upkeep(old_rows).run()
        assert left(old_rows, 0) == _LEFT | {"overrides": 90 + held - 1}  # user 900's override has no end
        assert [left(old_rows, shard) for shard in (1, 2)] == [_LEFT] * 2
    upkeep(old_rows).run()
    assert left(old_rows, 0) == _LEFT


def test_a_shard_that_is_away_or_locked_keeps_no_other_from_being_looked_after(old_rows: Rig) -> None:
    settings = old_rows.installation.settings
    dsns = [settings.shard_dsns[0], settings.shard_dsns[1] + "_is_not_there", settings.shard_dsns[2]]
    databases = Databases(settings.model_copy(update={"shard_dsns": tuple(dsns)}), "test", Pool(1))

    try:
        with old_rows.databases.shards[0].begin() as migrating:
            migrating.exec_driver_sql("LOCK TABLE deleted_users IN ACCESS EXCLUSIVE MODE")
            upkeep(old_rows, databases).run()
    finally:
        databases.close()

    assert left(old_rows, 2) == _LEFT
