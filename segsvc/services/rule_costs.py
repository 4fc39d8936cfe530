"""Measures what a rule's condition costs before the rule is accepted, and refuses a rule beyond the bounds.

Every live rule's condition is evaluated for every user who is created or changes, in the one transaction in which their
shard applies events. So each rule slows the events of all users.
"""

from __future__ import annotations

import random
import threading
import time
from collections import OrderedDict
from collections.abc import Sequence
from typing import Final, Protocol

from segsvc.domain.condition_cost import ConditionCost, CostLimits, RuleInForce, refusal_of
from segsvc.domain.errors import Reason, ServiceError
from segsvc.domain.segment import Rule

MEASURED_KEPT: Final = 256
"""Costs that a process remembers, so that a preview and the rollout after it measure only once."""
MEASURED_KEPT_S: Final = 600.0


class Meter(Protocol):
    """The shards, as far as measuring needs them."""

    def measure(self, condition: str, shard: int, *, enough_us: float, timeout_s: float | None) -> ConditionCost:
        """What a condition costs for one user of a shard.

        Args:
            enough_us: a cost beyond this is measured several times before it is believed.

        Raises:
            ServiceError: SHARD_UNAVAILABLE, DEADLINE_EXCEEDED, OVERLOADED.
        """


class RulesInForce(Protocol):
    """The catalog, as far as measuring needs it. Raises CATALOG_UNAVAILABLE, DEADLINE_EXCEEDED."""

    def rules_in_force(self, *, timeout_s: float | None) -> Sequence[RuleInForce]:
        """Every rule in force that has a condition."""


class RuleCosts:
    def __init__(self, meter: Meter, catalog: RulesInForce, shards: Sequence[int], limits: CostLimits) -> None:
        self._meter = meter
        self._catalog = catalog
        self._shards = shards
        self._limits = limits
        self._lock = threading.Lock()
        self._measured: OrderedDict[str, tuple[float, ConditionCost]] = OrderedDict()

    def check(self, segment_id: int, rule: Rule, *, timeout_s: float | None) -> ConditionCost | None:
        """What the rule's condition costs; None: it has none.

        Args:
            segment_id: of the segment that is to get the rule.

        Raises:
            ServiceError: CONDITION_TOO_COSTLY, alone or with all other live rules; CATALOG_UNAVAILABLE;
                SHARD_UNAVAILABLE (no shard can be asked), DEADLINE_EXCEEDED, OVERLOADED.
        """
        if not rule.condition:
            return None

        in_force = self._catalog.rules_in_force(timeout_s=timeout_s)
        # A condition of a live rule was measured when that rule was accepted: rolling it out to more users does not
        # measure it again.
        cost = next((other.cost for other in in_force if other.condition == rule.condition and other.cost), None)
        if cost is None:
            cost = self.measured(rule.condition, timeout_s=timeout_s)

        refusal = refusal_of(segment_id, rule, cost, in_force, self._limits)
        if refusal is not None:
            raise refusal
        return cost

    def measured(self, condition: str, *, timeout_s: float | None) -> ConditionCost:
        """What a condition costs, on one shard that can be asked. Raises as ``check``, except CONDITION_TOO_COSTLY."""
        now = time.monotonic()
        with self._lock:
            known = self._measured.get(condition)
        if known is not None and now - known[0] < MEASURED_KEPT_S:
            return known[1]

        cost = self._measure(condition, None if timeout_s is None else now + timeout_s)
        with self._lock:
            self._measured[condition] = now, cost
            self._measured.move_to_end(condition)
            while len(self._measured) > MEASURED_KEPT:
                self._measured.popitem(last=False)
        return cost

    def _measure(self, condition: str, until: float | None) -> ConditionCost:
        # Any shard will do, because its users are a sample of all users. A shard that is down is passed over.
        shards = random.sample(self._shards, len(self._shards))
        for number, shard in enumerate(shards, start=1):
            left_s = None if until is None else until - time.monotonic()
            if left_s is not None and left_s <= 0:
                raise ServiceError(Reason.DEADLINE_EXCEEDED, "the condition's cost was not measured in time")
            try:
                return self._meter.measure(condition, shard, enough_us=self._limits.condition_us, timeout_s=left_s)
            except ServiceError as error:
                if error.reason is not Reason.SHARD_UNAVAILABLE or number == len(shards):
                    raise
        raise AssertionError("an installation has shards")
