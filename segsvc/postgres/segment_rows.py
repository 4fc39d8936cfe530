"""Rows of ``segments``, the catalog's and the shards', as values; and a segment as JSON, where a past state is kept."""

from __future__ import annotations

from datetime import datetime
from functools import lru_cache
from typing import Any
from uuid import UUID

import sqlalchemy as sa

from segsvc.domain.condition_cost import ConditionCost, RuleInForce
from segsvc.domain.segment import SEGMENTS_MAX, Policy, Rule, Segment, SegmentState, ShardSegment
from segsvc.postgres import tables

COLUMNS = (
    tables.segments.c.id,
    tables.segments.c.slug,
    tables.segments.c.uid,
    tables.segments.c.salt,
    tables.segments.c.display_name,
    tables.segments.c.description,
    tables.segments.c.labels,
    tables.segments.c.rule_threshold,
    tables.segments.c.rule_condition,
    tables.segments.c.rule_policy,
    tables.segments.c.state,
    tables.segments.c.etag,
    tables.segments.c.create_time,
    tables.segments.c.update_time,
    tables.segments.c.member_count,
    tables.segments.c.member_count_time,
    tables.segments.c.last_operation,
)
"""What ``to_segment`` needs of a row."""


def to_segment(row: sa.Row[Any]) -> Segment:
    """A row of ``COLUMNS`` as a value."""
    return Segment(
        id=row.id,
        slug=row.slug,
        uid=row.uid,
        salt=tables.salt_from_db(row.salt),
        display_name=row.display_name,
        description=row.description,
        labels=row.labels,
        rule=None if row.rule_threshold is None else _rule(row.rule_threshold, row.rule_condition, row.rule_policy),
        state=SegmentState(row.state),
        etag=row.etag,
        create_time=row.create_time,
        update_time=row.update_time,
        member_count=row.member_count,
        member_count_time=row.member_count_time,
        last_operation=row.last_operation,
    )


IN_FORCE_COLUMNS = (
    tables.segments.c.id,
    tables.segments.c.rule_condition,
    tables.segments.c.rule_policy,
    tables.segments.c.rule_cost,
)
"""What ``to_rule_in_force`` needs of a row."""


def to_rule_in_force(row: sa.Row[Any]) -> RuleInForce:
    """A row of ``IN_FORCE_COLUMNS``, of a segment whose rule has a condition, as a value."""
    cost = None if row.rule_cost is None else ConditionCost.from_json(row.rule_cost)
    return RuleInForce(row.id, row.rule_condition, Policy(row.rule_policy), cost)


SHARD_COLUMNS = (
    tables.shard_segments.c.id,
    tables.shard_segments.c.slug,
    tables.shard_segments.c.salt,
    tables.shard_segments.c.rule_threshold,
    tables.shard_segments.c.rule_condition,
    tables.shard_segments.c.rule_policy,
    tables.shard_segments.c.rule_count,
    tables.shard_segments.c.frozen_slot,
)
"""What ``to_shard_segment`` needs of a shard's row, in its order."""


def to_shard_segment(
    segment_id: int,
    slug: str,
    salt: int,
    threshold: int | None,
    condition: str,
    policy: int,
    rule_count: int,
    frozen_slot: int | None,
) -> ShardSegment:
    """A row of ``SHARD_COLUMNS`` as a value."""
    rule = None if threshold is None else _rule(threshold, condition, policy)
    return ShardSegment(segment_id, slug, tables.salt_from_db(salt), rule, rule_count, frozen_slot)


@lru_cache(maxsize=SEGMENTS_MAX)  # each batch of events reads all rules, and they are nearly always the same
def _rule(threshold: int, condition: str, policy: int) -> Rule:
    return Rule(threshold, condition, Policy(policy))


def segment_to_json(segment: Segment) -> dict[str, Any]:
    """A segment as JSON, to keep its present state."""
    return {
        "id": segment.id,
        "slug": segment.slug,
        "uid": str(segment.uid),
        "salt": str(segment.salt),
        "display_name": segment.display_name,
        "description": segment.description,
        "labels": dict(segment.labels),
        "rule": segment.rule and segment.rule.to_json(),
        "state": segment.state.name,
        "etag": segment.etag,
        "create_time": segment.create_time.isoformat(),
        "update_time": segment.update_time.isoformat(),
        "member_count": segment.member_count,
        "member_count_time": segment.member_count_time and segment.member_count_time.isoformat(),
        "last_operation": segment.last_operation and str(segment.last_operation),
    }


def segment_from_json(value: dict[str, Any]) -> Segment:
    """The segment that ``segment_to_json`` wrote."""
    rule = value["rule"]
    counted = value["member_count_time"]

    return Segment(
        id=value["id"],
        slug=value["slug"],
        uid=UUID(value["uid"]),
        salt=int(value["salt"]),
        display_name=value["display_name"],
        description=value["description"],
        labels=value["labels"],
        rule=Rule.from_json(rule) if rule else None,
        state=SegmentState[value["state"]],
        etag=value["etag"],
        create_time=datetime.fromisoformat(value["create_time"]),
        update_time=datetime.fromisoformat(value["update_time"]),
        member_count=value["member_count"],
        member_count_time=datetime.fromisoformat(counted) if counted else None,
        last_operation=UUID(value["last_operation"]) if value["last_operation"] else None,
    )
