"""The ledger's transitions. Each is one compare-and-set in one transaction, and its statements are here with it.

Implements ``twophase.Ledger`` and, with what it inherits from ``acceptance`` and ``operation_reads``, the stores of
``services.acceptance``, ``services.creations`` and ``services.operations``. Times are the catalog's clock.
"""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass
from typing import Any, Final
from uuid import UUID

import sqlalchemy as sa
from sqlalchemy import exc
from sqlalchemy.dialects.postgresql import Insert, insert

from segsvc.domain.condition_cost import CostLimits, refusal_of
from segsvc.domain.errors import (
    Reason,
    etag_mismatch,
    segment_deleting,
    segment_exists,
    segment_not_found,
    too_many_segments,
)
from segsvc.domain.operation import (
    Failure,
    Operation,
    OperationKind,
    OperationPlan,
    OperationState,
    QueueLimits,
    ShardCounts,
    ShardProgress,
)
from segsvc.domain.segment import SEGMENTS_MAX, Segment, SegmentState, SegmentText, new_etag
from segsvc.failpoints import CrashPoints
from segsvc.log import get_logger
from segsvc.postgres import tables
from segsvc.postgres.catalog import audit_trail
from segsvc.postgres.catalog.acceptance import PostgresAcceptance
from segsvc.postgres.catalog.operation_ends import NOTIFY_END, abort, count_ended
from segsvc.postgres.catalog.operation_rows import IN_TIME, select_operation, select_operations
from segsvc.postgres.catalog.segments import count_taken_slugs, select_rules_in_force
from segsvc.postgres.engine import Databases, sqlstate
from segsvc.postgres.segment_rows import COLUMNS, segment_to_json, to_segment
from segsvc.twophase.ports import Answer, OpenOperation, WorkFailed

log = get_logger(__name__)

UNIQUE_VIOLATION = "23505"
_INTEGRITY_CLASS = "23"

_operations = tables.operations.c
_votes = tables.votes.c
_progress = tables.progress.c
_segments = tables.segments.c

# Statements that every operation needs are built once: building one takes as long as running it.
_SELECT_STATE_SHARED: Final = (
    sa.select(_operations.state).where(_operations.id == sa.bindparam("operation_id")).with_for_update(read=True)
)
_VOTE_NAMES: Final = ("shard", "matched", "added", "removed", "members", "absent_attributes")
# A duplicate vote is not refused: the work is deterministic, so the twin's counts are the same. The deadline is
# compared here and not in the SELECT of the state: a locking SELECT computes its values before it waits for the lock.
_INSERT_VOTE: Final = (
    insert(tables.votes)
    .from_select(
        ["operation_id", *_VOTE_NAMES],
        sa.select(
            _operations.id, *(sa.bindparam(name, type_=_votes[name].type).label(name) for name in _VOTE_NAMES)
        ).where(_operations.id == sa.bindparam("operation_id"), IN_TIME),
        include_defaults=False,
    )
    .on_conflict_do_nothing()
)
_HAS_VOTED: Final = sa.select(
    sa.exists().where(_votes.operation_id == sa.bindparam("operation_id"), _votes.shard == sa.bindparam("shard"))
)
_FINISH: Final = (
    sa.update(tables.operations)
    .where(_operations.id == sa.bindparam("operation_id"), _operations.state == OperationState.COMMITTED.name)
    .values(state=OperationState.DONE.name, end_time=sa.func.clock_timestamp())
    .returning(_operations.kind, _operations.segment_id, NOTIFY_END)
)


def _put_progress() -> Insert:
    statement = insert(tables.progress).values(update_time=sa.func.clock_timestamp())
    new = statement.excluded
    updated = ("state", "blocks_done", "blocks_total", "added", "removed", "update_time")
    return statement.on_conflict_do_update(
        index_elements=["operation_id", "shard"], set_={name: new[name] for name in updated}
    )


_PUT_PROGRESS: Final = _put_progress()


class PostgresLedger(PostgresAcceptance):
    """The operations of one catalog.

    Args:
        shard_count: shards that this process knows; it starts operations only while these are all there are.
        deadline_s: how long an operation may be PREPARING.
        quiet_s: how long a PREPARING operation may show no sign of life before its tasks are sent again.
        queue: how many operations may wait.
        cost_limits: of the conditions of rules.
    """

    def __init__(
        self,
        databases: Databases,
        *,
        shard_count: int,
        deadline_s: float,
        quiet_s: float,
        queue: QueueLimits,
        cost_limits: CostLimits,
        crash_points: CrashPoints,
    ) -> None:
        super().__init__(databases, queue=queue, crash_points=crash_points)
        self._shard_count = shard_count
        self._deadline_s = deadline_s
        self._quiet_s = quiet_s
        self._cost_limits = cost_limits

    # -- transitions ------------------------------------------------------------------------------------------------

    def start_next(self) -> Operation | None:
        """Move the next operation of the queue to PREPARING. Operations that are no longer valid become ABORTED first.

        None: the queue is empty, an operation is in flight, or the shards are being doubled.
        """
        while True:
            try:
                with self._databases.catalog_tx() as connection:
                    if not _may_start(connection, self._shard_count):
                        return None
                    dequeued = _start_next(connection, self._deadline_s, self._cost_limits)
            except exc.IntegrityError as error:
                if sqlstate(error) != UNIQUE_VIOLATION:
                    raise
                # uq_operations_in_flight: another process started one between our SELECT and our UPDATE.
                return None

            if dequeued is None:
                return None
            if dequeued.valid:
                self._crash.reach("started", operation=dequeued.operation_id)
                return self.get(dequeued.operation_id)

            count_ended(dequeued.kind, OperationState.ABORTED)

    def claim_dispatch(self, operation_id: UUID) -> bool:
        """Whether the caller sends a new chord. If several recoveries ask at once, the row lock lets one win."""
        now = sa.func.clock_timestamp()
        with self._databases.catalog_tx() as connection:
            result = connection.execute(
                sa.update(tables.operations)
                .where(
                    _operations.id == operation_id,
                    _operations.state == OperationState.PREPARING.name,
                    IN_TIME,
                    _operations.dispatch_time < now - sa.func.make_interval(0, 0, 0, 0, 0, 0, self._quiet_s),
                )
                .values(dispatch_time=now)
            )
        return bool(result.rowcount)

    def vote(self, operation_id: UUID, counts: ShardCounts) -> Answer:
        """Record a shard's vote. Its FOR SHARE either makes a decision wait for the vote, or sees the decision."""
        with self._databases.catalog_tx() as connection:
            state = connection.execute(_SELECT_STATE_SHARED, {"operation_id": operation_id}).scalar_one_or_none()
            if state != OperationState.PREPARING.name:
                return Answer.REFUSED

            vote = {name: getattr(counts, name) for name in _VOTE_NAMES}
            vote["absent_attributes"] = list(counts.absent_attributes)
            inserted = connection.execute(_INSERT_VOTE, {"operation_id": operation_id, **vote}).rowcount

            if not inserted:
                twin = {"operation_id": operation_id, "shard": counts.shard}
                return Answer.TAKEN if connection.execute(_HAS_VOTED, twin).scalar_one() else Answer.LATE
            self._crash.reach("vote-not-committed", operation=operation_id, shard=counts.shard)
        return Answer.TAKEN

    def commit(self, operation_id: UUID) -> Answer:
        """The commit point. If all votes are there, one transaction sets COMMITTED, changes the segment and draws the
        sequence number.

        Raises:
            WorkFailed: the catalog will never accept the change (an integrity error); nothing was decided.
        """
        try:
            with self._databases.catalog_tx() as connection:
                operation = select_operation(connection, operation_id, lock=True)
                if operation is None or operation.state is not OperationState.PREPARING:
                    return Answer.REFUSED
                # The number that the catalog knows, not the one of this process: a process that has missed the doubling
                # of the shards would decide with half of the votes. While an operation is in flight it is fixed.
                if len(operation.votes) < connection.execute(_SELECT_SHARD_COUNT).scalar_one():
                    return Answer.REFUSED

                if not _commit(connection, operation):
                    connection.rollback()  # undoes what was changed for it; the number drawn for it stays unused
                    return Answer.LATE
                self._crash.reach("decision-not-committed", operation=operation_id)
        except exc.DBAPIError as error:
            if not sqlstate(error).startswith(_INTEGRITY_CLASS):
                raise
            log.exception("commit_point_refused", operation=str(operation_id), sqlstate=sqlstate(error))
            raise WorkFailed(
                Failure(Reason.INTERNAL.text, "the catalog refused the change", {"why": "INTEGRITY"})
            ) from error
        return Answer.TAKEN

    def abort(
        self, operation_id: UUID, failure: Failure, *, from_states: Sequence[OperationState], if_late: bool = False
    ) -> bool:
        """Abort the operation if it is in one of ``from_states``, and free what it reserved, in one transaction."""
        with self._databases.catalog_tx() as connection:
            kind = abort(connection, operation_id, failure, from_states, if_late=if_late)
        if kind is None:
            return False
        count_ended(kind, OperationState.ABORTED)
        return True

    def all_shards_committed(self, operation_id: UUID) -> float:
        """Note once, by the catalog's clock, that all shards have committed.

        Returns the seconds since it was first noted; 0: the operation is no longer COMMITTED.
        """
        now = sa.func.clock_timestamp()
        noted = _operations.shards_committed_time
        with self._databases.catalog_tx() as connection:
            waited_s = connection.execute(
                sa.update(tables.operations)
                .where(_operations.id == operation_id, _operations.state == OperationState.COMMITTED.name)
                .values(shards_committed_time=sa.func.coalesce(noted, now))
                .returning(sa.extract("epoch", now - noted))
            ).scalar_one_or_none()
        return float(waited_s or 0)

    def finish(self, operation_id: UUID) -> bool:
        """COMMITTED → DONE. The same transaction removes a deleted segment from the catalog, which frees its slug."""
        with self._databases.catalog_tx() as connection:
            row = connection.execute(_FINISH, {"operation_id": operation_id}).one_or_none()
            if row is None:
                return False

            if row.kind == OperationKind.DELETE:
                connection.execute(sa.delete(tables.segments).where(tables.segments.c.id == row.segment_id))
        count_ended(OperationKind(row.kind), OperationState.DONE)
        return True

    # -- reads of recovery ------------------------------------------------------------------------------------------

    def open_operations(self) -> Sequence[OpenOperation]:
        """The operation in flight and the oldest in the queue, if there are any, judged by the catalog's clock.

        It does not return the whole queue: recovery asks every two seconds, and thousands may wait.
        """
        now = sa.func.clock_timestamp()
        last_vote = (
            sa.select(sa.func.max(_votes.vote_time)).where(_votes.operation_id == _operations.id).scalar_subquery()
        )
        last_progress = (
            sa.select(sa.func.max(_progress.update_time))
            .where(_progress.operation_id == _operations.id)
            .scalar_subquery()
        )
        last_sign_of_life = sa.func.greatest(_operations.dispatch_time, last_vote, last_progress)
        since = sa.func.coalesce(_operations.commit_time, _operations.start_time, _operations.create_time)

        queue = tables.operations.alias("queue").c
        oldest = sa.select(sa.func.min(queue.seq)).where(queue.state == OperationState.QUEUED.name).scalar_subquery()

        with self._databases.catalog_tx() as connection:
            judged = connection.execute(
                sa.select(
                    _operations.id,
                    sa.func.coalesce(
                        last_sign_of_life < now - sa.func.make_interval(0, 0, 0, 0, 0, 0, self._quiet_s), False
                    ).label("quiet"),
                    sa.cast(sa.extract("epoch", now - since), sa.Float).label("age_s"),
                ).where(sa.or_(_operations.state.in_(tables.IN_FLIGHT), _operations.seq == oldest))
            ).all()
            loaded = select_operations(
                connection, _operations.id.in_([row.id for row in judged]), order=_operations.seq.asc()
            )

        flags = {row.id: (row.quiet, row.age_s) for row in judged}
        return [OpenOperation(operation, *flags[operation.id]) for operation in loaded]

    def late(self) -> Sequence[Operation]:
        """Operations that are PREPARING and past their deadline, by the catalog's clock: at most one."""
        preparing = _operations.state == OperationState.PREPARING.name
        with self._databases.catalog_tx() as connection:
            return select_operations(connection, preparing, sa.not_(IN_TIME))

    # -- hints for people -------------------------------------------------------------------------------------------

    def put_progress(self, operation_id: UUID, progress: ShardProgress) -> None:
        """Store how far a shard is. This decides nothing, but it also shows that a process works on the shard."""
        values = {
            "operation_id": operation_id,
            "shard": progress.shard,
            "state": progress.state,
            "blocks_done": progress.blocks_done,
            "blocks_total": progress.blocks_total,
            "added": progress.added,
            "removed": progress.removed,
        }

        with self._databases.catalog_tx() as connection:
            # The row's reference to its operation takes a lock, and a commit with a lock is flushed to disk before the
            # work goes on. A hint does not need that: losing it in a crash of the server costs nothing.
            connection.exec_driver_sql("SET LOCAL synchronous_commit TO off")
            connection.execute(_PUT_PROGRESS, values)


_SELECT_SHARD_COUNT: Final = sa.select(tables.installation.c.shard_count)
# A doubling of the shards locks the row before it reads which operations are in flight: so it waits for a start that
# has read the row before, and a later start reads that the shards are being doubled.
_SELECT_LAYOUT: Final = sa.select(tables.installation.c.shard_count, tables.installation.c.switch_time).with_for_update(
    read=True, key_share=True
)

# -- statements of a start --------------------------------------------------------------------------------------------


@dataclass(frozen=True, slots=True)
class _Dequeued:
    """An operation that has left the queue. ``valid``: it is PREPARING now; otherwise it is ABORTED."""

    operation_id: UUID
    kind: OperationKind
    valid: bool


def _select_next() -> sa.Select[tuple[Any, Any]]:
    """The next operation of the queue: the oldest operation of the segment that was served least recently.

    A segment that was never served, such as one that is yet to be created, counts as served when its oldest operation
    was accepted. So a flood of new segments cannot overtake the segments that already wait. A segment is identified by
    its slug here: its deletion and the creation of the next segment of the same slug keep their order.
    """
    heads = (
        sa.select(_operations.id, _operations.slug, _operations.seq, _operations.create_time)
        .distinct(_operations.slug)
        .where(_operations.state == OperationState.QUEUED.name)
        .order_by(_operations.slug, _operations.seq)
        .subquery("heads")
    )

    served = tables.operations.alias("served").c
    # Operations of one slug start in their order: the newest one that has started was served last.
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


def _may_start(connection: sa.Connection, shard_count: int) -> bool:
    """Whether an operation may start now, in a process that knows this many shards."""
    layout = connection.execute(_SELECT_LAYOUT).one()
    return layout.switch_time is None and layout.shard_count == shard_count


def _start_next(connection: sa.Connection, deadline_s: float, limits: CostLimits) -> _Dequeued | None:
    """Start or abort the next operation of the queue. None: there was nothing to start.

    Raises:
        sqlalchemy.exc.IntegrityError: another operation came in flight after this had checked; nothing changed.
    """
    # This check only saves a pointless attempt. What prevents two in flight is the unique index, on which the UPDATE
    # below fails.
    in_flight = sa.exists().where(_operations.state.in_(tables.IN_FLIGHT))
    if connection.execute(sa.select(in_flight)).scalar_one():
        return None

    row = connection.execute(_SELECT_NEXT).one_or_none()
    if row is None:  # also when another process moved it while this waited for the row
        return None

    plan = OperationPlan.from_json(row.plan)
    failure = _validate_and_reserve(connection, plan, limits)
    if failure is not None:
        abort(connection, row.id, failure, [OperationState.QUEUED])
        return _Dequeued(row.id, plan.kind, valid=False)

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
    return _Dequeued(row.id, plan.kind, valid=True)


def _validate_and_reserve(connection: sa.Connection, plan: OperationPlan, limits: CostLimits) -> Failure | None:
    """Why an operation cannot start now. None: it can start, and nothing can make its commit point fail for ever.

    No other operation is in flight, so what holds here holds until the decision: only operations change a segment's
    rule and state, and the row of a CREATE reserves its slug.
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
        # Acceptance checked this against the rules of that time. From here on no other rule can come into force.
        refusal = refusal_of(plan.segment_id, plan.rule, plan.cost, select_rules_in_force(connection), limits)
        if refusal is not None:
            return Failure.of(refusal)
    return None


def _reserve(connection: sa.Connection, plan: OperationPlan) -> Failure | None:
    """Reserve a new segment's slug, and its place within the limit of segments."""
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


# -- statements of the commit point -----------------------------------------------------------------------------------


def _commit(connection: sa.Connection, operation: Operation) -> bool:
    """Write the decision: the segment's change, its row of the audit trail with its number, and COMMITTED.

    False: the operation's deadline has passed, and the caller must roll everything back.

    The caller has locked the operation's row and knows that it is PREPARING.
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
        actor=plan.actor,
        details={"segment_uid": str(plan.segment_uid), **_rule_details(plan), **totals},
    )

    kept = segment_to_json(segment) if plan.kind is not OperationKind.DELETE else None
    result = connection.execute(
        sa.update(tables.operations)
        # The last statement before the commit: every wait of this transaction is over when it reads the clock.
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
    """Change the catalog's segment as the operation says; returns the segment after the change."""
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
