"""The checker while operations are in flight, and its differences about prepared transactions."""

from __future__ import annotations

from dataclasses import replace

import pytest

from segsvc.bootstrap import Check
from segsvc.cache.client import CacheClient
from segsvc.config import Settings
from segsvc.domain.operation import Gid, OperationKind, OperationState
from segsvc.domain.segment import Rule
from tests.integration.check.checking import ABSENT, finish, prepare, run, texts
from tests.integration.check.world import World


def test_an_operation_half_committed_is_no_difference(
    world: World, cache: CacheClient, service: Check, check_settings: Settings
) -> None:
    """The operation is committed in the ledger and on shard 0, not yet on shard 1, and no cache is dropped yet."""
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

    # Once the ledger has it as DONE, all three are differences.
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
        assert texts(run(service, check_settings, cache=False)) == []  # not prepared for long enough

        monkeypatch.setattr("segsvc.services.check.ledger.IN_DOUBT_MAX_S", 0.0)
        found = texts(run(service, check_settings, cache=False))
        wanted = [f"shard 1, prepared transaction {gid}: it is prepared, {expected}"] if expected else []
        assert found == wanted
    finally:
        finish(world, gid)


@pytest.mark.parametrize(
    ("gid", "expected"),
    [
        (f"segsvc:check:{ABSENT}:1", "the ledger does not know its operation; no process will end it"),
        (f"segsvc:check:{ABSENT}:0", "it is not this shard's; no process will end it"),
        (f"segsvc:other:{ABSENT}:1", "it is not this shard's; no process will end it"),
        ("segsvc:nonsense", "it is not this shard's; no process will end it"),
        ("somebody-else's".replace("'", ""), None),
    ],
)
def test_a_prepared_transaction_without_an_operation_is_named(
    world: World, service: Check, check_settings: Settings, gid: str, expected: str | None
) -> None:
    prepare(world, gid)
    try:
        found = texts(run(service, check_settings, cache=False))
        wanted = [f"shard 1, prepared transaction {gid}: it is prepared, {expected}"] if expected else []
        assert found == wanted
    finally:
        finish(world, gid)
