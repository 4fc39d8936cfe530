"""The cost of a rule is measured before it is accepted; each rule's cost is bounded, and so is the cost of all."""

from __future__ import annotations

import pytest
import sqlalchemy as sa

from segsvc.bootstrap import make_rule_costs
from segsvc.domain.condition_cost import ConditionCost
from segsvc.domain.errors import Reason, ServiceError
from segsvc.domain.operation import Operation, OperationState
from segsvc.domain.segment import Policy, Rule
from segsvc.postgres import tables
from segsvc.postgres.engine import Databases, Pool
from segsvc.postgres.shard.condition_meter import PostgresMeter
from segsvc.postgres.shard.memberships import select_users
from tests.integration.operations.conftest import Rig
from tests.integration.operations.test_maintenance import upkeep

USUAL = "user.country == 'RU' && user.age >= 18"
PAIRS = " || ".join(["user.a < user.b"] * 200)
LISTED = " || ".join(f"user.country == 'x{n}'" for n in range(100))


def accept(rig: Rig, slug: str, condition: str, percent: int = 10, policy: Policy = Policy.LIVE) -> Operation:
    return rig.acceptance.roll_out(slug, Rule(percent * 1000, condition, policy), etag="", request=None)


def rolled_out(rig: Rig, slug: str, condition: str) -> Operation:
    operation = accept(rig, slug, condition)
    rig.settle()
    return rig.operations.get(operation.id)


def measured(rig: Rig, condition: str) -> ConditionCost:
    return make_rule_costs(rig.installation.settings, rig.databases).measured(condition, timeout_s=None)


def stored(rig: Rig, slug: str) -> ConditionCost | None:
    with rig.databases.catalog_tx() as connection:
        value = connection.execute(
            sa.select(tables.segments.c.rule_cost).where(tables.segments.c.slug == slug)
        ).scalar_one()
    return None if value is None else ConditionCost.from_json(value)


def refused(rig: Rig, slug: str, condition: str) -> ServiceError:
    with pytest.raises(ServiceError) as caught:
        accept(rig, slug, condition)
    assert caught.value.reason is Reason.CONDITION_TOO_COSTLY
    return caught.value


@pytest.mark.parametrize("condition", ["true", "user.vip", USUAL, LISTED, f"user.age in {list(range(600))}"])
def test_usual_conditions_are_accepted(rig: Rig, condition: str) -> None:
    rig.create()
    operation = rolled_out(rig, "checkout", condition)
    assert operation.state is OperationState.DONE
    cost = stored(rig, "checkout")
    assert cost is not None
    assert 0 <= cost.alone_us < rig.installation.settings.condition_cost_max_us


@pytest.mark.parametrize(
    "condition",
    [
        PAIRS,
        f"has(user.nobody_has_this) && ({PAIRS})",
        f"user.a == 'no' && ({PAIRS})",
        f"({PAIRS}) == true",
        f"[{PAIRS}] == [user.a]",
        " && ".join(f"user.a.contains('{n}')" for n in range(150)),
    ],
)
def test_costly_conditions_are_refused(rig: Rig, condition: str) -> None:
    rig.create()
    refusal = refused(rig, "checkout", condition)
    assert float(refusal.metadata["cost_us"]) > float(refusal.metadata["limit_us"]) == 30
    assert "SEGSVC_CONDITION_COST_MAX_US" in refusal.message
    assert rig.ledger.open_operations() == []


def test_all_rules_together_are_bounded_when_an_operation_starts(rig: Rig) -> None:
    for slug in ("one", "two", "three"):
        rig.create(slug)

    first = rolled_out(rig, "one", USUAL)
    assert first.plan.cost is not None

    # Let the first rule cost nearly the whole limit.
    almost = ConditionCost(1, rig.installation.settings.conditions_cost_max_us, 0, frozenset())
    with rig.databases.catalog_tx() as connection:
        connection.execute(
            sa.update(tables.segments).where(tables.segments.c.slug == "one").values(rule_cost=almost.to_json())
        )

    refusal = refused(rig, "two", LISTED)
    assert float(refusal.metadata["cost_us"]) > float(refusal.metadata["limit_us"]) == 100
    assert "SEGSVC_CONDITIONS_COST_MAX_US" in refusal.message

    # A rule without a condition costs nothing, a rule in force no more than before, a FROZEN rule nothing afterwards.
    for slug, condition, policy in (
        ("two", "", Policy.LIVE),
        ("three", LISTED, Policy.FROZEN),
        ("one", USUAL, Policy.LIVE),
    ):
        operation = accept(rig, slug, condition, policy=policy)
        rig.settle()
        assert rig.state(operation) is OperationState.DONE


def test_a_rollout_accepted_beside_another_is_judged_again_when_its_turn_comes(rig: Rig) -> None:
    rig.create("one")
    rig.create("two")
    first, second = accept(rig, "one", USUAL), accept(rig, "two", LISTED)

    with rig.databases.catalog_tx() as connection:
        dear = ConditionCost(1, rig.installation.settings.conditions_cost_max_us, 0, frozenset()).to_json()
        connection.execute(
            sa.update(tables.operations)
            .where(tables.operations.c.id == first.id)
            .values(plan=first.plan.to_json() | {"cost": dear})
        )

    rig.settle()
    assert rig.state(first) is OperationState.DONE

    ended = rig.operations.get(second.id)
    assert ended.state is OperationState.ABORTED
    assert ended.failure is not None
    assert ended.failure.reason == "CONDITION_TOO_COSTLY"
    assert set(ended.failure.metadata) == {"cost_us", "limit_us"}


def test_rules_of_a_release_that_did_not_measure_are_measured_by_upkeep(rig: Rig) -> None:
    rig.create()
    rolled_out(rig, "checkout", USUAL)

    with rig.databases.catalog_tx() as connection:
        connection.execute(sa.update(tables.segments).values(rule_cost=None, rule_condition=PAIRS))

    before = rig.ledger.segment("checkout")
    upkeep(rig).run()

    cost = stored(rig, "checkout")
    assert cost is not None
    assert cost.alone_us > rig.installation.settings.condition_cost_max_us

    after = rig.ledger.segment("checkout")
    assert before is not None
    assert after is not None
    assert before.etag == after.etag

    # The rule costs more than any new rule may, and can still be rolled out with another percentage and taken back.
    assert rolled_out(rig, "checkout", PAIRS).state is OperationState.DONE
    assert rolled_out(rig, "checkout", "").state is OperationState.DONE
    assert stored(rig, "checkout") is None


def test_a_measurement_leaves_what_the_session_has_prepared(rig: Rig) -> None:
    """A measurement and the reads of a front share their connections."""
    databases = Databases(rig.installation.settings, "test", Pool(1))
    try:
        for _ in range(2):
            with databases.shard_tx(0) as connection:
                assert select_users(connection, [0]) == []
            PostgresMeter(databases).measure(USUAL, 0, enough_us=1000, timeout_s=None)
    finally:
        databases.close()


def test_a_cost_grows_with_the_condition(rig: Rig) -> None:
    few = measured(rig, " || ".join(["user.a < user.b"] * 10))
    many = measured(rig, " || ".join(["user.a < user.b"] * 200))
    assert many.batch_us > 5 * few.batch_us
    assert many.attributes == {"a", "b"}
