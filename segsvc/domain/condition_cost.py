"""What conditions cost per user, and the limits that keep one rule from slowing down the events of all users."""

from __future__ import annotations

from collections.abc import Iterable, Mapping
from dataclasses import dataclass
from typing import Any

from segsvc.domain.errors import ServiceError, condition_too_costly
from segsvc.domain.segment import Policy, Rule


@dataclass(frozen=True, slots=True)
class ConditionCost:
    """Worst-case cost of a condition in the database, per user; all in microseconds.

    Attributes:
        rollout_us: to evaluate it alone, in a rollout or a preview.
        batch_us: to evaluate it for a batch of events beside other conditions, after its attributes were looked up.
        lookup_us: to look up one attribute for a batch, for any number of conditions that read it.
        attributes: names of the attributes that it reads.
    """

    rollout_us: float
    batch_us: float
    lookup_us: float
    attributes: frozenset[str]

    @property
    def alone_us(self) -> float:
        """Cost of the condition if it is the only one."""
        return max(self.rollout_us, self.batch_us + self.lookup_us * len(self.attributes))

    def to_json(self) -> dict[str, Any]:
        return {
            "rollout_us": round(self.rollout_us, 3),
            "batch_us": round(self.batch_us, 3),
            "lookup_us": round(self.lookup_us, 3),
            "attributes": sorted(self.attributes),
        }

    @classmethod
    def from_json(cls, value: Mapping[str, Any]) -> ConditionCost:
        return cls(value["rollout_us"], value["batch_us"], value["lookup_us"], frozenset(value["attributes"]))


@dataclass(frozen=True, slots=True)
class CostLimits:
    """Limits for one condition (``SEGSVC_CONDITION_COST_MAX_US``) and for the conditions of all live rules together
    (``SEGSVC_CONDITIONS_COST_MAX_US``)."""

    condition_us: float
    conditions_us: float


@dataclass(frozen=True, slots=True)
class RuleInForce:
    """A segment's rule that has a condition.

    Attributes:
        cost: None: a release that did not measure costs accepted the rule, and upkeep has not measured it yet.
    """

    segment_id: int
    condition: str
    policy: Policy
    cost: ConditionCost | None


def total_us(rules: Iterable[RuleInForce]) -> float:
    """Cost of all conditions together for one user who arrives or changes; each condition and attribute counts once.

    FROZEN rules cost nothing: they are not evaluated for users who arrive or change later. A rule that was not measured
    counts as 0.
    """
    conditions: dict[str, ConditionCost] = {
        rule.condition: rule.cost for rule in rules if rule.policy is Policy.LIVE and rule.cost is not None
    }

    lookups: dict[str, float] = {}
    for cost in conditions.values():
        for name in cost.attributes:
            lookups[name] = max(lookups.get(name, 0.0), cost.lookup_us)

    return sum(cost.batch_us for cost in conditions.values()) + sum(lookups.values())


def refusal_of(
    segment_id: int, rule: Rule, cost: ConditionCost, in_force: Iterable[RuleInForce], limits: CostLimits
) -> ServiceError | None:
    """The refusal of a rule whose condition costs too much to be put in force; None: it does not cost too much.

    A change that raises no cost is never refused: an expensive rule of an earlier release can be rolled out to fewer
    users, and a rule can be replaced by a cheaper one while all rules together exceed the limit.

    Returns:
        CONDITION_TOO_COSTLY.
    """
    before = list(in_force)
    replaced = next((other for other in before if other.segment_id == segment_id), None)

    is_new = replaced is None or replaced.condition != rule.condition
    if is_new and cost.alone_us > limits.condition_us:
        return condition_too_costly("it costs", cost.alone_us, limits.condition_us, "SEGSVC_CONDITION_COST_MAX_US")

    after = [other for other in before if other is not replaced]
    after.append(RuleInForce(segment_id, rule.condition, rule.policy, cost))
    together_us = total_us(after)
    if together_us > limits.conditions_us and together_us > total_us(before):
        what = "with those of all other live rules it costs"
        return condition_too_costly(what, together_us, limits.conditions_us, "SEGSVC_CONDITIONS_COST_MAX_US")

    return None
