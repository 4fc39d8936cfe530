"""The rule that a command asks for, beside the one in force, and what would come of it."""

from __future__ import annotations

import json
from collections.abc import Iterator, Mapping, Sequence
from dataclasses import dataclass
from typing import Any, Final

import typer
from segmentation.v1 import segments_pb2

from segsvc.cli.base import complain, plain
from segsvc.cli.front import Front

SIMILAR_KEY: Final = "segsvc-similar-attributes"
"""Trailing metadata of a preview: JSON, for each unknown attribute the names of attributes that look like it."""
NOT_ROLLED_OUT: Final = "not rolled out"


@dataclass(frozen=True, slots=True)
class Wish:
    """What a command says of the rule; what is None stays as it is in force.

    Attributes:
        everyone: the condition is dropped.
        frozen: users who come or change later are left as they are.
    """

    percent: float
    condition: str | None
    everyone: bool
    frozen: bool | None

    def check(self) -> None:
        """Raises typer.BadParameter: it contradicts itself."""
        if self.everyone and self.condition:
            raise typer.BadParameter("--everyone drops the condition; leave --condition out")

    def rule_after(self, now: segments_pb2.Segment) -> segments_pb2.RollOutRule:
        """The rule to put in force in place of the segment's."""
        condition = "" if self.everyone else self.condition
        frozen = now.rule.policy == segments_pb2.RollOutRule.FROZEN if self.frozen is None else self.frozen
        return segments_pb2.RollOutRule(
            percent=self.percent,
            condition=now.rule.condition if condition is None else condition,
            policy=segments_pb2.RollOutRule.FROZEN if frozen else segments_pb2.RollOutRule.LIVE,
        )


def rule_text(segment: segments_pb2.Segment) -> str:
    """A segment's rule in one line."""
    return one_line(segment.rule) if segment.HasField("rule") else NOT_ROLLED_OUT


def one_line(rule: segments_pb2.RollOutRule) -> str:
    condition = f" if {plain(rule.condition)}" if rule.condition else ""
    frozen = ", frozen" if rule.policy == segments_pb2.RollOutRule.FROZEN else ""
    return f"{rule.percent:g} %{condition}{frozen}"


@dataclass(frozen=True, slots=True)
class Foreseen:
    """What a rollout would do.

    Attributes:
        segment: as it is now; its etag guards what was foreseen.
        rule: to be put in force.
        similar: for an attribute that no user has, names that look like it.
    """

    segment: segments_pb2.Segment
    rule: segments_pb2.RollOutRule
    counts: segments_pb2.PreviewRollOutResponse
    similar: Mapping[str, Sequence[str]]

    def tell(self) -> None:
        """Say it on standard error: the old rule, the new one, and who would come and go."""
        complain(f"{self.segment.slug}: {rule_text(self.segment)}  →  {one_line(self.rule)}")
        complain(
            f"{self.counts.added_count:,} would come, {self.counts.removed_count:,} would go, "
            f"{self.counts.member_count:,} members then"
        )
        for warning in self.warnings():
            complain(warning)

    def warnings(self) -> Iterator[str]:
        """Attributes that no user has."""
        for name in self.counts.unknown_attributes:
            similar = " or ".join(f"user.{plain(other)}" for other in self.similar.get(name, ()))
            yield f"warning: no user has user.{plain(name)}" + (f"; did you mean {similar}?" if similar else "")


def foresee(front: Front, slug: str, wish: Wish) -> Foreseen:
    """Ask the front what a rollout would do now. Raises grpc.RpcError."""
    segment = front.segments.GetSegment(segments_pb2.GetSegmentRequest(slug=slug), timeout=front.timeout_s)
    rule = wish.rule_after(segment)
    request = segments_pb2.PreviewRollOutRequest(slug=slug, rule=rule)
    counts, call = front.segments.PreviewRollOut.with_call(request, timeout=front.timeout_s)
    return Foreseen(segment, rule, counts, _similar(call))


def _similar(call: Any) -> Mapping[str, Sequence[str]]:
    """Names that the preview of a newer or older front may leave out."""
    for key, value in call.trailing_metadata() or ():
        if key == SIMILAR_KEY:
            found: Mapping[str, Sequence[str]] = json.loads(value)
            return found
    return {}
