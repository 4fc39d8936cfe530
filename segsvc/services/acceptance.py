"""Accepting operations: rollouts and deletions enter the queue, once per request; operations are cancelled.

Any process can accept an operation, a front or a worker: acceptance needs neither a watcher of ends nor threads.
"""

from __future__ import annotations

from typing import Protocol
from uuid import UUID, uuid4

from segsvc.conditions import parse_condition
from segsvc.domain.access import NOBODY
from segsvc.domain.condition_cost import ConditionCost
from segsvc.domain.errors import (
    Reason,
    ServiceError,
    etag_mismatch,
    invalid_field,
    operation_not_found,
    segment_deleting,
    segment_not_found,
)
from segsvc.domain.operation import (
    Accepted,
    Failure,
    Operation,
    OperationKind,
    OperationPlan,
    OperationState,
    RequestKey,
)
from segsvc.domain.segment import Rule, Segment, SegmentState
from segsvc.log import get_logger
from segsvc.twophase.protocol import Coordinator

log = get_logger(__name__)


class AcceptanceStore(Protocol):
    """The ledger, as far as acceptance needs it. All raise CATALOG_UNAVAILABLE in an outage."""

    def get(self, operation_id: UUID) -> Operation | None: ...

    def segment(self, slug: str) -> Segment | None: ...

    def accepted_before(self, method: str, request_id: UUID) -> tuple[UUID, bytes] | None: ...

    def insert(
        self,
        operation_id: UUID,
        plan: OperationPlan,
        request: tuple[str, UUID, bytes] | None,
        *,
        replace_queued: bool = False,
    ) -> Accepted: ...


class Broker(Protocol):
    """Celery's broker, as far as acceptance needs it."""

    def check(self) -> None:
        """Raises BROKER_UNAVAILABLE if messages cannot be sent now."""


class CostCheck(Protocol):
    """Bounds of what rules cost; see ``rule_costs.RuleCosts``."""

    def check(self, segment_id: int, rule: Rule, *, timeout_s: float | None) -> ConditionCost | None: ...


class Acceptance:
    """Accepts rollouts and deletions of segments, and cancels operations."""

    def __init__(self, *, store: AcceptanceStore, coordinator: Coordinator, broker: Broker, costs: CostCheck) -> None:
        self._store = store
        self._coordinator = coordinator
        self._broker = broker
        self._costs = costs

    def roll_out(
        self,
        slug: str,
        rule: Rule,
        *,
        etag: str,
        request: RequestKey | None,
        replace_queued: bool = False,
        actor: str = "",
        timeout_s: float | None = None,
    ) -> Operation:
        """Accept a rule for a segment and all its users; the operation is durable when this returns.

        Args:
            replace_queued: abort the rollouts of this segment that wait in the queue.
            actor: name of the principal that asks for it; empty: nobody has a name.
            timeout_s: how long to measure what the rule's condition costs, at most.

        Raises:
            ServiceError: CONDITION_INVALID, CONDITION_TOO_COSTLY, SHARD_UNAVAILABLE (no shard can be asked what the
                condition costs), DEADLINE_EXCEEDED (nothing was accepted), SEGMENT_NOT_FOUND, SEGMENT_DELETING,
                ETAG_MISMATCH, REQUEST_ID_REUSED, OVERLOADED (the queue is full), BROKER_UNAVAILABLE,
                CATALOG_UNAVAILABLE.
        """
        if rule.condition:
            parse_condition(rule.condition)
        return self._accept_change(
            OperationKind.ROLL_OUT,
            slug,
            rule,
            etag,
            request,
            actor=actor,
            replace_queued=replace_queued,
            timeout_s=timeout_s,
        )

    def delete(self, slug: str, *, etag: str, request: RequestKey | None, actor: str = "") -> Operation:
        """Accept a segment's deletion for all its users. Raises as ``roll_out``."""
        return self._accept_change(OperationKind.DELETE, slug, None, etag, request, actor=actor)

    def cancel(self, operation_id: UUID, *, actor: str = "") -> Operation:
        """Abort an operation that is not committed; one that is aborted already stays so.

        Args:
            actor: name of the principal that asks for it; empty: nobody has a name.

        Raises:
            ServiceError: OPERATION_NOT_FOUND, OPERATION_NOT_CANCELLABLE, CATALOG_UNAVAILABLE.
        """
        self._get(operation_id)
        why = {"why": "CANCELLED", **({"actor": actor} if actor else {})}
        failure = Failure(Reason.OPERATION_ABORTED.text, "the operation was cancelled", why)
        self._coordinator.abort(operation_id, failure)

        operation = self._get(operation_id)
        if operation.state is not OperationState.ABORTED:
            raise ServiceError(
                Reason.OPERATION_NOT_CANCELLABLE,
                f"{operation.name} is {operation.state.name}: it can be cancelled only before it is committed",
                {"operation": operation.name, "state": operation.state.name},
            )
        log.info("operation_cancelled", operation=str(operation_id), slug=operation.plan.slug, actor=actor or NOBODY)
        return operation

    # -- once per request: for creations too ------------------------------------------------------------------------

    def accepted(self, request: RequestKey | None) -> Operation | None:
        """The operation that the same request made before; None: the request is new, or has no id.

        Raises:
            ServiceError: REQUEST_ID_REUSED (the id came with other content), CATALOG_UNAVAILABLE.
        """
        if request is None:
            return None
        before = self._store.accepted_before(request.method, request.request_id)
        if before is None:
            return None

        operation_id, content_hash = before
        if content_hash != request.content_hash:
            raise invalid_field(
                "request_id", "was used before with another content of the request", Reason.REQUEST_ID_REUSED
            )
        return self._get(operation_id)

    def insert(self, plan: OperationPlan, request: RequestKey | None, *, replace_queued: bool = False) -> Operation:
        """Put an operation into the queue; the one that a twin of the request has put there, if it was quicker.

        Raises:
            ServiceError: OVERLOADED (the queue is full), OPERATION_ABORTED (a twin of the request failed),
                REQUEST_ID_REUSED, CATALOG_UNAVAILABLE.
        """
        key = (request.method, request.request_id, request.content_hash) if request else None
        accepted = self._store.insert(uuid4(), plan, key, replace_queued=replace_queued)
        for replaced in accepted.replaced:
            log.info("operation_replaced", operation=str(replaced), slug=plan.slug)

        operation = accepted.operation
        if operation is None:
            # A twin of the request was quicker, so its operation is there now; or it has failed since and left none.
            operation = self.accepted(request)
            if operation is None:
                raise ServiceError(
                    Reason.OPERATION_ABORTED, "a twin of this request failed; it may be repeated", {"why": "TWIN"}
                )
        else:
            log.info(
                "operation_accepted",
                operation=str(operation.id),
                kind=plan.kind.name,
                slug=plan.slug,
                actor=plan.actor or NOBODY,
            )
        return operation

    # -- steps ------------------------------------------------------------------------------------------------------

    def _accept_change(
        self,
        kind: OperationKind,
        slug: str,
        rule: Rule | None,
        etag: str,
        request: RequestKey | None,
        *,
        actor: str,
        replace_queued: bool = False,
        timeout_s: float | None = None,
    ) -> Operation:
        known = self.accepted(request)
        if known is not None:
            return known

        # Checked before anything is accepted: what is accepted reaches the workers later without the caller.
        self._broker.check()

        segment = self._store.segment(slug)
        if segment is None:
            raise segment_not_found(slug)
        if segment.state is SegmentState.DELETING:
            raise segment_deleting(slug)
        if etag and etag != segment.etag:
            raise etag_mismatch(slug, segment.etag)

        # An early refusal. The start of the operation checks again that all rules together stay within the bound.
        cost = self._costs.check(segment.id, rule, timeout_s=timeout_s) if rule is not None else None

        plan = OperationPlan(
            kind, slug, segment.id, segment.uid, segment.salt, rule=rule, cost=cost, etag=etag, actor=actor
        )
        operation = self.insert(plan, request, replace_queued=replace_queued)
        self._start_next()
        return operation

    def _get(self, operation_id: UUID) -> Operation:
        operation = self._store.get(operation_id)
        if operation is None:
            raise operation_not_found(f"operations/{operation_id}")
        return operation

    def _start_next(self) -> None:
        """Try to start the queue. The operation is accepted: if this start fails, recovery starts it."""
        try:
            self._coordinator.start_next()
        except ServiceError as error:
            log.warning("start_left_to_recovery", reason=error.reason.text)
