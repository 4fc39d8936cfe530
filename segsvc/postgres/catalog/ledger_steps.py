"""The statements inside the ledger's transactions; ``ledger`` decides where each transaction begins and ends."""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass
from typing import Any, Final
from uuid import UUID

import sqlalchemy as sa
from sqlalchemy.dialects.postgresql import insert

from segsvc.domain.condition_cost import CostLimits, refusal_of
from segsvc.domain.errors import (
    Reason,
    etag_mismatch,
    queue_full,
    queue_of_segment_full,
    segment_deleting,
    segment_exists,
    segment_not_found,
    too_many_segments,
)
from segsvc.domain.operation import Failure, Operation, OperationKind, OperationPlan, OperationState, QueueLimits
from segsvc.domain.segment import SEGMENTS_MAX, Segment, SegmentState, SegmentText, new_etag
from segsvc.postgres import tables
from segsvc.postgres.catalog import audit_trail
from segsvc.postgres.catalog.operation_ends import NOTIFY_END
from segsvc.postgres.catalog.segments import select_rules_in_force
from segsvc.postgres.segment_rows import COLUMNS, segment_to_json, to_segment

_operations = tables.operations.c
_segments = tables.segments.c
_requests = tables.requests.c


IN_TIME: Final = _operations.deadline > sa.func.clock_timestamp()
"""The deadline of an operation that is PREPARING has not passed: compared in the statement that decides something."""


def find_request(connection: sa.Connection, method: str, request_id: UUID) -> tuple[UUID, bytes] | None:
    """The operation that a request made, and the hash of its content."""
    row = connection.execute(
        sa.select(_requests.operation_id, _requests.content_hash).where(
            _requests.method == method, _requests.request_id == request_id
        )
    ).one_or_none()
    return (row.operation_id, bytes(row.content_hash)) if row else None


def insert_request(connection: sa.Connection, request: tuple[str, UUID, bytes], operation_id: UUID) -> None:
    """Remember what a request made. The caller has the lock of acceptance and knows that it is new."""
    method, request_id, content_hash = request
    connection.execute(
        sa.insert(tables.requests).values(
            method=method, request_id=request_id, content_hash=content_hash, operation_id=operation_id
        )
    )


def check_queue(connection: sa.Connection, slug: str, limits: QueueLimits) -> None:
    """Whether one more operation of this segment may wait. The caller has the lock of acceptance.

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


def replace_queued(connection: sa.Connection, new: UUID, plan: OperationPlan) -> Sequence[UUID]:
    """Abort the rollouts of a plan's segment that have not started, for a new operation. Those that were aborted."""
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
    # One that is just being started has its row locked: the compare-and-set waits for it, and leaves it alone.
    return [one for one in queued.all() if abort(connection, one, failure, [OperationState.QUEUED]) is not None]


def find_segment(connection: sa.Connection, slug: str) -> Segment | None:
    """The segment that has this slug, unless it is only reserved."""
    row = connection.execute(
        sa.select(*COLUMNS).where(_segments.slug == slug, _segments.state != SegmentState.RESERVED)
    ).one_or_none()
    return to_segment(row) if row else None


def count_taken_slugs(connection: sa.Connection) -> int:
    """Slugs that are taken, reserved ones included: what the limit is about."""
    return int(connection.execute(sa.select(sa.func.count()).select_from(tables.segments)).scalar_one())


@dataclass(frozen=True, slots=True)
class Dequeued:
    """An operation that has left the queue. ``valid``: it is PREPARING now; otherwise it is ABORTED."""

    operation_id: UUID
    kind: OperationKind
    valid: bool


def _select_next() -> sa.Select[tuple[Any, Any]]:
    """The operation whose turn it is: of the segment that was served least recently, the oldest.

    One that was never served, as one that is yet to be created, counts as served when its oldest operation was
    accepted: a flood of new segments passes nobody by. A segment is its slug here: its deletion and the creation of the
    next one of this slug keep their order.
    """
    heads = (
        sa.select(_operations.id, _operations.slug, _operations.seq, _operations.create_time)
        .distinct(_operations.slug)
        .where(_operations.state == OperationState.QUEUED.name)
        .order_by(_operations.slug, _operations.seq)
        .subquery("heads")
    )
    served = tables.operations.alias("served").c
    # Of one slug they start in their order: the newest that has started was served last.
    last_start = (
        sa.select(served.start_time)
        .where(served.slug == heads.c.slug, served.start_time.is_not(None))
        .order_by(served.seq.desc())
        .limit(1)
        .scalar_subquery()
    )
    turn = (
        sa.select(heads.c.id)
        .order_by(sa.func.coalesce(last_start, heads.c.create_time), heads.c.seq)
        .limit(1)
        .scalar_subquery()
    )
    return (
        sa.select(_operations.id, _operations.plan)
        .where(_operations.id == turn, _operations.state == OperationState.QUEUED.name)
        .with_for_update()
    )


_SELECT_NEXT: Final = _select_next()


def start_next(connection: sa.Connection, deadline_s: float, limits: CostLimits) -> Dequeued | None:
    """Move the operation whose turn it is on. None: there was nothing to start.

    Raises:
        sqlalchemy.exc.IntegrityError: another one is in flight since this looked; nothing changed.
    """
    # Only spares a pointless attempt: what keeps two out is the unique index, which the update below runs into.
    in_flight = sa.exists().where(_operations.state.in_([OperationState.PREPARING.name, OperationState.COMMITTED.name]))
    if connection.execute(sa.select(in_flight)).scalar_one():
        return None
    row = connection.execute(_SELECT_NEXT).one_or_none()
    if row is None:  # also when another process moved it while this waited for the row
        return None
    plan = OperationPlan.from_json(row.plan)
    failure = _validate_and_reserve(connection, plan, limits)
    if failure is not None:
        abort(connection, row.id, failure, [OperationState.QUEUED])
        return Dequeued(row.id, plan.kind, valid=False)
    now = sa.func.clock_timestamp()
    connection.execute(
        sa.update(tables.operations)
        .where(_operations.id == row.id, _operations.state == OperationState.QUEUED.name)
        .values(
            state=OperationState.PREPARING.name,
            start_time=now,
            dispatch_time=now,
            deadline=now + sa.func.make_interval(0, 0, 0, 0, 0, 0, deadline_s),
        )
    )
    return Dequeued(row.id, plan.kind, valid=True)


def _validate_and_reserve(connection: sa.Connection, plan: OperationPlan, limits: CostLimits) -> Failure | None:
    """Why an operation cannot start now; None: it can, and its commit point has no way to fail for ever.

    Nothing else is in flight, so what holds here holds until the decision: a segment's rule and life change only by
    operations, and a CREATE's slug is reserved by its row.
    """
    if plan.kind is OperationKind.CREATE:
        return _reserve(connection, plan)
    row = connection.execute(
        sa.select(_segments.state, _segments.etag).where(_segments.id == plan.segment_id).with_for_update()
    ).one_or_none()
    if row is None or row.state == SegmentState.RESERVED:
        return Failure.of(segment_not_found(plan.slug))
    if row.state == SegmentState.DELETING:
        return Failure.of(segment_deleting(plan.slug))
    if plan.etag and plan.etag != row.etag:
        return Failure.of(etag_mismatch(plan.slug, row.etag))
    if plan.rule is not None and plan.cost is not None:
        # Judged before, too, beside the rules of then. Here no other rule can come in force beside it.
        refusal = refusal_of(plan.segment_id, plan.rule, plan.cost, select_rules_in_force(connection), limits)
        if refusal is not None:
            return Failure.of(refusal)
    return None


def _reserve(connection: sa.Connection, plan: OperationPlan) -> Failure | None:
    """Take a new segment's slug and its place among the live ones."""
    text = plan.text or SegmentText()
    now = sa.func.clock_timestamp()
    result = connection.execute(
        insert(tables.segments)
        .values(
            id=plan.segment_id,
            slug=plan.slug,
            uid=plan.segment_uid,
            salt=tables.salt_to_db(plan.salt),
            display_name=text.display_name,
            description=text.description,
            labels=dict(text.labels),
            state=SegmentState.RESERVED,
            etag=new_etag(),
            create_time=now,
            update_time=now,
        )
        .on_conflict_do_nothing(index_elements=["slug"])
    )
    if not result.rowcount:
        return Failure.of(segment_exists(plan.slug))
    if count_taken_slugs(connection) > SEGMENTS_MAX:
        connection.execute(sa.delete(tables.segments).where(_segments.id == plan.segment_id))
        return Failure.of(too_many_segments(SEGMENTS_MAX))
    return None


def abort(
    connection: sa.Connection,
    operation_id: UUID,
    failure: Failure,
    from_states: Sequence[OperationState],
    *,
    if_late: bool = False,
) -> OperationKind | None:
    """Decide against an operation and give back what it had reserved. Its kind; None: it is in none of these states,
    or, with ``if_late``, not past its deadline."""
    row = connection.execute(
        sa.update(tables.operations)
        .where(
            _operations.id == operation_id,
            _operations.state.in_([state.name for state in from_states]),
            sa.not_(IN_TIME) if if_late else sa.true(),
        )
        .values(state=OperationState.ABORTED.name, failure=failure.to_json(), end_time=sa.func.clock_timestamp())
        .returning(_operations.kind, _operations.segment_id, NOTIFY_END)
    ).one_or_none()
    if row is None:
        return None
    if row.kind == OperationKind.CREATE:
        connection.execute(
            sa.delete(tables.segments).where(_segments.id == row.segment_id, _segments.state == SegmentState.RESERVED)
        )
        # A creation that failed is no answer to keep: the same request may be made again.
        connection.execute(sa.delete(tables.requests).where(_requests.operation_id == operation_id))
    return OperationKind(row.kind)


def commit(connection: sa.Connection, operation: Operation) -> bool:
    """Write the decision: the segment's change, its row of the audit trail with its number, and COMMITTED.

    False: the operation's deadline has passed, and the caller must roll everything back.

    The caller has the operation's row and knows it to be PREPARING.
    """
    segment = _change_segment(connection, operation)
    plan = operation.plan
    totals = {
        name: sum(getattr(counts, name) for counts in operation.votes)
        for name in ("matched", "added", "removed", "members")
    }
    seq = audit_trail.record(
        connection,
        action={
            OperationKind.CREATE: "created",
            OperationKind.ROLL_OUT: "rolled_out",
            OperationKind.DELETE: "deleted",
        }[plan.kind],
        segment_id=plan.segment_id,
        slug=plan.slug,
        operation_id=operation.id,
        details={"segment_uid": str(plan.segment_uid), **_rule_details(plan), **totals},
    )
    kept = segment_to_json(segment) if plan.kind is not OperationKind.DELETE else None
    result = connection.execute(
        sa.update(tables.operations)
        # The last statement before the commit, so that whatever this waited for is over when it looks at the clock.
        .where(_operations.id == operation.id, _operations.state == OperationState.PREPARING.name, IN_TIME)
        .values(
            state=OperationState.COMMITTED.name,
            commit_time=sa.func.clock_timestamp(),
            commit_seq=seq,
            result={"segment": kept},
        )
    )
    return bool(result.rowcount)


def _rule_details(plan: OperationPlan) -> dict[str, Any]:
    if plan.rule is None:
        return {}
    return {"percent": plan.rule.percent, "condition": plan.rule.condition, "policy": plan.rule.policy.name}


def _change_segment(connection: sa.Connection, operation: Operation) -> Segment:
    """Change the catalog's segment as the operation says; returns it as it is then."""
    plan = operation.plan
    now = sa.func.clock_timestamp()
    values: dict[str, Any] = {"etag": new_etag(), "update_time": now, "last_operation": operation.id}
    if plan.kind is OperationKind.CREATE:
        expected = SegmentState.RESERVED
        values |= {"state": SegmentState.ACTIVE, "create_time": now, "member_count_time": now}
    else:
        expected = SegmentState.ACTIVE
    if plan.kind is OperationKind.DELETE:
        values |= {"state": SegmentState.DELETING}
    if plan.rule is not None:
        values |= {
            "rule_threshold": plan.rule.threshold,
            "rule_condition": plan.rule.condition,
            "rule_policy": plan.rule.policy,
            "rule_cost": plan.cost.to_json() if plan.cost is not None else None,
            "member_count": sum(counts.members for counts in operation.votes),
            "member_count_time": now,
        }
    row = connection.execute(
        sa.update(tables.segments)
        .where(_segments.id == plan.segment_id, _segments.state == expected)
        .values(**values)
        .returning(*COLUMNS)
    ).one()
    return to_segment(row)
