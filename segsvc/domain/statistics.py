"""The numbers of a segment, counted on the shards on request."""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass
from datetime import datetime

from segsvc.domain.segment import Segment


@dataclass(frozen=True, slots=True)
class ShardStatistics:
    """The counts of one shard, from one statement; all counts are users.

    Attributes:
        known: whether the shard has the segment; if not, its counts are 0.
        rule_count: members by the rule, without overrides.
        included_count: members by an unexpired override and not by the rule.
        excluded_count: members by the rule that an unexpired override keeps out.
        user_count: all users of the shard.
        read_time: by the shard's clock.
    """

    shard: int
    known: bool
    rule_count: int
    included_count: int
    excluded_count: int
    user_count: int
    read_time: datetime

    @property
    def member_count(self) -> int:
        return self.rule_count + self.included_count - self.excluded_count


@dataclass(frozen=True, slots=True)
class SegmentStatistics:
    """The sums over all shards. Each shard's counts are consistent; while an operation commits, some shards may be
    counted before the commit and some after it."""

    segment: Segment
    shards: Sequence[ShardStatistics]

    @property
    def rule_count(self) -> int:
        return sum(shard.rule_count for shard in self.shards)

    @property
    def included_count(self) -> int:
        return sum(shard.included_count for shard in self.shards)

    @property
    def excluded_count(self) -> int:
        return sum(shard.excluded_count for shard in self.shards)

    @property
    def member_count(self) -> int:
        return sum(shard.member_count for shard in self.shards)

    @property
    def user_count(self) -> int:
        return sum(shard.user_count for shard in self.shards)

    @property
    def member_share(self) -> float:
        """member_count / user_count, 0 to 1; 0 when there are no users."""
        return self.member_count / self.user_count if self.user_count else 0.0

    @property
    def read_time(self) -> datetime:
        """The earliest of the shards' times: no count is older."""
        return min(shard.read_time for shard in self.shards)


@dataclass(frozen=True, slots=True)
class MemberPage:
    """Some members of one shard, by slot.

    Attributes:
        known: whether the shard has the segment; if not, there are no members.
        last_slot: all slots up to this one were examined.
        exhausted: no members follow on this shard.
    """

    known: bool
    user_ids: Sequence[int]
    last_slot: int
    exhausted: bool
