"""Periodic upkeep: counts members for lists, measures conditions, and deletes what is old."""

from __future__ import annotations

from collections.abc import Callable, Mapping, Sequence
from datetime import datetime
from functools import partial
from math import ceil
from typing import Protocol

from segsvc.domain.condition_cost import ConditionCost
from segsvc.domain.errors import LockTimeout, ServiceError
from segsvc.log import get_logger

log = get_logger(__name__)

CONDITIONS_AT_ONCE = 20
"""The most conditions that one round measures: the round has other work too."""

CHANGE_MAX_S = 600
"""Several times what a change of users can take from the moment that it is noted to its COMMIT."""


class MaintainedShards(Protocol):
    """Both raise SHARD_UNAVAILABLE, LockTimeout (a migration holds a table)."""

    def member_counts(self, shard: int) -> Mapping[int, int]:
        """Members of each segment on this shard by segment id, overrides included."""

    def forget(
        self, shard: int, *, request_ttl_s: int, tombstone_ttl_s: int, fence_ttl_s: int, note_ttl_s: int
    ) -> None:
        """Delete tombstones, fences, overrides and answers kept for request ids whose time is over; and notes of who
        changed that are older than this, or that no operation can ask for any more."""


class MaintainedCatalog(Protocol):
    """All raise CATALOG_UNAVAILABLE."""

    def now(self) -> datetime: ...

    def put_member_counts(self, counts: Mapping[int, int], counted_after: datetime) -> None:
        """Store the counts of segments that have no newer count, and that no operation has changed since
        ``counted_after``; a segment whose row is locked is left out."""

    def forget(self, *, request_ttl_s: int) -> None:
        """Delete answers kept for request ids whose time is over."""

    def unmeasured_conditions(self, limit: int) -> Sequence[str]:
        """Conditions of live rules whose cost is not known; each once, at most ``limit``."""

    def put_cost(self, condition: str, cost: ConditionCost) -> None:
        """Store a condition's cost with the rules that have this condition and no cost yet."""


class Costs(Protocol):
    """See ``rule_costs.RuleCosts``."""

    def measured(self, condition: str, *, timeout_s: float | None) -> ConditionCost: ...


class MaintenanceService:
    """Upkeep of one installation.

    Args:
        entries_gone_after_s: how long the cache can hold an entry that was read before a change.
    """

    def __init__(
        self,
        *,
        catalog: MaintainedCatalog,
        shards: MaintainedShards,
        costs: Costs,
        shard_numbers: Sequence[int],
        request_id_ttl_s: int,
        tombstone_ttl_s: int,
        fence_ttl_s: int,
        entries_gone_after_s: float,
        operation_deadline_s: float,
    ) -> None:
        self._catalog = catalog
        self._shards = shards
        self._costs = costs
        self._shard_numbers = shard_numbers
        self._request_id_ttl_s = request_id_ttl_s
        self._tombstone_ttl_s = tombstone_ttl_s
        self._fence_ttl_s = fence_ttl_s
        # Who changed is asked for by two readers. A patch of the cache needs it as long as an entry can live that is
        # older than the change. A rollout needs what was noted since it evaluated its condition; it can be decided
        # only before its deadline.
        self._note_ttl_s = ceil(max(entries_gone_after_s, operation_deadline_s)) + CHANGE_MAX_S

    def run(self) -> None:
        """Do one round of upkeep. A step that fails is left to the next round, and does not stop the other steps."""
        self._try("counting members", self._count_members)
        self._try("measuring conditions", self._measure_conditions)
        self._try("forgetting in the catalog", lambda: self._catalog.forget(request_ttl_s=self._request_id_ttl_s))
        for shard in self._shard_numbers:
            self._try(f"forgetting on shard {shard}", partial(self._forget, shard))

    def _try(self, what: str, step: Callable[[], None]) -> None:
        try:
            step()
        except (ServiceError, LockTimeout) as error:
            reason = error.reason.text if isinstance(error, ServiceError) else "LOCK_TIMEOUT"
            log.warning("maintenance_incomplete", what=what, reason=reason)

    def _count_members(self) -> None:
        # The time is taken before the first shard is read: all that an operation has done since then is newer.
        counted_after = self._catalog.now()

        totals: dict[int, int] = {}
        for shard in self._shard_numbers:
            for segment_id, count in self._shards.member_counts(shard).items():
                totals[segment_id] = totals.get(segment_id, 0) + count
        self._catalog.put_member_counts(totals, counted_after)

    def _measure_conditions(self) -> None:
        """Measure rules that an earlier release accepted without measuring: without a cost they count as free."""
        for condition in self._catalog.unmeasured_conditions(CONDITIONS_AT_ONCE):
            self._catalog.put_cost(condition, self._costs.measured(condition, timeout_s=None))

    def _forget(self, shard: int) -> None:
        self._shards.forget(
            shard,
            request_ttl_s=self._request_id_ttl_s,
            tombstone_ttl_s=self._tombstone_ttl_s,
            fence_ttl_s=self._fence_ttl_s,
            note_ttl_s=self._note_ttl_s,
        )
