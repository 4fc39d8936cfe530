"""The ledger: operations in the catalog. Every transition is one compare-and-set in one transaction.

Implements ``twophase.Ledger`` and the stores of ``services.acceptance``, ``services.creations`` and
``services.operations``. Times are the catalog's clock.
"""

from __future__ import annotations

from collections.abc import Iterable, Iterator, Mapping, Sequence
from contextlib import contextmanager
from typing import Final
from uuid import UUID

import sqlalchemy as sa
from sqlalchemy import exc
from sqlalchemy.dialects.postgresql import Insert, insert

from segsvc.domain.condition_cost import CostLimits
from segsvc.domain.errors import Reason
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
    QueueLimits,
    ShardCounts,
    ShardProgress,
)
from segsvc.domain.segment import Segment
from segsvc.failpoints import CrashPoints
from segsvc.log import get_logger
from segsvc.metrics import operations_finished
from segsvc.postgres import tables
from segsvc.postgres.catalog import ledger_steps
from segsvc.postgres.catalog.ledger_views import (
    select_operation,
    select_operations,
    select_outcomes,
    select_progress,
    select_votes,
)
from segsvc.postgres.catalog.operation_ends import NOTIFY_END, PostgresEndListener
from segsvc.postgres.engine import Databases, sqlstate
from segsvc.postgres.locks import ACCEPT_LOCK
from segsvc.twophase.ports import Answer, OpenOperation, WorkFailed

log = get_logger(__name__)

UNIQUE_VIOLATION = "23505"
_INTEGRITY_CLASS = "23"
_IN_FLIGHT = (OperationState.PREPARING.name, OperationState.COMMITTED.name)

_operations = tables.operations.c
_votes = tables.votes.c
_progress = tables.progress.c

# Statements of every operation's way are built once: to build one takes as long as to run it.
_SELECT_STATE_SHARED: Final = (
    sa.select(_operations.state).where(_operations.id == sa.bindparam("operation_id")).with_for_update(read=True)
)
_VOTE_NAMES: Final = ("shard", "matched", "added", "removed", "members", "absent_attributes")
# A duplicate vote is no refusal: the twin's counts are the same, the work is deterministic. The deadline is compared
# here and not with the state: what a locking SELECT computes is as old as its wait for the lock.
_INSERT_VOTE: Final = (
    insert(tables.votes)
    .from_select(
        ["operation_id", *_VOTE_NAMES],
        sa.select(
            _operations.id, *(sa.bindparam(name, type_=_votes[name].type).label(name) for name in _VOTE_NAMES)
        ).where(_operations.id == sa.bindparam("operation_id"), ledger_steps.IN_TIME),
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
    told = ("state", "blocks_done", "blocks_total", "added", "removed", "update_time")
    return statement.on_conflict_do_update(
        index_elements=["operation_id", "shard"], set_={name: new[name] for name in told}
    )


_PUT_PROGRESS: Final = _put_progress()


class PostgresLedger:
    """The operations of one catalog.

    Args:
        shard_count: votes that a decision needs.
        deadline_s: how long an operation may be PREPARING.
        quiet_s: how long nothing may be heard of a PREPARING operation before it is sent again.
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
        self._databases = databases
        self._shard_count = shard_count
        self._deadline_s = deadline_s
        self._quiet_s = quiet_s
        self._queue = queue
        self._cost_limits = cost_limits
        self._crash = crash_points

    # -- reading ----------------------------------------------------------------------------------------------------

    def get(self, operation_id: UUID) -> Operation | None:
        """The operation as it is now, its votes included; None: there is none of this id."""
        with self._databases.catalog_tx() as connection:
            return select_operation(connection, operation_id)

    def get_many(self, operation_ids: Sequence[UUID]) -> Sequence[Operation]:
        """Those of these operations that exist, their votes included."""
        if not operation_ids:
            return []
        with self._databases.catalog_tx() as connection:
            return select_operations(connection, _operations.id.in_(operation_ids))

    def states(self, operation_ids: Iterable[UUID]) -> Mapping[UUID, OperationState]:
        """States of those operations that exist."""
        ids = list(operation_ids)
        if not ids:
            return {}
        with self._databases.catalog_tx() as connection:
            rows = connection.execute(sa.select(_operations.id, _operations.state).where(_operations.id.in_(ids))).all()
        return {row.id: OperationState[row.state] for row in rows}

    @contextmanager
    def listening(self) -> Iterator[PostgresEndListener]:
        """Listen for ends of operations, on one connection held for the block. See ``PostgresEndListener``."""
        with self._databases.catalog_autocommit() as connection:
            listener = PostgresEndListener(connection)
            try:
                yield listener
            finally:
                listener.close()

    def list(self, wanted: OperationFilter, *, page_size: int, before_seq: int | None) -> Sequence[Operation]:
        """Operations that match, newest first; ``before_seq``: only older ones than this."""
        conditions: list[sa.ColumnElement[bool]] = []
        if wanted.slug is not None:
            conditions.append(_operations.slug == wanted.slug)
        if wanted.kind is not None:
            conditions.append(_operations.kind == wanted.kind)
        if wanted.state is not None:
            conditions.append(_operations.state == wanted.state.name)
        if before_seq is not None:
            conditions.append(_operations.seq < before_seq)
        with self._databases.catalog_tx() as connection:
            return select_operations(connection, *conditions, order=_operations.seq.desc(), limit=page_size)

    def open_operations(self) -> Sequence[OpenOperation]:
        """The operation in flight and the oldest in the queue, if there are any, judged by the catalog's clock.

        Not the whole queue: recovery asks every two seconds, and thousands may wait.
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
        heard = sa.func.greatest(_operations.dispatch_time, last_vote, last_progress)
        since = sa.func.coalesce(_operations.commit_time, _operations.start_time, _operations.create_time)
        queue = tables.operations.alias("queue").c
        oldest = sa.select(sa.func.min(queue.seq)).where(queue.state == OperationState.QUEUED.name).scalar_subquery()
        with self._databases.catalog_tx() as connection:
            judged = connection.execute(
                sa.select(
                    _operations.id,
                    sa.func.coalesce(heard < now - sa.func.make_interval(0, 0, 0, 0, 0, 0, self._quiet_s), False).label(
                        "quiet"
                    ),
                    sa.cast(sa.extract("epoch", now - since), sa.Float).label("age_s"),
                ).where(sa.or_(_operations.state.in_(_IN_FLIGHT), _operations.seq == oldest))
            ).all()
            loaded = select_operations(
                connection, _operations.id.in_([row.id for row in judged]), order=_operations.seq.asc()
            )
        flags = {row.id: (row.quiet, row.age_s) for row in judged}
        return [OpenOperation(operation, *flags[operation.id]) for operation in loaded]

    def late(self) -> Sequence[Operation]:
        """All that are PREPARING and past their deadline, by the catalog's clock: one at most."""
        preparing = _operations.state == OperationState.PREPARING.name
        with self._databases.catalog_tx() as connection:
            return select_operations(connection, preparing, sa.not_(ledger_steps.IN_TIME))

    def result(self, operation_id: UUID) -> OperationResult | None:
        """What a committed operation has to say; None: it is not committed."""
        with self._databases.catalog_tx() as connection:
            outcomes = select_outcomes(connection, [operation_id])
            if operation_id not in outcomes:
                return None
            counts = select_votes(connection, [operation_id]).get(operation_id, [])
        return OperationResult(outcomes[operation_id], counts)

    def details(self, operation_ids: Sequence[UUID]) -> Mapping[UUID, OperationDetails]:
        """Everything that is shown of operations beside themselves, for each of these."""
        with self._databases.catalog_tx() as connection:
            progress = select_progress(connection, operation_ids)
            outcomes = select_outcomes(connection, operation_ids)
        return {
            operation_id: OperationDetails(progress.get(operation_id, []), outcomes.get(operation_id))
            for operation_id in operation_ids
        }

    # -- transitions ------------------------------------------------------------------------------------------------

    def start_next(self) -> Operation | None:
        """Move the operation whose turn it is to PREPARING; those that are not valid any more become ABORTED on the
        way.

        None: the queue is empty, or an operation is in flight.
        """
        while True:
            try:
                with self._databases.catalog_tx() as connection:
                    dequeued = ledger_steps.start_next(connection, self._deadline_s, self._cost_limits)
            except exc.IntegrityError as error:
                if sqlstate(error) != UNIQUE_VIOLATION:
                    raise
                # uq_operations_in_flight: another process started one between our look and our write.
                return None
            if dequeued is None:
                return None
            if dequeued.valid:
                self._crash.reach("started", operation=dequeued.operation_id)
                return self.get(dequeued.operation_id)
            _count_ended(dequeued.kind, OperationState.ABORTED)

    def claim_dispatch(self, operation_id: UUID) -> bool:
        """Whether the caller sends the fresh chord; the row lock lets one of several recoveries win."""
        now = sa.func.clock_timestamp()
        with self._databases.catalog_tx() as connection:
            result = connection.execute(
                sa.update(tables.operations)
                .where(
                    _operations.id == operation_id,
                    _operations.state == OperationState.PREPARING.name,
                    ledger_steps.IN_TIME,
                    _operations.dispatch_time < now - sa.func.make_interval(0, 0, 0, 0, 0, 0, self._quiet_s),
                )
                .values(dispatch_time=now)
            )
        return bool(result.rowcount)

    def vote(self, operation_id: UUID, counts: ShardCounts) -> Answer:
        """Record a shard's vote. FOR SHARE keeps a decision out until the vote is in, or sees the decision."""
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
        """The commit point: all votes there → COMMITTED, the segment changed and the sequence number drawn, at once.

        Raises:
            WorkFailed: the catalog refuses the change for ever (an integrity error); nothing was decided.
        """
        try:
            with self._databases.catalog_tx() as connection:
                operation = select_operation(connection, operation_id, lock=True)
                if operation is None or operation.state is not OperationState.PREPARING:
                    return Answer.REFUSED
                if len(operation.votes) < self._shard_count:
                    return Answer.REFUSED
                if not ledger_steps.commit(connection, operation):
                    connection.rollback()  # what was changed for it is undone, and the number drawn for it stays unused
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
        """Decide against: one of ``from_states`` → ABORTED, what was reserved given back, in one transaction."""
        with self._databases.catalog_tx() as connection:
            kind = ledger_steps.abort(connection, operation_id, failure, from_states, if_late=if_late)
        if kind is None:
            return False
        _count_ended(kind, OperationState.ABORTED)
        return True

    def all_shards_committed(self, operation_id: UUID) -> float:
        """Note it once, by the catalog's clock; seconds since it was noted first, 0 if it is not COMMITTED any more."""
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
        """COMMITTED → DONE; a deleted segment leaves the catalog in the same transaction, its slug free again."""
        with self._databases.catalog_tx() as connection:
            row = connection.execute(_FINISH, {"operation_id": operation_id}).one_or_none()
            if row is None:
                return False
            if row.kind == OperationKind.DELETE:
                connection.execute(sa.delete(tables.segments).where(tables.segments.c.id == row.segment_id))
        _count_ended(OperationKind(row.kind), OperationState.DONE)
        return True

    # -- hints for people -------------------------------------------------------------------------------------------

    def put_progress(self, operation_id: UUID, progress: ShardProgress) -> None:
        """Remember how far a shard is. Decides nothing; it also says that somebody works on it."""
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
            # The row's reference to its operation is a lock, which is written to disk before the work goes on. Not
            # for a hint: losing it in a crash of the server costs nothing.
            connection.exec_driver_sql("SET LOCAL synchronous_commit TO off")
            connection.execute(_PUT_PROGRESS, values)

    # -- acceptance -------------------------------------------------------------------------------------------------

    def accepted_before(self, method: str, request_id: UUID) -> tuple[UUID, bytes] | None:
        """The operation that this request made and the hash of its content; None: it is new."""
        with self._databases.catalog_tx() as connection:
            return ledger_steps.find_request(connection, method, request_id)

    def segment(self, slug: str) -> Segment | None:
        """The live segment of this slug, ACTIVE or DELETING; None: there is none."""
        with self._databases.catalog_tx() as connection:
            return ledger_steps.find_segment(connection, slug)

    def live_segments(self) -> int:
        """Segments that count towards the limit."""
        with self._databases.catalog_tx() as connection:
            return ledger_steps.count_taken_slugs(connection)

    def draw_segment_id(self) -> int:
        """A numeric id for a new segment; never given twice."""
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
            ServiceError: OVERLOADED: as many wait as may; nothing changed.
        """
        with self._databases.catalog_tx() as connection:
            # A statement of its own: the next ones see what the one before has accepted. So fronts that accept at the
            # same time cannot pass the bounds together.
            connection.execute(sa.select(sa.func.pg_advisory_xact_lock(ACCEPT_LOCK)))
            if request is not None and ledger_steps.find_request(connection, request[0], request[1]) is not None:
                return Accepted(None)
            replaced = ledger_steps.replace_queued(connection, operation_id, plan) if replace_queued else ()
            ledger_steps.check_queue(connection, plan.slug, self._queue)
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
                ledger_steps.insert_request(connection, request, operation_id)
        for _ in replaced:
            _count_ended(OperationKind.ROLL_OUT, OperationState.ABORTED)
        self._crash.reach("accepted-not-answered", operation=operation_id)
        return Accepted(self.get(operation_id), replaced)


def _count_ended(kind: OperationKind, state: OperationState) -> None:
    """Called by whoever won the compare-and-set, after its transaction: so each operation is counted once at most."""
    operations_finished.labels(kind.name, state.name).inc()
