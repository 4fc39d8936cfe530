"""Why a user is in a segment or not: all facts that it depends on, from one moment, and the one that decided."""

from __future__ import annotations

from dataclasses import dataclass
from enum import IntEnum
from typing import Protocol

from segsvc.conditions import parse_condition
from segsvc.domain.bucketing import bucket
from segsvc.domain.errors import segment_not_found, user_not_found
from segsvc.domain.override import Effect, MembershipFacts, Override
from segsvc.domain.segment import Policy, Rule, check_slug
from segsvc.domain.sharding import check_user_id


class Decision(IntEnum):
    """The fact that decided; numbers as in the protos."""

    INCLUDED_BY_OVERRIDE = 1
    EXCLUDED_BY_OVERRIDE = 2
    IN_ROLL_OUT = 3
    OUTSIDE_PERCENTAGE = 4
    CONDITION_NOT_MET = 5
    NO_RULE = 6
    NOT_IN_FROZEN_ROLL_OUT = 7


@dataclass(frozen=True, slots=True)
class Explanation:
    """One membership and its reason.

    Attributes:
        bucket: 0 … 99,999.
        rule: None: the segment was never rolled out.
        override: None: no override is in force.
        text: for people.
    """

    member: bool
    decision: Decision
    bucket: int
    rule: Rule | None
    override: Override | None
    text: str


class FactReader(Protocol):
    """The shards, as far as explaining one membership needs them."""

    def facts(self, user_id: int, slug: str, *, timeout_s: float | None) -> tuple[bool, MembershipFacts | None]:
        """(whether the user exists, what the membership depends on; None without the segment), in one snapshot.

        Raises SHARD_UNAVAILABLE, DEADLINE_EXCEEDED.
        """


class ExplainService:
    def __init__(self, reader: FactReader) -> None:
        self._reader = reader

    def explain(self, user_id: int, slug: str, *, timeout_s: float | None = None) -> Explanation:
        """Why the user is in the segment or not. ``member`` is what every read answers.

        Raises:
            ServiceError: FIELD_REQUIRED, FIELD_INVALID, USER_NOT_FOUND, SEGMENT_NOT_FOUND, SHARD_UNAVAILABLE,
                DEADLINE_EXCEEDED.
        """
        check_user_id(user_id)
        check_slug(slug)

        exists, facts = self._reader.facts(user_id, slug, timeout_s=timeout_s)
        if not exists:
            raise user_not_found(user_id)
        if facts is None:
            raise segment_not_found(slug)

        where = bucket(user_id, facts.segment.salt)
        decision, text = _decide(facts, where)
        member = decision in (Decision.INCLUDED_BY_OVERRIDE, Decision.IN_ROLL_OUT)
        return Explanation(member, decision, where, facts.segment.rule, facts.override, text)


def _decide(facts: MembershipFacts, where: int) -> tuple[Decision, str]:
    override, rule = facts.override, facts.segment.rule
    if override is not None:
        until = f"until {override.expire_time.isoformat()}" if override.expire_time else "for ever"
        if override.effect is Effect.INCLUDE:
            return Decision.INCLUDED_BY_OVERRIDE, f"put in by hand, {until}"
        return Decision.EXCLUDED_BY_OVERRIDE, f"kept out by hand, {until}"

    if rule is None:
        return Decision.NO_RULE, "the segment was never rolled out"

    frozen = rule.policy is Policy.FROZEN
    if frozen and facts.bit:
        return Decision.IN_ROLL_OUT, "the frozen rollout found the user in"

    condition = parse_condition(rule.condition) if rule.condition else None
    if condition is not None and not condition.holds(facts.attributes):
        return Decision.CONDITION_NOT_MET, condition.explain(facts.attributes)

    if where >= rule.threshold:
        return Decision.OUTSIDE_PERCENTAGE, f"bucket {where} is not below {rule.threshold} ({rule.percent:g} %)"
    if frozen:
        text = f"bucket {where} is below {rule.threshold} ({rule.percent:g} %), but not at the frozen rollout"
        return Decision.NOT_IN_FROZEN_ROLL_OUT, text

    met = " and the condition holds" if condition is not None else ""
    return Decision.IN_ROLL_OUT, f"bucket {where} is below {rule.threshold} ({rule.percent:g} %){met}"
