"""What conditions cost a user, and the bounds that keep one rule from slowing everybody's events down."""

from __future__ import annotations

from collections.abc import Iterable, Mapping
from dataclasses import dataclass
from typing import Any

from segsvc.domain.errors import ServiceError, condition_too_costly
from segsvc.domain.segment import Policy, Rule


@dataclass(frozen=True, slots=True)
class ConditionCost:
    """What a condition costs the database a user, at worst; all in microseconds.

    Attributes:
        rollout_us: asked alone, by a rollout or a preview.
        batch_us: asked of a batch of events beside other conditions, once its attributes have been looked up.
        lookup_us: to look one attribute up for a batch, whatever the number of conditions that read it.
        attributes: names of those that it reads.
    """

    rollout_us: float
    batch_us: float
    lookup_us: float
    attributes: frozenset[str]

    @property
    def alone_us(self) -> float:
        """The condition's cost when there is no other."""
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
    """Bounds of ``SEGSVC_CONDITION_COST_MAX_US`` (of one condition) and ``SEGSVC_CONDITIONS_COST_MAX_US`` (of all that
    live rules have)."""

    condition_us: float
    conditions_us: float


@dataclass(frozen=True, slots=True)
class RuleInForce:
    """A segment's rule that has a condition.

    Attributes:
        cost: None: the rule is of a release that did not measure, and upkeep has not done so yet.
    """

    segment_id: int
    condition: str
    policy: Policy
    cost: ConditionCost | None


def total_us(rules: Iterable[RuleInForce]) -> float:
    """What all conditions together cost a user who comes or changes: each once, and each attribute once.

    FROZEN rules cost nothing, for nobody who comes later is asked. What is not measured counts as nothing.
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
    """Why a rule with a condition costs too much to be put in force; None: it does not.

    What does not make anything dearer is never refused: an expensive rule of an earlier release can be rolled out to
    fewer users, and a rule can be replaced by a cheaper one while all together are beyond the bound.

    Returns:
        CONDITION_TOO_COSTLY.
    """
    now = list(in_force)
    mine = next((other for other in now if other.segment_id == segment_id), None)
    is_new = mine is None or mine.condition != rule.condition
    if is_new and cost.alone_us > limits.condition_us:
        return condition_too_costly("it costs", cost.alone_us, limits.condition_us, "SEGSVC_CONDITION_COST_MAX_US")
    then = [other for other in now if other is not mine]
    then.append(RuleInForce(segment_id, rule.condition, rule.policy, cost))
    together_us = total_us(then)
    if together_us > limits.conditions_us and together_us > total_us(now):
        what = "with those of all other live rules it costs"
        return condition_too_costly(what, together_us, limits.conditions_us, "SEGSVC_CONDITIONS_COST_MAX_US")
    return None
