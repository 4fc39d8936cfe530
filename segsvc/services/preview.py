"""What a roll-out would do now: the same work on a snapshot of every shard, counted and not written."""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from contextlib import AbstractContextManager
from dataclasses import dataclass
from difflib import get_close_matches
from typing import Protocol

from segsvc.conditions import parse_condition
from segsvc.conditions.traps import warnings
from segsvc.domain.errors import segment_deleting
from segsvc.domain.operation import OperationKind, OperationPlan, ShardCounts, unknown_attributes
from segsvc.domain.segment import Rule, SegmentState
from segsvc.fan_out import ThreadFanOut
from segsvc.services.rule_costs import RuleCosts
from segsvc.services.segments import SegmentService
from segsvc.services.shard_work import ShardTransaction, count_roll_out
from segsvc.services.statistics import require_same


class ShardSnapshot(ShardTransaction, Protocol):
    """A shard as it is at one moment, to count on."""

    def attribute_names(self) -> Sequence[str]:
        """Names of attributes that users have, taken from some of the users."""


@dataclass(frozen=True, slots=True)
class Preview:
    """What a roll-out would change.

    Attributes:
        counts: by shard.
        unknown: attributes that the condition names and no user has; for each, similar names that users do have, the
            most similar first.
        warnings: sentences about what the condition most probably does not mean.
    """

    counts: Sequence[ShardCounts]
    unknown: Mapping[str, Sequence[str]]
    warnings: Sequence[str]


class ShardSnapshots(Protocol):
    """The shards, each to be read as it is at one moment."""

    @property
    def shard_count(self) -> int: ...

    def snapshot(self, shard: int, *, timeout_s: float | None) -> AbstractContextManager[ShardSnapshot]:
        """Read-only, and without a lock that other transactions wait for. Raises SHARD_UNAVAILABLE,
        DEADLINE_EXCEEDED."""


class PreviewService:
    """Previews roll-outs.

    Args:
        costs: refuses a rule that no rollout would be accepted with, before anything is counted.
        fan_out: visits the shards; its threads bound how many are visited at once.
    """

    def __init__(
        self, segments: SegmentService, shards: ShardSnapshots, costs: RuleCosts, fan_out: ThreadFanOut
    ) -> None:
        self._segments = segments
        self._costs = costs
        self._shards = shards
        self._fan_out = fan_out

    def count(self, slug: str, rule: Rule, *, timeout_s: float | None = None) -> Preview:
        """What putting the rule in force would change; changes nothing.

        Raises:
            ServiceError: SEGMENT_NOT_FOUND, SEGMENT_DELETING, CONDITION_INVALID, CONDITION_TOO_COSTLY, FIELD_REQUIRED,
                FIELD_INVALID, CATALOG_UNAVAILABLE, SHARD_UNAVAILABLE (a part of the counts would be a wrong answer),
                DEADLINE_EXCEEDED.
        """
        traps = warnings(parse_condition(rule.condition).root) if rule.condition else ()

        segment = self._segments.get(slug, timeout_s=timeout_s)
        if segment.state is SegmentState.DELETING:
            raise segment_deleting(slug)
        self._costs.check(segment.id, rule, timeout_s=timeout_s)
        plan = OperationPlan(OperationKind.ROLL_OUT, slug, segment.id, segment.uid, segment.salt, rule)

        def visit(shard: int) -> tuple[ShardCounts, bool, Sequence[str]]:
            with self._shards.snapshot(shard, timeout_s=timeout_s) as snapshot:
                counts = count_roll_out(snapshot, plan)
                # Names to suggest instead of an absent attribute. It is unknown only if every other shard lacks it too.
                names = snapshot.attribute_names() if counts.absent_attributes else ()
                return counts, snapshot.segment(segment.id) is not None, names

        visits = self._fan_out(visit, range(self._shards.shard_count))
        if not all(known for _, known, _ in visits):
            require_same(self._segments, segment, timeout_s)

        counts = [counts for counts, _, _ in visits]
        names = sorted({name for _, _, names in visits for name in names})
        return Preview(counts, {name: _nearest(name, names) for name in unknown_attributes(counts)}, traps)


def _nearest(name: str, names: Sequence[str]) -> list[str]:
    """Names that are similar to this one, the most similar first; upper and lower case count as the same."""
    by_lower = {other.lower(): other for other in reversed(names)}
    return [by_lower[found] for found in get_close_matches(name.lower(), by_lower, n=3)]
