"""A shard as a participant of the commit protocol: plain SQL around PREPARE TRANSACTION.

SQLAlchemy's own two-phase support is not used: closing its connection rolls the prepared transaction back.
"""

from __future__ import annotations

from collections.abc import Callable, Iterator, Sequence
from contextlib import AbstractContextManager, contextmanager
from typing import Any, Final, Protocol
from uuid import UUID

import psycopg2
import sqlalchemy as sa
from sqlalchemy import exc

from segsvc.domain.errors import LockTimeout, Reason, shard_unavailable
from segsvc.domain.evaluation import Evaluation
from segsvc.domain.operation import Failure, Gid, Operation, PreparedTransaction, ShardCounts
from segsvc.domain.patch import Patch
from segsvc.failpoints import CrashPoints
from segsvc.log import get_logger
from segsvc.postgres import tables
from segsvc.postgres.engine import Databases, sqlstate
from segsvc.postgres.shard.epochs import insert_fence
from segsvc.postgres.shard.operation_transaction import PostgresShardTransaction, lock_exclusive
from segsvc.postgres.shard.patches import PostgresPatches
from segsvc.twophase.ports import Finish, ProgressHook, WorkFailed

log = get_logger(__name__)

UNDEFINED_OBJECT = "42704"
OBJECT_NOT_IN_PREREQUISITE_STATE = "55000"
DUPLICATE_OBJECT = "42710"
_REFUSALS = ("22", "23", "42", "54")
"""SQLSTATE classes that do not pass when tried again: data exception, integrity violation, wrong statement, and a
statement that exceeds a limit of the server."""

# Built once: building one takes as long as running it.
_HAS_FENCE: Final = sa.select(
    sa.exists().where(tables.applied_operations.c.operation_id == sa.bindparam("operation_id"))
)
_IS_PREPARED: Final = sa.text(
    "SELECT EXISTS (SELECT FROM pg_prepared_xacts WHERE database = current_database() AND gid = :gid)"
)
_SELECT_PREPARED: Final = sa.text(
    "SELECT gid, extract(epoch FROM clock_timestamp() - prepared)::float8 AS age_s "
    "FROM pg_prepared_xacts WHERE database = current_database() ORDER BY prepared"
)

Snapshots = Callable[[], AbstractContextManager[PostgresShardTransaction]]
"""Opens a read-only transaction of one snapshot, which waits for nobody and for which nobody waits."""


class Work(Protocol):
    """An operation's work on one shard. See ``services.shard_work.OperationWork``."""

    def evaluate(self, snapshots: Snapshots, operation: Operation, on_progress: ProgressHook) -> Evaluation | None:
        """Evaluate the operation's rule for every user; None: it has no rule."""

    def perform(
        self,
        tx: PostgresShardTransaction,
        operation: Operation,
        on_progress: ProgressHook,
        *,
        write: bool,
        earlier: Evaluation | None = None,
    ) -> ShardCounts:
        """Do the work, or only count it; ``earlier``: what was evaluated before the lock."""


class PostgresParticipant:
    """One shard database. Implements ``twophase.Participant``."""

    def __init__(self, databases: Databases, shard: int, work: Work, crash_points: CrashPoints) -> None:
        self._databases = databases
        self._work = work
        self._crash = crash_points
        self.shard = shard

    def has_fence(self, operation_id: UUID) -> bool:
        """Whether the operation's work is committed on this shard."""
        with self._databases.shard_tx(self.shard) as connection:
            return _has_fence(connection, operation_id)

    def prepared(self) -> Sequence[PreparedTransaction]:
        """All prepared transactions of this shard's database, foreign ones included, with their age by the shard's
        clock."""
        with self._databases.shard_tx(self.shard) as connection:
            return select_prepared(connection)

    def is_prepared(self, gid: Gid) -> bool:
        """Whether a transaction of this gid is prepared now."""
        with self._databases.shard_tx(self.shard) as connection:
            return bool(connection.execute(_IS_PREPARED, {"gid": str(gid)}).scalar_one())

    def prepare(self, operation: Operation, gid: Gid, on_progress: ProgressHook) -> ShardCounts | None:
        """Evaluate, lock, fence, work, PREPARE TRANSACTION. See ``twophase.Participant.prepare``."""
        where = {"operation": operation.id, "shard": self.shard}
        # Before the lock, because a condition may take half a minute, and events wait as long as the lock is held.
        # Under the lock, only users who have changed since then are evaluated. Their notes are still there: upkeep
        # keeps every note for longer than an operation's deadline, and after the deadline no vote counts.
        with self._refusals(operation):
            evaluation = self._work.evaluate(self._snapshot, operation, on_progress)
        self._crash.reach("evaluated-not-locked", **where)

        with self._databases.shard_connection(self.shard) as connection:
            lock_exclusive(connection)
            self._crash.reach("locked-not-prepared", **where)
            if not insert_fence(connection, operation):
                return None  # a twin's fence is there; leaving the block rolls back

            with self._refusals(operation):
                tx = PostgresShardTransaction(connection, self.shard)
                counts = self._work.perform(tx, operation, on_progress, write=True, earlier=evaluation)
            self._crash.reach("worked-not-prepared", **where)

            try:
                tag = _utility(connection, "PREPARE TRANSACTION", gid)
            except exc.DBAPIError as error:
                if sqlstate(error) == DUPLICATE_OBJECT:
                    # A twin has prepared under this gid. Its copy is as good as ours: the next run counts and votes.
                    raise shard_unavailable(self.shard) from error
                raise
            if tag != "PREPARE TRANSACTION":
                # If the transaction failed or was lost, the server answers ROLLBACK and raises no error. A vote now
                # would lose the shard's work.
                log.error("prepare_rolled_back", operation=str(operation.id), shard=self.shard, tag=tag)
                raise shard_unavailable(self.shard)

            # The driver still takes itself to be inside a transaction; its ROLLBACK leaves the prepared one in place.
            connection.rollback()

        self._crash.reach("prepare-answered", **where)
        return counts

    @contextmanager
    def _snapshot(self) -> Iterator[PostgresShardTransaction]:
        with self._databases.shard_snapshot(self.shard) as connection:
            yield PostgresShardTransaction(connection, self.shard)

    @contextmanager
    def _refusals(self, operation: Operation) -> Iterator[None]:
        """Tell what the database refuses from what fails now. It will always refuse it: the work is deterministic.

        Raises:
            WorkFailed: data or constraints forbid it; the reason is in the log, not in the message.
        """
        try:
            yield
        except (exc.DBAPIError, psycopg2.Error) as error:  # psycopg2.Error comes from COPY, which bypasses SQLAlchemy
            if not sqlstate(error).startswith(_REFUSALS):
                raise
            log.exception("work_refused", operation=str(operation.id), shard=self.shard, sqlstate=sqlstate(error))
            metadata = {"why": "SHARD_REFUSED", "shard": str(self.shard)}
            raise WorkFailed(
                Failure(Reason.INTERNAL.text, f"shard {self.shard} refused the change; run the checker", metadata)
            ) from error

    def count(self, operation: Operation) -> ShardCounts:
        """Count what a prepared operation changes, without changing anything."""
        with self._databases.shard_connection(self.shard) as connection:
            # No lock: the prepared transaction holds it exclusively, so users and bits do not change meanwhile.
            tx = PostgresShardTransaction(connection, self.shard)
            return self._work.perform(tx, operation, lambda _: None, write=False)

    def commit_prepared(self, gid: Gid) -> Finish:
        """COMMIT PREPARED, outside any transaction, as the server requires."""
        return self._finish("COMMIT PREPARED", gid)

    def rollback_prepared(self, gid: Gid) -> Finish:
        """ROLLBACK PREPARED. The caller has made sure that the operation is ABORTED, or DONE on every shard."""
        return self._finish("ROLLBACK PREPARED", gid)

    def redo(self, operation: Operation) -> None:
        """Do the work and write its fence in one ordinary transaction; do nothing if the fence is there already.

        Raises:
            ServiceError: SHARD_UNAVAILABLE, also when the shard's lock was not acquired in time: the decision stands,
                so all that the caller can do is try again.
        """
        try:
            with self._databases.shard_tx(self.shard) as connection:
                lock_exclusive(connection)
                if insert_fence(connection, operation):
                    # All under the lock: no deadline bounds this, so notes of changes might be forgotten meanwhile.
                    tx = PostgresShardTransaction(connection, self.shard)
                    self._work.perform(tx, operation, lambda _: None, write=True)
        except LockTimeout as error:
            raise shard_unavailable(self.shard) from error

    def read_patch(self, operation: Operation) -> Patch | None:
        """What the operation changed in the lists of this shard's users. See ``PostgresPatches.read``."""
        return PostgresPatches(self._databases).read(self.shard, operation)

    def _finish(self, command: str, gid: Gid) -> Finish:
        try:
            with self._databases.shard_autocommit(self.shard) as connection:
                _utility(connection, command, gid)
        except exc.DBAPIError as error:
            state = sqlstate(error)
            if state == UNDEFINED_OBJECT:
                return Finish.NOT_FOUND
            if state == OBJECT_NOT_IN_PREREQUISITE_STATE:
                return Finish.BUSY
            raise
        return Finish.DONE


def select_prepared(connection: sa.Connection) -> list[PreparedTransaction]:
    """Prepared transactions of this database as they are now, not as of a snapshot; oldest first."""
    return [PreparedTransaction(row.gid, row.age_s) for row in connection.execute(_SELECT_PREPARED)]


def _has_fence(connection: sa.Connection, operation_id: UUID) -> bool:
    return bool(connection.execute(_HAS_FENCE, {"operation_id": operation_id}).scalar_one())


def _utility(connection: sa.Connection, command: str, gid: Gid) -> str:
    """Run a two-phase command and return the server's command tag: only the tag says what happened."""
    # The driver quotes the gid; the server takes no parameters in utility commands.
    result: Any = connection.exec_driver_sql(f"{command} %s", (str(gid),))
    return str(result.context.cursor.statusmessage)
