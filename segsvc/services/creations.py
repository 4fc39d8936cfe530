"""Creating segments. A creation is an operation whose caller waits for the segment, and carries it out meanwhile."""

from __future__ import annotations

import secrets
import time
from collections.abc import Sequence
from concurrent.futures import CancelledError, ThreadPoolExecutor
from concurrent.futures import TimeoutError as FutureTimeout
from contextlib import suppress
from typing import Protocol
from uuid import UUID, uuid4

from segsvc.domain.errors import LockTimeout, Reason, ServiceError, segment_exists, too_many_segments
from segsvc.domain.operation import Failure, Operation, OperationKind, OperationPlan, OperationState, RequestKey
from segsvc.domain.segment import SEGMENTS_MAX, Segment, SegmentState, SegmentText
from segsvc.log import get_logger
from segsvc.services.acceptance import Acceptance
from segsvc.services.operations import OperationService
from segsvc.twophase.ports import FanOut, ProgressHook
from segsvc.twophase.protocol import Coordinator

log = get_logger(__name__)


class CreationStore(Protocol):
    """The ledger, as far as creations need it. All raise CATALOG_UNAVAILABLE in an outage."""

    def segment(self, slug: str) -> Segment | None: ...

    def live_segments(self) -> int: ...

    def draw_segment_id(self) -> int: ...

    def start_next(self) -> Operation | None: ...


class Creations:
    """Creates segments: each creation takes its turn in the queue of operations, and its caller waits for the end.

    Args:
        fan_out: visits shards for creations alone. A visit that prepares a shard may end in an abort, which visits all
            shards itself.
    """

    _POLL_S, _POLL_MAX_S = 0.02, 0.25
    """Pauses between two checks whether a creation's turn has come: short ones first, then longer ones."""
    _TAKE_OVER_S = 1.0
    """A creation that another process has started is left to that process for this long."""
    _RUNNERS = 4

    def __init__(
        self,
        *,
        store: CreationStore,
        acceptance: Acceptance,
        operations: OperationService,
        coordinator: Coordinator,
        shards: Sequence[int],
        fan_out: FanOut,
    ) -> None:
        self._store = store
        self._acceptance = acceptance
        self._operations = operations
        self._coordinator = coordinator
        self._shards = shards
        self._fan_out = fan_out
        self._closing = False
        # Not the caller's thread, which must be able to leave while a shard does not answer. One operation is in
        # flight at a time; the other runners are for creations that hang.
        self._runner = ThreadPoolExecutor(max_workers=self._RUNNERS, thread_name_prefix="creation")

    def close(self) -> None:
        """This process is about to end: creations stop waiting. One whose turn has not come is aborted and answered
        OPERATION_QUEUE_BUSY; one that has started goes on elsewhere, and its caller may ask again."""
        self._closing = True
        self._runner.shutdown(wait=False)

    def create_segment(
        self, slug: str, text: SegmentText, *, request: RequestKey | None, deadline_s: float | None, actor: str = ""
    ) -> Segment:
        """Create a segment on every shard and return it; it takes its turn among the operations.

        Args:
            deadline_s: how long the caller waits; None: as long as it takes.
            actor: name of the principal that asks for it; empty: nobody has a name.

        Raises:
            ServiceError: SEGMENT_EXISTS, TOO_MANY_SEGMENTS, REQUEST_ID_REUSED, OVERLOADED (the queue is full),
                OPERATION_QUEUE_BUSY (it was aborted: nothing was created), DEADLINE_EXCEEDED (it may yet be created;
                the same request_id finds out), OPERATION_ABORTED, CATALOG_UNAVAILABLE.
        """
        give_up = time.monotonic() + deadline_s if deadline_s is not None else None
        while True:
            operation = self._acceptance.accepted(request)
            if operation is None:
                operation = self._acceptance.insert(self._plan(slug, text, actor), request)

            self._take_turn(operation.id, give_up)
            ended = self._wait_for_end(operation.id, give_up)
            if ended.failure is None:
                break

            error = ended.failure.to_error()
            own_time_is_up = self._closing or _passed(give_up)
            if error.reason is not Reason.OPERATION_QUEUE_BUSY or own_time_is_up:
                raise error
            # A twin's time was up: nothing was created, no request is remembered, and this call still has time. So it
            # starts over, at the end of the queue.

        segment = self._operations.result(ended).segment
        if segment is None:
            raise RuntimeError("a creation that is DONE has a segment")
        return segment

    # -- steps ------------------------------------------------------------------------------------------------------

    def _plan(self, slug: str, text: SegmentText, actor: str) -> OperationPlan:
        existing = self._store.segment(slug)
        if existing is not None and existing.state is SegmentState.ACTIVE:
            raise segment_exists(slug)
        if existing is None and self._store.live_segments() >= SEGMENTS_MAX:
            raise too_many_segments(SEGMENTS_MAX)
        return OperationPlan(
            OperationKind.CREATE,
            slug,
            self._store.draw_segment_id(),
            uuid4(),
            secrets.randbits(64),
            text=text,
            actor=actor,
        )

    def _take_turn(self, operation_id: UUID, give_up: float | None) -> None:
        """Wait until the operation has started, and carry it out here if it was started here.

        Any other process that starts it sends a chord for it, as for any operation.
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

            operation = self._operations.get(operation_id)
            if operation.state is not OperationState.QUEUED:
                return

            if self._closing or _passed(give_up):
                busy = Failure(
                    Reason.OPERATION_QUEUE_BUSY.text,
                    "other operations are before this one; nothing was created, try again",
                    {"why": "QUEUE_BUSY"},
                )
                # Aborted first, so that the answer stays true. The abort fails if the operation has just started.
                if self._coordinator.abort(operation_id, busy, from_states=(OperationState.QUEUED,)):
                    return

            # The pause ends with the caller's time: the rest of the call's time is for the abort and the answer.
            time.sleep(pause_s if give_up is None else min(pause_s, max(0.0, give_up - time.monotonic())))
            pause_s = min(self._POLL_MAX_S, pause_s * 1.5)

    def _start_one(self) -> Operation | None:
        """The operation that was started just now; None: no turn has come, or another process holds up the queue."""
        try:
            return self._store.start_next()
        except ServiceError as error:
            if error.reason is not Reason.OVERLOADED:
                raise
            # The creation is accepted: the caller's time decides how often to try again, not a single attempt.
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
        """Run a creation here; on failure hand over to Celery and recovery."""
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
        operation = self._operations.get(operation_id)
        if operation.state.final:
            return operation

        future = self._operations.watch_end(operation_id)
        try:
            if give_up is None or give_up - time.monotonic() > self._TAKE_OVER_S:
                with suppress(FutureTimeout):
                    return future.result(self._TAKE_OVER_S)
                # Another process started it and sent it to the workers. Without a broker they have not received it.
                self._run_until(self._operations.get(operation_id), give_up)

            return future.result(None if give_up is None else max(0.0, give_up - time.monotonic()))
        except (FutureTimeout, CancelledError):  # the time is up, or the watcher was closed
            raise ServiceError(
                Reason.DEADLINE_EXCEEDED,
                "the creation has started and is not decided; repeat it with the same request_id",
                {"operation": operation.name},
            ) from None
        finally:
            future.cancel()


def _passed(give_up: float | None) -> bool:
    return give_up is not None and time.monotonic() >= give_up
