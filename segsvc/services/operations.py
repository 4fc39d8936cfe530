"""Operations as their callers see them: accepted once, carried out by the commit protocol, watched, cancelled."""

from __future__ import annotations

import secrets
import time
from collections.abc import Mapping, Sequence
from concurrent.futures import CancelledError, Future, ThreadPoolExecutor
from concurrent.futures import TimeoutError as FutureTimeout
from contextlib import suppress
from typing import Protocol
from uuid import UUID, uuid4

from segsvc.conditions import parse_condition
from segsvc.domain.condition_cost import ConditionCost
from segsvc.domain.errors import (
    LockTimeout,
    Reason,
    ServiceError,
    etag_mismatch,
    invalid_field,
    operation_not_found,
    segment_deleting,
    segment_exists,
    segment_not_found,
    too_many_segments,
)
from segsvc.domain.operation import (
    Accepted,
    Failure,
    Operation,
    OperationDetails,
    OperationFilter,
    OperationKind,
    OperationPlan,
    OperationResult,
    OperationState,
    RequestKey,
    ShardProgress,
    ShardState,
)
from segsvc.domain.segment import SEGMENTS_MAX, Rule, Segment, SegmentState, SegmentText
from segsvc.log import get_logger
from segsvc.twophase.ports import FanOut, ProgressHook
from segsvc.twophase.protocol import Coordinator

log = get_logger(__name__)


class OperationStore(Protocol):
    """The ledger, as far as acceptance and watching need it. All raise CATALOG_UNAVAILABLE in an outage."""

    def get(self, operation_id: UUID) -> Operation | None: ...

    def get_many(self, operation_ids: Sequence[UUID]) -> Sequence[Operation]: ...

    def list(self, wanted: OperationFilter, *, page_size: int, before_seq: int | None) -> Sequence[Operation]: ...

    def result(self, operation_id: UUID) -> OperationResult | None: ...

    def details(self, operation_ids: Sequence[UUID]) -> Mapping[UUID, OperationDetails]: ...

    def put_progress(self, operation_id: UUID, progress: ShardProgress) -> None: ...

    def segment(self, slug: str) -> Segment | None: ...

    def live_segments(self) -> int: ...

    def draw_segment_id(self) -> int: ...

    def accepted_before(self, method: str, request_id: UUID) -> tuple[UUID, bytes] | None: ...

    def insert(
        self,
        operation_id: UUID,
        plan: OperationPlan,
        request: tuple[str, UUID, bytes] | None,
        *,
        replace_queued: bool = False,
    ) -> Accepted: ...

    def start_next(self) -> Operation | None: ...


class Broker(Protocol):
    """Celery's broker, as far as acceptance needs it."""

    def check(self) -> None:
        """Raises BROKER_UNAVAILABLE if messages cannot be sent now."""


class Costs(Protocol):
    """Bounds of what rules cost; see ``rule_costs.RuleCosts``."""

    def check(self, segment_id: int, rule: Rule, *, timeout_s: float | None) -> ConditionCost | None: ...


class EndWatcher(Protocol):
    def watch(self, operation_id: UUID) -> Future[Operation]:
        """A future that gets the operation once it is final. Cancel it when nobody waits any more."""


class OperationService:
    """Creates, rolls out and deletes segments through the queue of operations, and tells how operations fare."""

    _POLL_S, _POLL_MAX_S = 0.02, 0.25
    """How often a creation looks whether its turn has come: less and less often."""
    _TAKE_OVER_S = 1.0
    """How long a creation that somebody else has started is left to them."""
    _RUNNERS = 4

    def __init__(
        self,
        *,
        store: OperationStore,
        coordinator: Coordinator,
        broker: Broker,
        watcher: EndWatcher,
        shards: Sequence[int],
        fan_out: FanOut,
        costs: Costs,
    ) -> None:
        self._store = store
        self._costs = costs
        self._coordinator = coordinator
        self._broker = broker
        self._watcher = watcher
        self._shards = shards
        self._fan_out = fan_out
        self._closing = False
        # Not the caller's thread, which must be able to leave while a shard does not answer. One operation is in
        # flight at a time; the others are those that hang.
        self._runner = ThreadPoolExecutor(max_workers=self._RUNNERS, thread_name_prefix="creation")

    def close(self) -> None:
        """This process is about to go: creations stop waiting. One whose turn has not come is aborted and answered
        OPERATION_QUEUE_BUSY; one that has started goes on elsewhere, and its caller may ask again."""
        self._closing = True
        self._runner.shutdown(wait=False)

    # -- changes ----------------------------------------------------------------------------------------------------

    def roll_out(
        self,
        slug: str,
        rule: Rule,
        *,
        etag: str,
        request: RequestKey | None,
        replace_queued: bool = False,
        timeout_s: float | None = None,
    ) -> Operation:
        """Accept a rule for a segment and all its users; the operation is durable when this returns.

        Args:
            replace_queued: abort the rollouts of this segment that wait in the queue.
            timeout_s: how long to measure what the rule's condition costs, at most.

        Raises:
            ServiceError: CONDITION_INVALID, CONDITION_TOO_COSTLY, SHARD_UNAVAILABLE (none can be asked what the
                condition costs), DEADLINE_EXCEEDED (nothing was accepted), SEGMENT_NOT_FOUND, SEGMENT_DELETING,
                ETAG_MISMATCH, REQUEST_ID_REUSED, OVERLOADED (the queue is full), BROKER_UNAVAILABLE,
                CATALOG_UNAVAILABLE.
        """
        if rule.condition:
            parse_condition(rule.condition)
        return self._accept_change(
            OperationKind.ROLL_OUT, slug, rule, etag, request, replace_queued=replace_queued, timeout_s=timeout_s
        )

    def delete(self, slug: str, *, etag: str, request: RequestKey | None) -> Operation:
        """Accept a segment's deletion for all its users. Raises as ``roll_out``."""
        return self._accept_change(OperationKind.DELETE, slug, None, etag, request)

    def create_segment(
        self, slug: str, text: SegmentText, *, request: RequestKey | None, deadline_s: float | None
    ) -> Segment:
        """Create a segment on every shard and return it; it takes its turn among the operations.

        Args:
            deadline_s: how long the caller waits; None: as long as it takes.

        Raises:
            ServiceError: SEGMENT_EXISTS, TOO_MANY_SEGMENTS, REQUEST_ID_REUSED, OVERLOADED (the queue is full),
                OPERATION_QUEUE_BUSY (it was aborted:
                nothing was created), DEADLINE_EXCEEDED (it may yet be created; the same request_id finds out),
                OPERATION_ABORTED, CATALOG_UNAVAILABLE.
        """
        give_up = time.monotonic() + deadline_s if deadline_s is not None else None
        while True:
            operation = self._accepted(request)
            if operation is None:
                operation = self._insert(self._creation_plan(slug, text), request)
            self._take_turn(operation.id, give_up)
            ended = self._wait_for_end(operation.id, give_up)
            if ended.failure is None:
                break
            error = ended.failure.to_error()
            mine = self._closing or (give_up is not None and time.monotonic() >= give_up)
            if error.reason is not Reason.OPERATION_QUEUE_BUSY or mine:
                raise error
            # It was a twin's time that was up: nothing was created, no request is remembered, and this call still has
            # time. So it begins anew, at the queue's end.
        result = self._store.result(ended.id)
        if result is None or result.segment is None:
            raise RuntimeError("a creation that is DONE has a segment")
        return result.segment

    def cancel(self, operation_id: UUID) -> Operation:
        """Abort an operation that is not committed; one that is aborted already stays so.

        Raises:
            ServiceError: OPERATION_NOT_FOUND, OPERATION_NOT_CANCELLABLE, CATALOG_UNAVAILABLE.
        """
        self.get(operation_id)
        failure = Failure(Reason.OPERATION_ABORTED.text, "the operation was cancelled", {"why": "CANCELLED"})
        self._coordinator.abort(operation_id, failure)
        operation = self.get(operation_id)
        if operation.state is not OperationState.ABORTED:
            raise ServiceError(
                Reason.OPERATION_NOT_CANCELLABLE,
                f"{operation.name} is {operation.state.name}: it can be cancelled only before it is committed",
                {"operation": operation.name, "state": operation.state.name},
            )
        return operation

    # -- watching ---------------------------------------------------------------------------------------------------

    def get(self, operation_id: UUID) -> Operation:
        """The operation as it is now. Raises OPERATION_NOT_FOUND, CATALOG_UNAVAILABLE."""
        operation = self._store.get(operation_id)
        if operation is None:
            raise operation_not_found(f"operations/{operation_id}")
        return operation

    def list(self, wanted: OperationFilter, *, page_size: int, before_seq: int | None) -> Sequence[Operation]:
        """Operations that match, newest first; ``before_seq``: only older ones than this."""
        return self._store.list(wanted, page_size=page_size, before_seq=before_seq)

    def watch_end(self, operation_id: UUID) -> Future[Operation]:
        """A future of the operation in its final state. Cancel it when nobody waits any more."""
        return self._watcher.watch(operation_id)

    def result(self, operation: Operation) -> OperationResult:
        """What a DONE operation has to say."""
        result = self._store.result(operation.id)
        if result is None:
            raise ValueError(f"{operation.name} is not committed")
        return result

    def progress_of(self, operation_ids: Sequence[UUID]) -> Mapping[UUID, tuple[Operation, Sequence[ShardProgress]]]:
        """Those of these operations that exist, and how far each shard is, in the order of the shards."""
        operations = self._store.get_many(operation_ids)
        described = self.describe(operations)
        return {operation.id: (operation, shards) for operation, (shards, _) in zip(operations, described, strict=True)}

    def describe(
        self, operations: Sequence[Operation]
    ) -> Sequence[tuple[Sequence[ShardProgress], OperationResult | None]]:
        """For each of these: how far each shard is, and what a DONE one has to say (None of others)."""
        details = self._store.details([operation.id for operation in operations])
        described: list[tuple[Sequence[ShardProgress], OperationResult | None]] = []
        for operation in operations:
            detail = details[operation.id]
            hints = {progress.shard: progress for progress in detail.progress}
            shards = [self._shard_progress(operation, shard, hints.get(shard)) for shard in self._shards]
            done = operation.state is OperationState.DONE
            described.append((shards, OperationResult(detail.segment, operation.votes) if done else None))
        return described

    def _shard_progress(self, operation: Operation, shard: int, hint: ShardProgress | None) -> ShardProgress:
        """What is certain (votes, the operation's state) before what a shard last said of itself."""
        hint = hint or ShardProgress(shard, ShardState.WAITING)
        vote = next((counts for counts in operation.votes if counts.shard == shard), None)
        if operation.state is OperationState.ABORTED:
            return ShardProgress(shard, ShardState.ROLLED_BACK, hint.blocks_done, hint.blocks_total)
        if vote is None:
            return hint
        state = ShardState.FINISHED if operation.state is OperationState.DONE else ShardState.PREPARED
        return ShardProgress(shard, state, hint.blocks_total, hint.blocks_total, vote.added, vote.removed)

    # -- acceptance -------------------------------------------------------------------------------------------------

    def _accept_change(
        self,
        kind: OperationKind,
        slug: str,
        rule: Rule | None,
        etag: str,
        request: RequestKey | None,
        *,
        replace_queued: bool = False,
        timeout_s: float | None = None,
    ) -> Operation:
        known = self._accepted(request)
        if known is not None:
            return known
        # Asked before anything is accepted: what is accepted later finds its way without the caller.
        self._broker.check()
        segment = self._store.segment(slug)
        if segment is None:
            raise segment_not_found(slug)
        if segment.state is SegmentState.DELETING:
            raise segment_deleting(slug)
        if etag and etag != segment.etag:
            raise etag_mismatch(slug, segment.etag)
        # Refused early; that all rules together stay within the bound is made sure of when the operation starts.
        cost = self._costs.check(segment.id, rule, timeout_s=timeout_s) if rule is not None else None
        plan = OperationPlan(kind, slug, segment.id, segment.uid, segment.salt, rule=rule, cost=cost, etag=etag)
        operation = self._insert(plan, request, replace_queued=replace_queued)
        self._start_next()
        return operation

    def _accepted(self, request: RequestKey | None) -> Operation | None:
        """The operation that the same request made before; None: it is new."""
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
        return self.get(operation_id)

    def _creation_plan(self, slug: str, text: SegmentText) -> OperationPlan:
        existing = self._store.segment(slug)
        if existing is not None and existing.state is SegmentState.ACTIVE:
            raise segment_exists(slug)
        if existing is None and self._store.live_segments() >= SEGMENTS_MAX:
            raise too_many_segments(SEGMENTS_MAX)
        return OperationPlan(
            OperationKind.CREATE, slug, self._store.draw_segment_id(), uuid4(), secrets.randbits(64), text=text
        )

    def _insert(self, plan: OperationPlan, request: RequestKey | None, *, replace_queued: bool = False) -> Operation:
        key = (request.method, request.request_id, request.content_hash) if request else None
        accepted = self._store.insert(uuid4(), plan, key, replace_queued=replace_queued)
        for replaced in accepted.replaced:
            log.info("operation_replaced", operation=str(replaced), slug=plan.slug)
        operation = accepted.operation
        if operation is None:
            # A twin of the request was quicker, so its operation is there now; or it has failed since and left none.
            operation = self._accepted(request)
            if operation is None:
                raise ServiceError(
                    Reason.OPERATION_ABORTED, "a twin of this request failed; it may be repeated", {"why": "TWIN"}
                )
        return operation

    def _start_next(self) -> None:
        """Start the queue, as a hope: the operation is accepted, and recovery starts it if this cannot."""
        try:
            self._coordinator.start_next()
        except ServiceError as error:
            log.warning("start_left_to_recovery", reason=error.reason.text)

    # -- creation ---------------------------------------------------------------------------------------------------

    def _take_turn(self, operation_id: UUID, give_up: float | None) -> None:
        """Wait until the operation has started, and carry it out here if it was started here.

        Whoever else starts it sends a chord for it, as for any operation.
        """
        pause_s = self._POLL_S
        while True:
            started = self._start_one()
            if started is not None and started.id == operation_id:
                self._run_until(started, give_up)
                return
            if started is not None and started.plan.kind is OperationKind.CREATE:
                # This call waits for its end anyway, and creations need no broker.
                self._run_until(started, give_up)
            elif started is not None:
                self._coordinator.dispatch(started, self._shards)
            operation = self.get(operation_id)
            if operation.state is not OperationState.QUEUED:
                return
            if self._closing or (give_up is not None and time.monotonic() >= give_up):
                busy = Failure(
                    Reason.OPERATION_QUEUE_BUSY.text,
                    "other operations are before this one; nothing was created, try again",
                    {"why": "QUEUE_BUSY"},
                )
                # Aborted first, so that what is answered next stays true; not if it has just started.
                if self._coordinator.abort(operation_id, busy, from_states=(OperationState.QUEUED,)):
                    return
            # Not beyond the caller's time: what is kept back of it is for the abort and the answer.
            time.sleep(pause_s if give_up is None else min(pause_s, max(0.0, give_up - time.monotonic())))
            pause_s = min(self._POLL_MAX_S, pause_s * 1.5)

    def _start_one(self) -> Operation | None:
        """The operation that was started just now; None: no turn has come, or somebody stands still with the queue."""
        try:
            return self._store.start_next()
        except ServiceError as error:
            if error.reason is not Reason.OVERLOADED:
                raise
            # The creation is accepted: its caller's time decides how often to look again, not one look's.
            log.warning("start_put_off", reason=error.reason.text)
            return None

    def _run_until(self, operation: Operation, give_up: float | None) -> None:
        """Carry out a creation until it ends or the caller's time is up; it then goes on without the caller."""
        if self._closing:
            self._coordinator.dispatch(operation, self._shards)
            return
        running = self._runner.submit(self._run, operation)
        try:
            running.result(None if give_up is None else max(0.0, give_up - time.monotonic()))
        except FutureTimeout:
            log.info("creation_goes_on", operation=str(operation.id))

    def _run(self, operation: Operation) -> None:
        """Be the runner of a creation; whatever fails is left to Celery and recovery."""
        silent: ProgressHook = lambda _: None  # noqa: E731
        try:
            self._fan_out(
                lambda participant: self._coordinator.prepare_shard(operation.id, participant.shard, silent),
                self._coordinator.participants,
            )
            self._coordinator.finalize(operation.id)
        except (ServiceError, LockTimeout) as error:
            log.warning("creation_left_to_workers", operation=str(operation.id), reason=str(error))
            self._coordinator.dispatch(operation, self._shards)

    def _wait_for_end(self, operation_id: UUID, give_up: float | None) -> Operation:
        operation = self.get(operation_id)
        if operation.state.final:
            return operation
        future = self._watcher.watch(operation_id)
        try:
            if give_up is None or give_up - time.monotonic() > self._TAKE_OVER_S:
                with suppress(FutureTimeout):
                    return future.result(self._TAKE_OVER_S)
                # Started by another one, and sent to the workers. Without a broker they have not got it.
                self._run_until(self.get(operation_id), give_up)
            return future.result(None if give_up is None else max(0.0, give_up - time.monotonic()))
        except (FutureTimeout, CancelledError):  # the time is up, or the watcher was closed
            raise ServiceError(
                Reason.DEADLINE_EXCEEDED,
                "the creation has started and is not decided; repeat it with the same request_id",
                {"operation": operation.name},
            ) from None
        finally:
            future.cancel()
