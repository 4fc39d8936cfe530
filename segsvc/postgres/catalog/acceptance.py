"""Acceptance of operations: an operation and its request become rows together, within the bounds of the queue."""

from __future__ import annotations

from collections.abc import Sequence
from uuid import UUID

import sqlalchemy as sa

from segsvc.domain.errors import Reason, queue_full, queue_of_segment_full
from segsvc.domain.operation import Accepted, Failure, OperationKind, OperationPlan, OperationState, QueueLimits
from segsvc.domain.segment import Segment
from segsvc.failpoints import CrashPoints
from segsvc.postgres import tables
from segsvc.postgres.catalog.operation_ends import abort, count_ended
from segsvc.postgres.catalog.operation_reads import PostgresOperationReads
from segsvc.postgres.catalog.segments import count_taken_slugs, select_segment
from segsvc.postgres.engine import Databases
from segsvc.postgres.locks import ACCEPT_LOCK

_operations = tables.operations.c
_requests = tables.requests.c


class PostgresAcceptance(PostgresOperationReads):
    """Accepts operations of one catalog, and reads them.

    Args:
        queue: how many operations may wait.
    """

    def __init__(self, databases: Databases, *, queue: QueueLimits, crash_points: CrashPoints) -> None:
        super().__init__(databases)
        self._queue = queue
        self._crash = crash_points

    def accepted_before(self, method: str, request_id: UUID) -> tuple[UUID, bytes] | None:
        """The operation that this request made and the hash of its content; None: it is new."""
        with self._databases.catalog_tx() as connection:
            return _find_request(connection, method, request_id)

    def segment(self, slug: str) -> Segment | None:
        """The live segment of this slug, ACTIVE or DELETING; None: there is none."""
        with self._databases.catalog_tx() as connection:
            return select_segment(connection, slug)

    def live_segments(self) -> int:
        """How many segments count towards the limit."""
        with self._databases.catalog_tx() as connection:
            return count_taken_slugs(connection)

    def draw_segment_id(self) -> int:
        """A numeric id for a new segment; no id is given twice."""
        with self._databases.catalog_tx() as connection:
            return int(connection.execute(sa.select(tables.segment_id_seq.next_value())).scalar_one())

    def insert(
        self,
        operation_id: UUID,
        plan: OperationPlan,
        request: tuple[str, UUID, bytes] | None,
        *,
        replace_queued: bool = False,
    ) -> Accepted:
        """Insert an operation as QUEUED, with its request (method, request_id, content hash).

        Args:
            replace_queued: abort the rollouts of this segment that are QUEUED.

        Raises:
            ServiceError: OVERLOADED, the queue is full; nothing changed.
        """
        with self._databases.catalog_tx() as connection:
            # The lock is a statement of its own, so the next statements see what the previous holder has accepted. Thus
            # fronts that accept at the same time cannot exceed the bounds together.
            connection.execute(sa.select(sa.func.pg_advisory_xact_lock(ACCEPT_LOCK)))
            if request is not None and _find_request(connection, request[0], request[1]) is not None:
                return Accepted(None)

            replaced = _abort_queued_rollouts(connection, operation_id, plan) if replace_queued else ()
            _check_queue(connection, plan.slug, self._queue)
            connection.execute(
                sa.insert(tables.operations).values(
                    id=operation_id,
                    kind=plan.kind,
                    slug=plan.slug,
                    segment_id=plan.segment_id,
                    plan=plan.to_json(),
                    state=OperationState.QUEUED.name,
                )
            )
            if request is not None:
                _insert_request(connection, request, operation_id)

        for _ in replaced:
            count_ended(OperationKind.ROLL_OUT, OperationState.ABORTED)
        self._crash.reach("accepted-not-answered", operation=operation_id)
        return Accepted(self.get(operation_id), replaced)


def _find_request(connection: sa.Connection, method: str, request_id: UUID) -> tuple[UUID, bytes] | None:
    """The operation that a request made, and the hash of its content."""
    row = connection.execute(
        sa.select(_requests.operation_id, _requests.content_hash).where(
            _requests.method == method, _requests.request_id == request_id
        )
    ).one_or_none()
    return (row.operation_id, bytes(row.content_hash)) if row else None


def _insert_request(connection: sa.Connection, request: tuple[str, UUID, bytes], operation_id: UUID) -> None:
    """Store which operation a request made. The caller holds the lock of acceptance, and the request is new."""
    method, request_id, content_hash = request
    connection.execute(
        sa.insert(tables.requests).values(
            method=method, request_id=request_id, content_hash=content_hash, operation_id=operation_id
        )
    )


def _check_queue(connection: sa.Connection, slug: str, limits: QueueLimits) -> None:
    """Check that one more operation of this segment may wait. The caller holds the lock of acceptance.

    Raises:
        ServiceError: OVERLOADED.
    """
    queued = connection.execute(
        sa.select(sa.func.count(), sa.func.count().filter(_operations.slug == slug)).where(
            _operations.state == OperationState.QUEUED.name
        )
    ).one()
    if queued[1] >= limits.per_segment:
        raise queue_of_segment_full(slug, limits.per_segment)
    if queued[0] >= limits.all:
        raise queue_full(limits.all)


def _abort_queued_rollouts(connection: sa.Connection, new: UUID, plan: OperationPlan) -> Sequence[UUID]:
    """Abort the QUEUED rollouts of a segment, because a new operation replaces them. Returns their ids."""
    name = f"operations/{new}"
    failure = Failure(
        Reason.OPERATION_ABORTED.text,
        f"another rollout of the segment, {name}, has taken its place in the queue",
        {"why": "REPLACED", "operation": name},
    )

    queued = connection.execute(
        sa.select(_operations.id)
        .where(
            _operations.segment_id == plan.segment_id,
            _operations.kind == OperationKind.ROLL_OUT,
            _operations.state == OperationState.QUEUED.name,
        )
        .order_by(_operations.seq)
    ).scalars()

    # The row of an operation that is being started is locked: the compare-and-set waits for it and changes nothing.
    return [each for each in queued.all() if abort(connection, each, failure, [OperationState.QUEUED]) is not None]
