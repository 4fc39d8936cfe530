"""All shards or none: the commit protocol, top to bottom.

The ledger (the operations of the catalog database) is the only truth. Messages, results, Redis and the memory of any
process may be lost at any moment; the next process to work on the operation reads the ledger and goes on. The protocol
knows two small interfaces, ``Ledger`` and ``Participant``, so that a simulation and PostgreSQL run the same code.

    accept    insert QUEUED                                       (services.acceptance; only then answer or dispatch)
    start     QUEUED → PREPARING, one in flight, deadline starts  Ledger.start_next
    prepare   on each shard: lock, fence, work, PREPARE           Participant.prepare
    vote      on the catalog, only while PREPARING and in time    Ledger.vote
    decide    all votes, in time: → COMMITTED with the segment    Ledger.commit         ← the commit point
    commit    COMMIT PREPARED on each shard                       Participant.commit_prepared
    publish   on each shard: read the patch, write it to the      Participant.read_patch, Invalidation.write_patch,
              cache, append it to the shard's list                Invalidation.append_patch
    finish    COMMITTED → DONE; start the next                    Ledger.finish

What survives a crash, by the last step that took effect, and what carries on (recovery runs every two seconds):

    accept                   the queue holds it; recovery starts the next
    start                    quiet for 3 s: recovery sends a fresh chord to the shards without a vote
    prepare on k of n        the prepared transactions stay, locks and all; a fresh header task finds its gid and votes
    vote of k of n           as above; the votes stand
    vote of all              recovery decides
    decide                   recovery (or a late finalizer) commits what is prepared: it has all n prepared
    commit on k of n         recovery commits the rest; the fence shows which shards are done
    publish                  a twin's copy has a token of its own; what the list has already is not appended again
    finish                   recovery starts the next in the queue
    abort                    recovery rolls back all that is prepared under an ABORTED operation, whenever it appears

The deadline is compared by the catalog's clock, in the statement that votes, sends again or decides. So a process that
sleeps through the deadline, however long, commits nothing afterwards; and any process that finds an operation past its
deadline aborts it: a header task, a finalizer, recovery, or a front that is asked for the operation.

Why a shard never commits or rolls back alone: a transaction is committed only after COMMITTED is durable, which needs
every vote; a vote is cast only after PREPARE answered (or its gid was seen), and never after ABORTED, because the vote
locks the row that the abort changes. ROLLBACK PREPARED is sent only for operations that are ABORTED, which is final, or
DONE, when all shards have the fence.
"""

from __future__ import annotations

from collections.abc import Iterable, Mapping, Sequence
from uuid import UUID

from segsvc import metrics
from segsvc.domain.errors import LockTimeout, Reason, ServiceError
from segsvc.domain.operation import (
    Failure,
    Gid,
    Operation,
    OperationState,
    PreparedTransaction,
    ShardCounts,
)
from segsvc.failpoints import CrashPoints
from segsvc.log import get_logger
from segsvc.twophase.ports import (
    IN_DOUBT_STATES,
    UNKNOWN,
    UNREAD,
    Answer,
    Dispatcher,
    FanOut,
    Finish,
    Invalidation,
    Ledger,
    Observer,
    OpenOperation,
    Participant,
    ProgressHook,
    WorkFailed,
)

log = get_logger(__name__)


class Coordinator:
    """The protocol. Safe to run in any number of processes at once.

    Args:
        cluster: this installation's name; gids of other installations are never touched.
    """

    def __init__(
        self,
        *,
        cluster: str,
        ledger: Ledger,
        participants: Sequence[Participant],
        invalidation: Invalidation,
        dispatcher: Dispatcher,
        fan_out: FanOut,
        observer: Observer,
        crash_points: CrashPoints,
    ) -> None:
        self._cluster = cluster
        self._ledger = ledger
        self.participants = participants
        self._invalidation = invalidation
        self._dispatcher = dispatcher
        self._fan_out = fan_out
        self._observer = observer
        self._crash = crash_points
        self._published: tuple[UUID | None, set[int]] = (None, set())
        """The operation that was published last, and the shards for which this process has done it."""

    def gid(self, operation_id: UUID, shard: int) -> Gid:
        return Gid(self._cluster, operation_id, shard)

    # -- start ------------------------------------------------------------------------------------------------------

    def start_next(self) -> Operation | None:
        """Start the operation whose turn it is and send its chord; returns that operation, or None.

        A broker that is out of reach is no error here: the operation is PREPARING, and recovery sends it again.
        """
        operation = self._ledger.start_next()
        if operation is not None:
            self._crash.reach("started-not-dispatched", operation=operation.id)
            self.dispatch(operation, range(len(self.participants)))
        return operation

    def dispatch(self, operation: Operation, shards: Sequence[int]) -> None:
        """Try to send a chord to these shards. Recovery sends again what is lost."""
        try:
            self._dispatcher.dispatch(operation, shards)
        except ServiceError as error:
            if error.reason is not Reason.BROKER_UNAVAILABLE:
                raise
            log.warning("dispatch_failed", operation=str(operation.id))

    # -- a shard's part: the header task ----------------------------------------------------------------------------

    def prepare_shard(self, operation_id: UUID, shard: int, on_progress: ProgressHook) -> None:
        """Prepare one shard and vote for it. Idempotent; may run many times, also at once.

        Raises:
            ServiceError: UNAVAILABLE, transient: run it again.
            LockTimeout: run it again a little later.
        """
        participant = self.participants[shard]
        operation = self._ledger.get(operation_id)
        if operation is None or operation.state is not OperationState.PREPARING:
            return  # A late twin. Recovery does all that it could still do here.
        if operation.late:
            # The message took too long, or its sender was stopped: the shard's lock is not worth taking any more.
            self.abort_late(operation)
            return

        gid = self.gid(operation_id, shard)
        try:
            counts = self._prepare_or_recount(operation, participant, gid, on_progress)
        except WorkFailed as error:
            # Nothing is prepared on this shard, so there will never be a vote of every shard.
            self.abort(operation_id, error.failure)
            return
        if counts is None:
            return

        self._crash.reach("prepared-not-voted", operation=operation_id, shard=shard)
        answer = self._ledger.vote(operation_id, counts)
        if answer is Answer.LATE:
            self.abort_late(operation)
            return
        if answer is Answer.REFUSED:
            # Refused means only "not PREPARING now". COMMITTED is possible too (a twin voted for this shard, and the
            # other steps followed quickly): rolling back then would lose this shard. So read again, and roll back only
            # if the operation is ABORTED, which is final.
            self._crash.reach("vote-refused", operation=operation_id, shard=shard)
            now = self._ledger.get(operation_id)
            if now is not None and now.state is OperationState.ABORTED:
                participant.rollback_prepared(gid)
            return
        self._crash.reach("voted", operation=operation_id, shard=shard)

    def _prepare_or_recount(
        self, operation: Operation, participant: Participant, gid: Gid, on_progress: ProgressHook
    ) -> ShardCounts | None:
        """The counts to vote with; None if a twin has got further than a vote."""
        if participant.has_fence(operation.id):
            return None

        if participant.is_prepared(gid):
            # A twin prepared and died before its vote. Its lock keeps the shard as it was, so counting again gives
            # what it counted.
            return participant.count(operation)
        return participant.prepare(operation, gid, on_progress)

    # -- decision and end: the finalizer ----------------------------------------------------------------------------

    def finalize(self, operation_id: UUID) -> bool:
        """Decide if all votes are in, then carry a COMMITTED operation to DONE. True: it is final now.

        A chord's body can run early or twice; without all votes this returns quietly.

        Raises:
            ServiceError: UNAVAILABLE, transient: run it again; recovery will.
        """
        operation = self._ledger.get(operation_id)
        if operation is None:
            return True

        if operation.state is OperationState.PREPARING:
            if len(operation.votes) < len(self.participants) and not operation.late:
                return False
            self._decide(operation)
            operation = self._ledger.get(operation_id)
            if operation is None:
                return True

        if operation.state is OperationState.COMMITTED:
            self._complete(operation)
            return True
        return operation.state.final

    def _decide(self, operation: Operation) -> None:
        """Decide for a PREPARING operation with all votes, or against one that is late. If another process decided
        first, its decision stands: the caller must read the operation again."""
        if operation.late:
            self.abort_late(operation)
            return

        self._crash.reach("before-decision", operation=operation.id)
        try:
            answer = self._ledger.commit(operation.id)
        except WorkFailed as error:
            # The whole commit point rolled back (it is one transaction), so deciding against is safe. The rollback also
            # released the operation's row: another process may have decided in between, with a number that was free
            # then. In that case this abort finds the operation COMMITTED, and does nothing.
            self._crash.reach("decision-refused", operation=operation.id)
            self.abort(operation.id, error.failure)
            return

        if answer is Answer.LATE:
            self.abort_late(operation)
            return
        self._crash.reach("decided", operation=operation.id)

    def _complete(self, operation: Operation) -> None:
        """COMMIT PREPARED on every shard, then bring the caches up to date, then DONE: in this order, each step
        idempotent.

        The caches change before DONE, because DONE promises a caller that later reads see the change; and after the
        last COMMIT PREPARED: a patch that is read before it does not have the change, and under a generation that is
        dropped before it an entry without the change could be filled.
        """
        self._fan_out(lambda participant: self._commit_shard(operation, participant), self.participants)
        self._crash.reach("committed-not-invalidated", operation=operation.id)

        self._publish(operation)
        self._crash.reach("invalidated-not-done", operation=operation.id)

        self._ledger.finish(operation.id)
        self._crash.reach("done-next-not-started", operation=operation.id)

        self.start_next()

    def _publish(self, operation: Operation) -> None:
        """Patch each shard's cache; if a cache cannot be reached, wait until its old entries have expired.

        Every shard has committed. An old entry in the cache was filled under a lease that was given before the last
        COMMIT PREPARED: under a later lease the shard is read after it, and gives the new bits. Such a lease expires by
        itself, and so does the entry that was filled under it; reads lengthen neither. The time is counted from a
        moment at which every shard is known to have committed. The decision's own time would be too early: a shard
        can be down for days between the two, and old entries of it can be filled until it commits.

        Raises:
            ServiceError: CACHE_UNAVAILABLE: the old entries may not have expired yet.
        """
        if not operation.plan.kind.changes_lists:
            return  # A new segment has no members: it makes no user's list outdated.

        published = self._published_by_us(operation)
        left: dict[int, ServiceError] = {}

        def visit(participant: Participant) -> None:
            if participant.shard in published:
                return
            try:
                self._publish_shard(operation, participant)
            except ServiceError as error:
                if error.reason is not Reason.CACHE_UNAVAILABLE:
                    raise
                left[participant.shard] = error
            else:
                published.add(participant.shard)

        self._fan_out(visit, self.participants)
        if not left:
            return
        waited_s = self._ledger.all_shards_committed(operation.id)
        if waited_s <= self._invalidation.entries_gone_after_s:
            raise left[min(left)]
        log.warning(
            "finished_without_the_cache", operation=str(operation.id), shards=sorted(left), waited_s=round(waited_s)
        )

    def _published_by_us(self, operation: Operation) -> set[int]:
        """The shards for which this process has published an operation. It may be added to.

        Recovery comes here every two seconds as long as one shard's cache is out of reach: what is done needs not be
        done again each time. One operation is in flight at a time, so nothing is remembered of the one before. A
        process that remembers nothing publishes once more, which does no harm.
        """
        if self._published[0] != operation.id:
            self._published = (operation.id, set())
        return self._published[1]

    def _publish_shard(self, operation: Operation, participant: Participant) -> None:
        """Lay the operation over one shard's entries; if that fails, drop them, which is always right.

        Any number of processes may do this at once, late, or die in the middle: a copy of the patch is never changed,
        no reader knows of it before it is in the list, and the list takes each operation once, in order.

        Raises:
            ServiceError: CACHE_UNAVAILABLE: old entries may still be hits. CATALOG_UNAVAILABLE.
        """
        where = {"operation": operation.id, "shard": participant.shard}
        why = "NO_PATCH"
        try:
            patch = participant.read_patch(operation)
            self._crash.reach("patch-read-not-written", **where)
            if patch is not None:
                token = self._invalidation.write_patch(participant.shard, patch)
                self._crash.reach("patch-written-not-appended", **where)
                self._invalidation.append_patch(participant.shard, patch, token)
                self._crash.reach("patch-appended", **where)
                return
        except (ServiceError, LockTimeout) as error:
            # The shard or the cache is out of reach, or the cache has no memory left. If the patch was appended and
            # only the reply was lost, dropping the generation costs hits and nothing else.
            why = "LOCK_TIMEOUT" if isinstance(error, LockTimeout) else error.reason.text

        # A process that slept here while a twin went on must not make a warm cache cold: the twin has published the
        # operation before it ended it.
        now = self._ledger.get(operation.id)
        if now is None or now.state is not OperationState.COMMITTED:
            return
        metrics.patches.labels("failed").inc()
        log.warning("patch_not_published", operation=str(operation.id), shard=participant.shard, why=why)
        self._invalidation.drop_generations([participant.shard])

    def _commit_shard(self, operation: Operation, participant: Participant) -> None:
        """Make a COMMITTED operation's work visible on one shard."""
        self._crash.reach("before-commit-prepared", operation=operation.id, shard=participant.shard)
        outcome = participant.commit_prepared(self.gid(operation.id, participant.shard))
        self._crash.reach("after-commit-prepared", operation=operation.id, shard=participant.shard)

        if outcome is Finish.DONE:
            return
        if outcome is Finish.BUSY:
            raise ServiceError(
                Reason.SHARD_UNAVAILABLE, "a prepared transaction is busy", {"shard": str(participant.shard)}
            )

        # "Not found" alone never means committed. The fence is read after that answer: a twin's COMMIT PREPARED makes
        # the fence visible before the gid disappears.
        if participant.has_fence(operation.id):
            return

        # The shard voted, the decision was made, and there is neither gid nor fence: a server lost a prepared
        # transaction. The work is deterministic, so doing it again gives a result that fits the other shards.
        self._observer.raise_alarm("prepared-lost", operation=str(operation.id), shard=participant.shard)
        participant.redo(operation)

    # -- against ----------------------------------------------------------------------------------------------------

    def abort(
        self,
        operation_id: UUID,
        failure: Failure,
        *,
        from_states: Sequence[OperationState] = (OperationState.QUEUED, OperationState.PREPARING),
        if_late: bool = False,
    ) -> bool:
        """Decide against an operation, then roll back what is prepared. False: it was decided already.

        The decision comes first: a rollback before it would leave a vote for work that is gone.

        Args:
            if_late: only if its deadline has passed.
        """
        self._crash.reach("before-abort", operation=operation_id)
        if not self._ledger.abort(operation_id, failure, from_states=from_states, if_late=if_late):
            return False
        self._crash.reach("aborted-not-rolled-back", operation=operation_id)

        try:
            if OperationState.PREPARING in from_states:  # an operation that never started has nothing prepared
                self._fan_out(lambda participant: self._rollback_shard(operation_id, participant), self.participants)
        except ServiceError as error:
            # ABORTED is durable: recovery rolls back all that is prepared under it, now or later.
            log.warning("rollback_left_to_recovery", operation=str(operation_id), reason=error.reason.text)

        try:
            self.start_next()
        except ServiceError as error:
            # It is decided, as the caller asked; recovery starts the next operation too.
            log.warning("start_left_to_recovery", after=str(operation_id), reason=error.reason.text)
        return True

    def abort_late_ones(self) -> None:
        """Abort what is PREPARING past its deadline. A front does this too, so that the queue moves without a live
        worker.

        Raises:
            ServiceError: the catalog is out of reach.
        """
        for operation in self._ledger.late():
            self.abort_late(operation)

    def abort_late(self, operation: Operation) -> bool:
        """Abort a PREPARING operation whose deadline has passed. False: it was decided already.

        Any process may abort it: neither a vote nor a decision for it can be made any more.
        """
        voted = {counts.shard for counts in operation.votes}
        missing = [str(one.shard) for one in self.participants if one.shard not in voted]

        if missing:
            message = "the shards did not all prepare before the deadline"
        else:
            message = "all shards prepared, but no process decided before the deadline"
        failure = Failure(
            Reason.OPERATION_ABORTED.text, message, {"why": "DEADLINE", "shards_missing": ",".join(missing)}
        )
        return self.abort(operation.id, failure, from_states=(OperationState.PREPARING,), if_late=True)

    def _rollback_shard(self, operation_id: UUID, participant: Participant) -> None:
        participant.rollback_prepared(self.gid(operation_id, participant.shard))

    # -- recovery ---------------------------------------------------------------------------------------------------

    def recover(self) -> None:
        """Carry on the operations that no process works on. Run by beat and at a worker's start; safe to run twice at
        once.

        Prepared transactions are read first and the ledger after them: what was prepared then has a ledger row that
        is at least as new. In the opposite order, an operation could be decided in between, and be judged by an old
        state.

        Raises:
            ServiceError: the catalog is out of reach (nothing was done), or a shard was (all other shards were done).
        """
        found: dict[int, Sequence[PreparedTransaction]] = {}
        first_error: ServiceError | None = None

        def read_prepared(participant: Participant) -> None:
            found[participant.shard] = participant.prepared()  # each visit has a key of its own

        try:
            self._fan_out(read_prepared, self.participants)
        except ServiceError as error:  # a shard out of reach delays only itself
            first_error = error
        self._crash.reach("recovery-looked", found=sum(map(len, found.values())))
        ours = {shard: self._ours(self.participants[shard], prepared) for shard, prepared in found.items()}

        try:
            states = self._ledger.states({gid.operation_id for gids in ours.values() for gid in gids})
        except ServiceError:
            # Prepared transactions grow older during this outage too, and people should see their ages.
            self._report_in_doubt(ours, None)
            raise
        self._report_in_doubt(ours, states)

        for shard, gids in ours.items():
            for gid in gids:
                try:
                    self._settle(self.participants[shard], gid, states.get(gid.operation_id))
                except ServiceError as error:
                    first_error = first_error or error

        open_operations = self._ledger.open_operations()
        self._report_not_ended(open_operations)
        for open_operation in open_operations:
            try:
                self._advance(open_operation)
            except ServiceError as error:
                first_error = first_error or error

        self.start_next()
        if first_error is not None:
            raise first_error

    def _ours(self, participant: Participant, found: Iterable[PreparedTransaction]) -> Mapping[Gid, float]:
        """Ages of this installation's gids on the right shard. Raises an alarm for a gid that only looks like ours."""
        ours: dict[Gid, float] = {}
        for prepared in found:
            gid = Gid.parse(prepared.gid)
            if gid is not None and gid.cluster == self._cluster and gid.shard == participant.shard:
                ours[gid] = prepared.age_s
            elif prepared.gid.startswith("segsvc:"):
                self._observer.raise_alarm("foreign-prepared", gid=prepared.gid, shard=participant.shard)
        return ours

    def _report_in_doubt(
        self, ours: Mapping[int, Mapping[Gid, float]], states: Mapping[UUID, OperationState] | None
    ) -> None:
        """Report the age of the oldest prepared transaction per state. ``states`` None: the ledger was out of reach."""
        for shard, gids in ours.items():
            oldest_s = dict.fromkeys(IN_DOUBT_STATES, 0.0)
            for gid, age_s in gids.items():
                state = None if states is None else states.get(gid.operation_id)
                name = UNREAD if states is None else UNKNOWN if state is None else state.name
                oldest_s[name] = max(oldest_s[name], age_s)
            self._observer.in_doubt(shard, oldest_s)

    def _report_not_ended(self, open_operations: Iterable[OpenOperation]) -> None:
        oldest_s = {state: 0.0 for state in OperationState if not state.final}
        for one in open_operations:
            if one.operation.state in oldest_s:  # it may have ended between the ledger's two reads of it
                oldest_s[one.operation.state] = max(oldest_s[one.operation.state], one.age_s)
        self._observer.not_ended(oldest_s)

    def _settle(self, participant: Participant, gid: Gid, state: OperationState | None) -> None:
        """End one prepared transaction as its operation's state requires; leave it while nothing is decided."""
        if state is None:
            # Another catalog has the operation, or it was deleted by hand: recovery cannot decide this.
            self._observer.raise_alarm("unknown-prepared", gid=str(gid), shard=participant.shard)
        elif state is OperationState.COMMITTED:
            participant.commit_prepared(gid)
        elif state is OperationState.ABORTED:
            participant.rollback_prepared(gid)  # also if a zombie prepared it long after the abort
        # DONE: every shard has the fence, so this can only be a twin's second copy of the work; or it was found just
        # before it was committed, and is gone by now.
        elif state is OperationState.DONE and participant.rollback_prepared(gid) is Finish.DONE:
            self._observer.raise_alarm("prepared-after-done", gid=str(gid), shard=participant.shard)

    def _advance(self, open_operation: OpenOperation) -> None:
        """Do the next step of an operation that is not final, if no other process seems to work on it."""
        operation = open_operation.operation
        if operation.state is OperationState.COMMITTED:
            self._complete(operation)
        elif operation.state is OperationState.PREPARING:
            voted = {counts.shard for counts in operation.votes}
            missing = [participant.shard for participant in self.participants if participant.shard not in voted]

            if operation.late:
                self.abort_late(operation)
            elif not missing:
                self.finalize(operation.id)
            elif open_operation.quiet and self._ledger.claim_dispatch(operation.id):
                self.dispatch(operation, missing)
