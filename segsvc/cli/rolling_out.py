"""The rule that a command asks for, compared with the rule in force, and a preview of its rollout."""

from __future__ import annotations

import json
from collections.abc import Iterator, Mapping, Sequence
from dataclasses import dataclass
from typing import Final

import typer
from segmentation.v1 import segments_pb2

from segsvc.cli.base import complain, plain
from segsvc.cli.front import Front

SIMILAR_KEY: Final = "segsvc-similar-attributes"
WARNINGS_KEY: Final = "segsvc-condition-warnings"
_NOTES: Final = (SIMILAR_KEY, WARNINGS_KEY)
"""Trailing metadata of a preview: JSON, for each unknown attribute the names of similar attributes."""
NOT_ROLLED_OUT: Final = "not rolled out"


@dataclass(frozen=True, slots=True)
class RuleOptions:
    """The options of a command that describe a rule. What is None stays as it is in the rule in force.

    Attributes:
        everyone: drop the condition.
        frozen: users who come or change later are left as they are.
    """

    percent: float
    condition: str | None
    everyone: bool
    frozen: bool | None

    def check(self) -> None:
        """Raises typer.BadParameter: the options contradict each other."""
        if self.everyone and self.condition:
            raise typer.BadParameter("--everyone drops the condition; leave --condition out")

    def rule_after(self, now: segments_pb2.Segment) -> segments_pb2.RollOutRule:
        """The rule that replaces the segment's rule."""
        condition = "" if self.everyone else self.condition
        frozen = now.rule.policy == segments_pb2.RollOutRule.FROZEN if self.frozen is None else self.frozen
        return segments_pb2.RollOutRule(
            percent=self.percent,
            condition=now.rule.condition if condition is None else condition,
            policy=segments_pb2.RollOutRule.FROZEN if frozen else segments_pb2.RollOutRule.LIVE,
        )


def rule_text(segment: segments_pb2.Segment) -> str:
    """A segment's rule in one line."""
    return rule_line(segment.rule) if segment.HasField("rule") else NOT_ROLLED_OUT


def rule_line(rule: segments_pb2.RollOutRule) -> str:
    """A rule in one line."""
    condition = f" if {plain(rule.condition)}" if rule.condition else ""
    frozen = ", frozen" if rule.policy == segments_pb2.RollOutRule.FROZEN else ""
    return f"{rule.percent:g} %{condition}{frozen}"


@dataclass(frozen=True, slots=True)
class RolloutPreview:
    """What a rollout would do.

    Attributes:
        segment: as it is now. A rollout with its etag is refused if the segment has changed since this preview.
        rule: the rule to put in force.
        similar: for each attribute that no user has, the names of similar attributes.
        traps: what the condition most probably does not mean.
    """

    segment: segments_pb2.Segment
    rule: segments_pb2.RollOutRule
    counts: segments_pb2.PreviewRollOutResponse
    similar: Mapping[str, Sequence[str]]
    traps: Sequence[str]

    def show(self) -> None:
        """Print on standard error the old rule, the new rule, and how many users would come and go."""
        complain(f"{self.segment.slug}: {rule_text(self.segment)}  →  {rule_line(self.rule)}")
        complain(
            f"{self.counts.added_count:,} would come, {self.counts.removed_count:,} would go, "
            f"{self.counts.member_count:,} members then"
        )
        for warning in self.warnings():
            complain(warning)

    def warnings(self) -> Iterator[str]:
        """A warning for each attribute that no user has, and for each trap in the condition."""
        for name in self.counts.unknown_attributes:
            similar = " or ".join(f"user.{plain(other)}" for other in self.similar.get(name, ()))
            yield f"warning: no user has user.{plain(name)}" + (f"; did you mean {similar}?" if similar else "")
        for trap in self.traps:
            yield f"warning: {plain(trap)}"


def fetch_preview(front: Front, slug: str, options: RuleOptions) -> RolloutPreview:
    """Ask the front what a rollout would do now. Raises grpc.RpcError."""
    segment = front.segments.GetSegment(segments_pb2.GetSegmentRequest(slug=slug), timeout=front.timeout_s)
    rule = options.rule_after(segment)
    request = segments_pb2.PreviewRollOutRequest(slug=slug, rule=rule)
    counts, call = front.segments.PreviewRollOut.with_call(request, timeout=front.timeout_s)
    notes = {key: json.loads(value) for key, value in call.trailing_metadata() or () if key in _NOTES}
    # A front of another release does not send them.
    return RolloutPreview(segment, rule, counts, notes.get(SIMILAR_KEY, {}), notes.get(WARNINGS_KEY, ()))
