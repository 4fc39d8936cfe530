"""What conditions cost together, which rules are refused for their cost, and which never are."""

from __future__ import annotations

import json

import pytest
from hypothesis import given
from hypothesis import strategies as st

from segsvc.conditions import parse_condition, tree
from segsvc.conditions.steps import steps
from segsvc.conditions.tree import attributes_of, render
from segsvc.domain.condition_cost import ConditionCost, CostLimits, RuleInForce, refusal_of, total_us
from segsvc.domain.errors import Category, Reason
from segsvc.domain.event_limits import ATTRIBUTES_BYTES_MAX, ATTRIBUTES_MAX
from segsvc.domain.segment import Policy, Rule
from segsvc.postgres.shard.condition_meter import made_up
from tests.conditions import nodes

LIMITS = CostLimits(condition_us=10, conditions_us=30)


def cost(batch_us: float, *names: str, rollout_us: float = 0.0, lookup_us: float = 1.0) -> ConditionCost:
    return ConditionCost(rollout_us, batch_us, lookup_us, frozenset(names))


def live(segment_id: int, condition: str, of: ConditionCost | None, policy: Policy = Policy.LIVE) -> RuleInForce:
    return RuleInForce(segment_id, condition, policy, of)


def test_each_condition_counts_once_and_each_attribute_once() -> None:
    rules = [
        live(1, "x", cost(3, "a", "b")),
        live(2, "x", cost(3, "a", "b")),
        live(3, "y", cost(2, "b", "c", lookup_us=2)),
        live(4, "z", cost(100, "d"), Policy.FROZEN),
        live(5, "unknown", None),
    ]
    assert total_us(rules) == 3 + 2 + 1 + 2 + 2
    assert total_us([]) == 0


def test_alone_the_dearer_of_rollout_and_batch_counts() -> None:
    assert cost(3, "a", "b").alone_us == 5
    assert cost(3, "a", rollout_us=7).alone_us == 7


def test_a_condition_that_is_too_dear_alone() -> None:
    refusal = refusal_of(1, Rule(1000, "x"), cost(10.5), [], LIMITS)
    assert refusal is not None
    assert (refusal.reason, refusal.reason.category) == (Reason.CONDITION_TOO_COSTLY, Category.FAILED_PRECONDITION)
    assert refusal.metadata == {"cost_us": "10.5", "limit_us": "10.0"}
    assert "10.5 µs a user" in refusal.message
    assert refusal_of(1, Rule(1000, "x"), cost(10), [], LIMITS) is None
    frozen = refusal_of(1, Rule(1000, "x", Policy.FROZEN), cost(10.5), [], LIMITS)
    assert frozen is not None  # its rollout holds the shard, even if it costs nothing later


def test_conditions_that_are_too_dear_together() -> None:
    others = [live(n, f"c{n}", cost(9)) for n in range(3)]
    assert refusal_of(7, Rule(1000, "x"), cost(3), others, LIMITS) is None
    refusal = refusal_of(7, Rule(1000, "x"), cost(4), others, LIMITS)
    assert refusal is not None
    assert refusal.metadata == {"cost_us": "31.0", "limit_us": "30.0"}
    # Later events do not evaluate a FROZEN condition, and evaluate a condition that two segments share only once.
    assert refusal_of(7, Rule(1000, "x", Policy.FROZEN), cost(4), others, LIMITS) is None
    assert refusal_of(7, Rule(1000, "c2"), cost(9), others, LIMITS) is None


def test_a_rule_that_costs_no_more_is_never_refused() -> None:
    over = [live(1, "dear", cost(50)), live(2, "cheap", cost(5))]
    assert refusal_of(1, Rule(0, "dear"), cost(50), over, LIMITS) is None
    assert refusal_of(1, Rule(1000, "other"), cost(9), over, LIMITS) is None
    assert refusal_of(2, Rule(1000, "cheaper"), cost(4), over, LIMITS) is None
    assert refusal_of(2, Rule(1000, "dearer"), cost(6), over, LIMITS) is not None


@given(st.floats(0, 1e6), st.sets(st.sampled_from("abc")))
def test_costs_are_kept_as_they_are(number: float, names: set[str]) -> None:
    kept = ConditionCost(round(number, 3), 1.5, 0.25, frozenset(names))
    assert ConditionCost.from_json(json.loads(json.dumps(kept.to_json()))) == kept


@pytest.mark.parametrize(
    ("condition", "expected"),
    [
        ("user.a == 1", ["user.a == 1"]),
        ("has(user.a) && (user.b || !(user.c && user.d))", ["has(user.a)", "user.b", "user.c", "user.d", "!true"]),
        ("(user.a || user.b) == user.c", ["user.a", "user.b", "true == user.c"]),
        ("[user.a && user.b] == [user.c]", ["user.a", "user.b", "[true] == [user.c]"]),
    ],
)
def test_a_condition_taken_apart(condition: str, expected: list[str]) -> None:
    assert list(map(render, steps(parse_condition(condition).root))) == expected


@given(nodes)
def test_the_parts_have_all_attributes_and_decide_nothing_early(node: tree.Node) -> None:
    parts = steps(node)
    text = " ".join(map(render, parts))
    assert frozenset().union(*map(attributes_of, parts)) == attributes_of(node)
    assert "&&" not in text.replace('"', "")
    assert "||" not in text.replace('"', "")


@pytest.mark.parametrize("names", [1, 2, 30, 64, 150])
def test_made_up_users_are_such_as_there_can_be(names: int) -> None:
    parts = [parse_condition(f"user.attribute_{n} == 'a' || 1 in user.tags").root for n in range(names)]
    for user in made_up(parts):
        assert len(user) == min(ATTRIBUTES_MAX, names + 1)
        assert len(json.dumps(user, separators=(",", ":"))) <= ATTRIBUTES_BYTES_MAX
