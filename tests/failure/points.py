"""The points of the matrix: for each, how a process is caught there, and how the fault falls on it.

Each script is read top to bottom: arm the stops, make the call, wait for the wanted situation, strike.
"""

from __future__ import annotations

import contextlib
import os
import signal
from collections.abc import Iterator

from tests.failure.cell import Fault, Kind
from tests.failure.point import POINTS, point
from tests.failure.rig import SECOND, SHARDS, USERS, gone
from tests.failure.scene import NotReached, Scene, Stop
from tests.failure.wire import Phase

__all__ = ["POINTS"]


def _others_voted(scene: Scene, stop: Stop) -> None:
    """Wait until a process is caught and only this shard's vote is missing."""
    scene.caught(stop)
    scene.until(lambda: scene.votes() >= set(scene.others), f"votes of {scene.others}")


# -- before the shards ----------------------------------------------------------------------------------------------


@point("accepted", "after the ledger insert, before the answer")
def accepted(scene: Scene) -> None:
    stop = scene.failpoint("accepted-not-answered")
    scene.call()
    scene.strike(stop)


@point("queued", "QUEUED behind another operation, its caller or its front gone")
def queued(scene: Scene) -> None:
    blocker = scene.failpoint("prepared-not-voted", "shard=0")
    client = scene.rig.serving()
    client.start_roll_out(SECOND, 100 - scene.percent)
    scene.caught(blocker)
    scene.call()
    scene.until(lambda: scene.state() == "QUEUED", "it is in the queue")
    assert scene.the_call is not None
    front = scene.the_call.client
    scene.strike(blocker, pid=scene.rig.pid_of(front.name), cut=lambda _: scene.rig.hang_up(front))


@point("started", "the start is committed, nothing is dispatched")
def started(scene: Scene) -> None:
    stop = scene.failpoint("started")
    scene.call()
    scene.strike(stop, undecided=True)


@point(
    "mid-publish",
    "some of the chord's messages are sent, the one for this shard is not",
    on_shard=True,
    impossible={Kind.CREATION: "the front carries a creation out itself: it publishes nothing"},
)
def mid_publish(scene: Scene) -> None:
    words = (b"LPUSH", b"segsvc.prepare_shard", f"shard {scene.shard}}}".encode())
    wire = scene.rig.broker_wire
    stop = wire.trap(Phase.REQUEST, lambda _, message: all(word in message for word in words))
    scene.call()
    scene.strike(stop, undecided=True, cut=wire.cut)


# -- a shard's part -------------------------------------------------------------------------------------------------


@point("evaluated", "the rule is evaluated, the shard's lock is not asked for", on_shard=True)
def evaluated(scene: Scene) -> None:
    stop = scene.failpoint("evaluated-not-locked", f"shard={scene.shard}")
    scene.call()
    _others_voted(scene, stop)
    scene.strike(stop, undecided=True)


@point("locked", "the shard's lock is held, nothing is prepared", on_shard=True)
def locked(scene: Scene) -> None:
    stop = scene.failpoint("locked-not-prepared", f"shard={scene.shard}")
    scene.call()
    _others_voted(scene, stop)
    # Frozen with the lock, the process keeps every twin out: only the deadline can end that.
    scene.strike(stop, undecided=True, blocks_twins=True)


@point("prepare-reply-lost", "PREPARE TRANSACTION took effect, its reply does not arrive", on_shard=True)
def prepare_reply_lost(scene: Scene) -> None:
    stop = scene.reply("PREPARE TRANSACTION")
    scene.call()
    _others_voted(scene, stop)
    scene.strike(stop, undecided=True)


@point("prepare-rolled-back", "the server answers PREPARE TRANSACTION with ROLLBACK", on_shard=True, itself=True)
def prepare_rolled_back(scene: Scene) -> None:
    scene.request("PREPARE TRANSACTION", shards=[scene.shard], spoil=True)
    stop = scene.reply("ROLLBACK", where=lambda session: session.statement.startswith("PREPARE TRANSACTION"))
    scene.call()
    _others_voted(scene, stop)
    scene.strike(stop, undecided=True)


@point("prepared", "the shard is prepared, its vote is not cast", on_shard=True)
def prepared(scene: Scene) -> None:
    stop = scene.failpoint("prepared-not-voted", f"shard={scene.shard}")
    scene.call()
    _others_voted(scene, stop)
    scene.strike(stop, undecided=True)


@point("voting", "the vote is written and not committed; it has the ledger's row", on_shard=True)
def voting(scene: Scene) -> None:
    stop = scene.failpoint("vote-not-committed", f"shard={scene.shard}")
    scene.call()
    _others_voted(scene, stop)
    scene.strike(stop, undecided=True)


@point("vote-reply-lost", "the vote is committed, the reply does not arrive", on_shard=True)
def vote_reply_lost(scene: Scene) -> None:
    mine = f"{scene.shard} AS shard"
    stop = scene.reply(
        "COMMIT",
        database="catalog",
        where=lambda session: any("INTO votes" in text and mine in text for text in session.transaction),
    )
    scene.call()
    scene.strike(stop)


@point(
    "vote-refused",
    "the vote comes too late: a twin's was counted, it is decided, this shard has not committed",
    on_shard=True,
    itself=True,
)
def vote_refused(scene: Scene) -> None:
    first = scene.failpoint("prepared-not-voted", f"shard={scene.shard}")
    gate = scene.request("COMMIT PREPARED", shards=[scene.shard], every=True)

    scene.call()
    # One process prepares all shards of a creation: frozen during the PREPARE of another shard, it would hold that
    # shard's lock.
    _others_voted(scene, first)
    late = scene.caught(first)

    stop = scene.failpoint("vote-refused", f"shard={scene.shard}")
    with scene.frozen(late):
        first.let_go()
        scene.until(lambda: scene.state() == "COMMITTED", "a twin votes, and it is decided")
        scene.caught(gate)

    scene.until(lambda: late in stop.pids, "its vote is refused")  # votes of other twins may be refused as well
    scene.strike(stop, gate, pid=late)


_NO_CHORD = "the front carries a creation out itself: there is no chord"


@point(
    "result-not-stored",
    "the vote is cast, Celery does not have the task's result",
    on_shard=True,
    impossible={Kind.CREATION: _NO_CHORD},
)
def result_not_stored(scene: Scene) -> None:
    stop = scene.failpoint("voted", f"shard={scene.shard}")
    scene.call()
    scene.strike(stop, cut=scene.rig.broker_wire.cut)


@point(
    "chord-lost",
    "the chord's keys are lost while this shard's task is at work",
    on_shard=True,
    itself=True,
    impossible={Kind.CREATION: _NO_CHORD},
)
def chord_lost(scene: Scene) -> None:
    stop = scene.failpoint("voted", f"shard={scene.shard}")
    scene.call()
    scene.caught(stop)
    broker = scene.rig.broker

    def counted() -> bool:
        return any(broker.zcard(key) == SHARDS - 1 for key in broker.keys(f"{scene.rig.prefix}celery-taskset-meta-*.j"))

    scene.until(counted, "the chord has counted the other shards")

    if not broker.delete(*broker.keys(f"{scene.rig.prefix}celery-taskset-meta-*")):
        raise NotReached("the chord had no keys")

    scene.strike(stop, cut=scene.rig.broker_wire.cut)


@point("body-early", "the chord's body runs before this shard has voted", on_shard=True, itself=True)
def body_early(scene: Scene) -> None:
    stop = scene.failpoint("prepared-not-voted", f"shard={scene.shard}")
    scene.call()
    _others_voted(scene, stop)

    sent = scene.rig.celery.send_task(
        "segsvc.finalize", kwargs={"operation_id": scene.operation, "title": "early"}, queue="operations"
    )
    if sent.get(timeout=15) != "early: votes are missing":
        raise NotReached("the body did not find a vote missing")

    scene.strike(stop, undecided=True)


# -- the decision ---------------------------------------------------------------------------------------------------


@point("undecided", "all votes are in, the decision is not made")
def undecided(scene: Scene) -> None:
    stop = scene.failpoint("before-decision")
    scene.call()
    scene.strike(stop)


@point("deciding", "the decision is written and not committed; it has the ledger's row")
def deciding(scene: Scene) -> None:
    stop = scene.failpoint("decision-not-committed")
    scene.call()
    scene.strike(stop)


@point("decision-reply-lost", "the decision is committed, the reply does not arrive")
def decision_reply_lost(scene: Scene) -> None:
    stop = scene.reply(
        "COMMIT",
        database="catalog",
        where=lambda session: any("UPDATE operations" in text and "COMMITTED" in text for text in session.transaction),
    )
    scene.call()
    scene.strike(stop)


@contextlib.contextmanager
def _numbers_taken(scene: Scene, count: int) -> Iterator[None]:
    """Take the numbers of the next decisions: as long as the block lasts, their audit rows cannot be written."""
    rows = scene.rig.rows(
        None,
        "INSERT INTO audit (seq, action, segment_id, slug, details) "
        "SELECT last_value + n, 'test', 0, 'test', '{}' FROM commit_seq, generate_series(1, :count) n RETURNING seq",
        count=count,
    )

    try:
        yield
    finally:
        scene.rig.rows(None, "DELETE FROM audit WHERE seq = ANY(:seqs)", seqs=[row.seq for row in rows])


@point("decision-refused", "an integrity error at the commit point", itself=True)
def decision_refused(scene: Scene) -> None:
    stop = scene.error("23505", database="catalog")
    if scene.cell.fault is Fault.NONE:
        # Recovery may decide before the abort is made; it must meet the error as well, or the operation is done.
        with _numbers_taken(scene, 50):
            scene.call()
            scene.expected = "ABORTED"
            scene.strike(stop)
            scene.until(lambda: scene.state() == "ABORTED", "it is aborted")
        return

    with _numbers_taken(scene, 1):
        scene.call()
        scene.caught(stop)

    scene.strike(stop)


@point(
    "decision-contested", "an integrity error at the commit point, and another decides before the abort", itself=True
)
def decision_contested(scene: Scene) -> None:
    stop = scene.error("23505", database="catalog")
    with _numbers_taken(scene, 1):
        scene.call()
        scene.caught(stop)
        # For the server the transaction is over, and the next number is free. So recovery decides, and the operation
        # becomes DONE.
        scene.until(lambda: scene.state() == "DONE", "another one decides")
    scene.strike(stop)


# -- past the deadline ------------------------------------------------------------------------------------------------


def _wakes_late(scene: Scene, stop: Stop) -> None:
    """Make the call, let the deadline pass while a process is caught, and let that process go on.

    No process has aborted the operation yet: every process that is about to abort it, this one included, is caught
    before it does. There the fault falls on this process.
    """
    aborting = scene.failpoint("before-abort")

    scene.call()
    pid = scene.caught(stop)
    scene.let_deadline_pass()
    stop.let_go()

    scene.until(lambda: pid in aborting.pids, "it finds itself late")
    if scene.state() != "PREPARING":
        raise NotReached(f"it is {scene.state()} before anybody aborts it")

    scene.expected = "ABORTED"
    scene.strike(aborting, pid=pid)


@point(
    "late-task",
    "the deadline passes before the chord is sent, and nobody has aborted the operation yet",
    itself=True,
    impossible={Kind.CREATION: "the front carries a creation out itself: there is no chord"},
)
def late_task(scene: Scene) -> None:
    stop = scene.failpoint("started-not-dispatched")
    working = scene.failpoint("locked-not-prepared")
    aborting = scene.failpoint("before-abort")

    scene.call()
    pid = scene.caught(stop)
    scene.let_deadline_pass()
    stop.let_go()

    # The starter has sent the chord; the tasks abort, and so does every other process that finds the operation late.
    scene.until(lambda: set(aborting.pids) - {pid}, "a task finds itself late")
    if working.pids or scene.state() != "PREPARING":
        raise NotReached("the work was begun after the deadline")

    scene.expected = "ABORTED"
    scene.strike(aborting)


@point("late-vote", "the shard is prepared, and the deadline passes before its vote", on_shard=True, itself=True)
def late_vote(scene: Scene) -> None:
    _wakes_late(scene, scene.failpoint("prepared-not-voted", f"shard={scene.shard}"))
    if scene.shard in scene.votes():
        raise NotReached("its vote was counted")


@point("late-decision", "all votes are in, and the deadline passes before the decision", itself=True)
def late_decision(scene: Scene) -> None:
    _wakes_late(scene, scene.failpoint("before-decision"))


# -- after the decision ---------------------------------------------------------------------------------------------


@point("decided-0", "decided, no shard has committed")
def decided_0(scene: Scene) -> None:
    stop = scene.failpoint("decided")
    # Without this gate recovery would commit at once.
    gate = scene.request("COMMIT PREPARED", shards=list(range(SHARDS)), every=True)
    scene.call()
    scene.caught(stop)
    scene.strike(stop, gate)


@point("decided-1", "decided, this shard alone has committed", on_shard=True)
def decided_1(scene: Scene) -> None:
    gate = scene.request("COMMIT PREPARED", shards=scene.others, every=True)
    scene.call()
    scene.caught(gate)
    scene.until(lambda: scene.fenced(scene.shard), "this shard has committed")
    scene.strike(gate)


@point("decided-k", "decided, all shards but this one have committed", on_shard=True)
def decided_k(scene: Scene) -> None:
    gate = scene.request("COMMIT PREPARED", shards=[scene.shard], every=True)
    scene.call()
    scene.caught(gate)
    scene.until(lambda: all(map(scene.fenced, scene.others)), "the other shards have committed")
    scene.strike(gate)


@point("commit-reply-lost", "COMMIT PREPARED took effect, its reply does not arrive", on_shard=True)
def commit_reply_lost(scene: Scene) -> None:
    stop = scene.reply("COMMIT PREPARED")
    scene.call()
    scene.strike(stop)


@point("busy", "55000: somebody else is at this shard's prepared transaction", on_shard=True, itself=True)
def busy(scene: Scene) -> None:
    gate = scene.request("COMMIT PREPARED", shards=[scene.shard], every=True)
    scene.call()
    scene.caught(gate)
    stop = scene.error("55000")
    with contextlib.ExitStack() as somebody:
        somebody.enter_context(scene.rig.commit_prepared_under_way(scene.shard, scene.gid))
        gate.let_go()
        scene.strike(stop, between=somebody.close)


@point("gone-committed", "42704 with the fence: somebody else has committed this shard", on_shard=True, itself=True)
def gone_committed(scene: Scene) -> None:
    _found_gone(scene, "COMMIT PREPARED")


@point("gone-lost", "42704 without the fence: the prepared transaction is lost", on_shard=True, itself=True)
def gone_lost(scene: Scene) -> None:
    scene.alarm = "prepared-lost"
    _found_gone(scene, "ROLLBACK PREPARED")


def _found_gone(scene: Scene, command: str) -> None:
    gate = scene.request("COMMIT PREPARED", shards=[scene.shard], every=True)
    scene.call()
    scene.caught(gate)
    scene.rig.finish_by_hand(scene.shard, command, scene.gid)
    stop = scene.error("42704")
    gate.let_go()
    scene.strike(stop)


@point(
    "not-invalidated",
    "all shards have committed, the cache does not know",
    impossible={Kind.CREATION: "a creation invalidates nothing; 'not-done' is the same moment"},
)
def not_invalidated(scene: Scene) -> None:
    stop = scene.failpoint("committed-not-invalidated")
    scene.call()
    scene.strike(stop)


@point("not-done", "all but the last mark")
def not_done(scene: Scene) -> None:
    stop = scene.failpoint("invalidated-not-done")
    scene.call()
    scene.strike(stop)


# -- the patch ------------------------------------------------------------------------------------------------------

_NO_PATCH = {Kind.CREATION: "a creation changes nobody's list: it publishes no patch"}


@point("patch-not-written", "the shard's patch is read, nothing of it is written", on_shard=True, impossible=_NO_PATCH)
def patch_not_written(scene: Scene) -> None:
    stop = scene.failpoint("patch-read-not-written", f"shard={scene.shard}")
    scene.call()
    scene.strike(stop)


@point("patch-not-listed", "the patch's chunks are written, no list names them", on_shard=True, impossible=_NO_PATCH)
def patch_not_listed(scene: Scene) -> None:
    stop = scene.failpoint("patch-written-not-appended", f"shard={scene.shard}")
    scene.call()
    scene.strike(stop)


@point("patch-listed", "the patch is in the shard's list", on_shard=True, impossible=_NO_PATCH)
def patch_listed(scene: Scene) -> None:
    stop = scene.failpoint("patch-appended", f"shard={scene.shard}")
    scene.call()
    scene.strike(stop)


@point(
    "patch-twice",
    "two publishers have written the shard's patch, no list names it",
    on_shard=True,
    impossible=_NO_PATCH,
)
def patch_twice(scene: Scene) -> None:
    stop = scene.failpoint("patch-written-not-appended", f"shard={scene.shard}")
    before = scene.rig.chunk_tokens(scene.shard)
    scene.call()
    scene.caught(stop, count=2)
    if len(scene.rig.chunk_tokens(scene.shard) - before) < 2:
        raise NotReached("both use the same chunks")
    scene.strike(stop)


@point(
    "patch-late",
    "a publisher wakes when a twin has ended its operation, and the next one is published too",
    on_shard=True,
    itself=True,
    impossible=_NO_PATCH,
)
def patch_late(scene: Scene) -> None:
    written = scene.failpoint("patch-written-not-appended", f"shard={scene.shard}")
    scene.call()
    late = scene.caught(written)

    with scene.frozen(late):
        written.let_go(besides=late)
        scene.until(lambda: scene.state() == "DONE", "a twin ends it")
        scene.rig.serving().roll_out(SECOND, scene.percent / 2)
        stop = scene.failpoint("invalidated-not-done")

    scene.until(lambda: late in stop.pids, "it has published all it wanted")
    scene.strike(stop, pid=late)


@point(
    "patch-chunks-lost",
    "the patch's chunks are lost before the list names them",
    on_shard=True,
    itself=True,
    impossible=_NO_PATCH,
)
def patch_chunks_lost(scene: Scene) -> None:
    stop = scene.failpoint("patch-written-not-appended", f"shard={scene.shard}")
    scene.call()
    scene.caught(stop)
    cache = scene.rig.cache
    if not cache.delete(*scene.rig.chunks(scene.shard)):
        raise NotReached("the patch had no chunks")
    scene.strike(stop)


@point(
    "generation-lost",
    "the shard's generation is lost, and another one drawn, between the patch's chunks and the list",
    on_shard=True,
    itself=True,
    impossible=_NO_PATCH,
)
def generation_lost(scene: Scene) -> None:
    stop = scene.failpoint("patch-written-not-appended", f"shard={scene.shard}")
    scene.call()
    scene.caught(stop)

    cache, generation = scene.rig.cache, scene.rig.keys.generation(scene.shard)
    if not cache.delete(generation):
        raise NotReached("there was no generation")
    user = next(user for user in USERS if user % SHARDS == scene.shard)
    list(scene.rig.serving().many_user_segments([user]))
    scene.until(lambda: cache.exists(generation), "a read draws another one")
    scene.strike(stop)


# -- what comes late, and recovery ----------------------------------------------------------------------------------


@point("late-after-aborted", "this shard's PREPARE TRANSACTION arrives after ABORTED", on_shard=True)
def late_after_aborted(scene: Scene) -> None:
    request = scene.request("PREPARE TRANSACTION", shards=[scene.shard])
    arrived = scene.reply("PREPARE TRANSACTION")

    scene.call()
    _others_voted(scene, request)

    assert scene.the_call is not None
    scene.rig.serving(besides=scene.the_call.client).cancel(scene.operation)
    scene.until(lambda: scene.state() == "ABORTED", "it is cancelled")

    scene.expected = "ABORTED"
    scene.strike_late(request, arrived)


@point("late-after-done", "this shard's work begins, or is prepared again, after DONE", on_shard=True, itself=True)
def late_after_done(scene: Scene) -> None:
    if scene.cell.fault is Fault.NONE:
        scene.call()
        scene.until(lambda: scene.state() == "DONE", "it is done")
        scene.alarm = "prepared-after-done"
        stop = scene.reply("ROLLBACK PREPARED")
        scene.rig.prepare_by_hand(scene.shard, scene.gid)
        scene.strike(stop)
        return

    lock = "SELECT pg_advisory_xact_lock("
    request = scene.request(lock, shards=[scene.shard])

    scene.call()
    scene.caught(request)
    scene.until(lambda: scene.state() == "DONE", "a twin carries it to its end")

    arrived = scene.reply("SELECT 1", where=lambda session: session.statement.startswith(lock))
    scene.strike_late(request, arrived)


@point("recovery-twice", "two recoveries have looked; this shard is decided and not committed", on_shard=True)
def recovery_twice(scene: Scene) -> None:
    gate = scene.request("COMMIT PREPARED", shards=[scene.shard], every=True)

    # Each recovery is held from its next look on. One that came later would go on to this shard's COMMIT PREPARED, wait
    # at the gate, and never look again. The ledger, by which they act, they read when they are let go.
    looked = scene.failpoint("recovery-looked")
    scene.call()
    finalizer = scene.caught(gate)
    scene.until(lambda: all(map(scene.fenced, scene.others)), "the other shards have committed")
    scene.caught(looked, count=2)

    os.kill(finalizer, signal.SIGKILL)
    if not gone(finalizer):
        raise NotReached("the finalizer survived")

    gate.let_go(deliver=False)
    scene.strike(looked)
