"""The commit protocol on real PostgreSQL: what it does when all goes well, and each rule that closes a hole."""

from __future__ import annotations

import threading
from concurrent.futures import ThreadPoolExecutor, wait
from uuid import UUID, uuid4

import pytest
import sqlalchemy as sa

from segsvc.domain.errors import LockTimeout, Reason, ServiceError
from segsvc.domain.operation import (
    Failure,
    Gid,
    Operation,
    OperationFilter,
    OperationState,
    RequestKey,
    ShardCounts,
    ShardState,
)
from segsvc.domain.segment import Rule, SegmentText
from segsvc.failpoints import NoFailpoints
from segsvc.postgres.locks import SHARD_LOCK
from segsvc.postgres.participant import PostgresParticipant
from segsvc.twophase_ports import Finish
from tests.integration.operations.conftest import SHARDS, USERS, Rig, roll_out

CANCELLED = Failure(Reason.OPERATION_ABORTED.text, "cancelled", {"why": "CANCELLED"})


def test_ramp_keeps_who_is_in_and_a_lowered_percentage_removes_only_what_a_raise_had_added(rig: Rig) -> None:
    segment_id = rig.create()
    seen = []
    for threshold in (10_000, 30_000, 10_000, 0, 100_000):
        operation = roll_out(rig, threshold)
        rig.deliver()
        assert rig.state(operation) is OperationState.DONE
        members = rig.installation.members(segment_id)
        assert members == rig.expected("checkout", threshold)
        seen.append(members)
        result = rig.service.result(rig.service.get(operation.id))
        assert result.segment is not None
        assert result.segment.rule == Rule(threshold)
        assert result.segment.member_count == len(members) == sum(counts.members for counts in result.counts)
        assert sum(counts.matched for counts in result.counts) == len(USERS)
    assert seen[0] < seen[1]
    assert seen[0] == seen[2]
    assert seen[3] == set()
    assert seen[4] == set(USERS)
    rig.check_invariants()
    zero_rows = rig.installation.execute(0, "SELECT count(*) AS n FROM memberships WHERE bit_count(bits) = 0")
    assert zero_rows[0].n == 0


def test_counts_lay_overrides_over_the_rule(rig: Rig) -> None:
    segment_id = rig.create()
    roll_out(rig, 50_000)
    rig.deliver()
    by_rule = rig.installation.members(segment_id)
    out = next(user for user in USERS if user not in by_rule)
    inside = next(user for user in USERS if user in by_rule)
    for user, effect in ((out, 1), (inside, 2)):
        rig.installation.execute(
            user % SHARDS,
            "INSERT INTO overrides (user_id, segment_id, effect) VALUES (:u, :s, :e)",
            u=user,
            s=segment_id,
            e=effect,
        )
    expired = next(user for user in USERS if user not in by_rule and user != out)
    rig.installation.execute(
        expired % SHARDS,
        "INSERT INTO overrides (user_id, segment_id, effect, expire_time) VALUES (:u, :s, 1, now() - interval '1 s')",
        u=expired,
        s=segment_id,
    )
    operation = roll_out(rig, 100_000)
    rig.deliver()
    counts = rig.service.get(operation.id).votes
    assert sum(c.members for c in counts) == len(USERS) - 1  # the excluded one stays out
    assert sum(c.added for c in counts) == len(USERS) - len(by_rule) - 1  # the included one was in
    operation = rig.service.delete("checkout", etag="", request=None)
    rig.deliver()
    assert sum(c.removed for c in rig.service.get(operation.id).votes) == len(USERS) - 1
    assert rig.installation.execute(out % SHARDS, "SELECT FROM overrides") == []


def test_a_deleted_segments_slug_is_free_for_a_new_one_with_other_buckets(rig: Rig) -> None:
    first = rig.create()
    before = rig.ledger.segment("checkout")
    rig.service.delete("checkout", etag="", request=None)
    rig.deliver()
    assert rig.ledger.segment("checkout") is None
    second = rig.create()
    after = rig.ledger.segment("checkout")
    assert before is not None
    assert after is not None
    assert second > first
    assert (after.uid, after.salt) != (before.uid, before.salt)
    rig.check_invariants()


def test_one_is_in_flight_and_the_queue_keeps_its_order(rig: Rig) -> None:
    rig.create()
    first, second, third = (roll_out(rig, threshold) for threshold in (1000, 2000, 3000))
    # What recovery looks at does not grow with the queue.
    assert [seen.operation.id for seen in rig.ledger.open_operations()] == [first.id, second.id]
    assert [rig.state(op) for op in (first, second, third)] == [
        OperationState.PREPARING,
        OperationState.QUEUED,
        OperationState.QUEUED,
    ]
    assert rig.coordinator.start_next() is None
    rig.deliver()
    ended = rig.service.list(OperationFilter(), page_size=3, before_seq=None)
    assert [op.id for op in ended] == [third.id, second.id, first.id]
    assert [op.commit_seq for op in ended] == sorted((op.commit_seq or 0 for op in ended), reverse=True)


def test_two_who_start_at_once_start_one(rig: Rig) -> None:
    rig.create()
    blocker = roll_out(rig, 1000)
    queued = [roll_out(rig, threshold) for threshold in (2000, 3000, 4000)]
    rig.messages.sent.clear()
    with ThreadPoolExecutor(4) as pool:
        for _ in range(10):
            rig.ledger.abort(blocker.id, CANCELLED, from_states=[OperationState.PREPARING])
            barrier = threading.Barrier(4)

            def start(barrier: threading.Barrier = barrier) -> Operation | None:
                barrier.wait()
                return rig.ledger.start_oldest()

            started = [op for op in (f.result() for f in [pool.submit(start) for _ in range(4)]) if op]
            assert len(started) == 1
            blocker = started[0]
            queued.append(roll_out(rig, 5000))
            rig.messages.sent.clear()
    rig.settle()
    rig.check_invariants()


def test_a_prepare_that_the_server_answers_with_rollback_is_no_vote(rig: Rig) -> None:
    rig.create()
    operation = roll_out(rig, 10_000)

    def failing_work(tx: object, *_: object) -> ShardCounts:
        with pytest.raises(sa.exc.DBAPIError):
            tx._connection.execute(sa.text("SELECT 1 / 0"))  # type: ignore[attr-defined]
        return ShardCounts(0, added=1)

    participant = PostgresParticipant(rig.databases, 0, failing_work, NoFailpoints())
    with pytest.raises(ServiceError) as caught:
        participant.prepare(operation, rig.coordinator.gid(operation.id, 0), lambda _: None)
    assert caught.value.reason is Reason.SHARD_UNAVAILABLE
    assert rig.installation.prepared(0) == []
    rig.settle()
    assert rig.state(operation) is OperationState.DONE


def test_a_refused_vote_rolls_back_only_what_is_aborted(rig: Rig) -> None:
    segment_id = rig.create()
    aborted = roll_out(rig, 10_000)
    gid = rig.coordinator.gid(aborted.id, 0)
    counts = rig.coordinator.participants[0].prepare(aborted, gid, lambda _: None)
    assert counts is not None
    rig.ledger.abort(aborted.id, CANCELLED, from_states=[OperationState.PREPARING])
    assert not rig.ledger.vote(aborted.id, counts)
    rig.messages.sent.clear()
    rig.coordinator.recover()  # finds the zombie under an ABORTED operation
    assert rig.installation.prepared(0) == []
    committed = roll_out(rig, 20_000)
    rig.deliver()
    rig.prepare(committed, 1)  # a late twin of a DONE operation
    assert not rig.ledger.vote(committed.id, counts)
    assert rig.installation.members(segment_id) == rig.expected("checkout", 20_000)
    rig.check_invariants()


def test_a_duplicate_vote_is_no_refusal(rig: Rig) -> None:
    rig.create()
    operation = roll_out(rig, 10_000)
    rig.prepare(operation, 0)
    rig.prepare(operation, 0)  # finds its gid, counts again, votes again
    votes = rig.service.get(operation.id).votes
    assert [vote.shard for vote in votes] == [0]
    assert rig.ledger.vote(operation.id, votes[0])
    rig.deliver()
    assert rig.state(operation) is OperationState.DONE


def test_counting_again_while_prepared_gives_the_same_counts(rig: Rig) -> None:
    rig.create()
    roll_out(rig, 30_000)
    rig.deliver()
    operation = roll_out(rig, 20_000)
    participant = rig.coordinator.participants[1]
    counted = participant.prepare(operation, rig.coordinator.gid(operation.id, 1), lambda _: None)
    assert counted == participant.count(operation)
    assert counted is not None
    assert counted.removed > 0
    rig.settle()


def test_an_early_body_decides_nothing(rig: Rig) -> None:
    rig.create()
    operation = roll_out(rig, 10_000)
    rig.prepare(operation, 0)
    assert not rig.coordinator.finalize(operation.id)
    assert rig.state(operation) is OperationState.PREPARING
    rig.deliver()
    assert rig.state(operation) is OperationState.DONE
    assert rig.coordinator.finalize(operation.id)  # fired twice


def test_a_prepared_transaction_that_is_gone_after_the_decision_is_done_again(rig: Rig) -> None:
    segment_id = rig.create()
    operation = roll_out(rig, 40_000)
    rig.messages.sent.clear()
    for shard in range(SHARDS):
        rig.prepare(operation, shard)
    assert rig.ledger.commit(operation.id)
    assert rig.coordinator.participants[2].rollback_prepared(rig.coordinator.gid(operation.id, 2)) is Finish.DONE
    rig.coordinator.recover()
    assert rig.state(operation) is OperationState.DONE
    assert rig.installation.members(segment_id) == rig.expected("checkout", 40_000)
    rig.check_invariants()


def test_recovery_never_touches_what_is_not_its_own(rig: Rig) -> None:
    strange = [
        "another-programs-transaction",
        str(Gid("elsewhere", uuid4(), 0)),
        str(Gid(rig.installation.settings.cluster, uuid4(), 0)),  # ours by name, unknown to the ledger
        str(Gid(rig.installation.settings.cluster, uuid4(), 1)),  # of another shard
    ]
    engine = sa.create_engine(rig.installation.settings.shard_dsns[0], poolclass=sa.NullPool)
    for number, gid in enumerate(strange):
        with engine.connect() as connection:
            connection.execute(sa.text("INSERT INTO deleted_users (id, version) VALUES (:n, 0)"), {"n": number})
            connection.exec_driver_sql("PREPARE TRANSACTION %s", (gid,))
            connection.rollback()
    rig.coordinator.recover()
    assert sorted(rig.installation.prepared(0)) == sorted(strange)
    with engine.connect().execution_options(isolation_level="AUTOCOMMIT") as connection:
        for gid in strange:
            connection.exec_driver_sql("ROLLBACK PREPARED %s", (gid,))


def test_a_busy_lock_is_no_failure(rig: Rig) -> None:
    rig.create()
    operation = roll_out(rig, 10_000)
    engine = sa.create_engine(rig.installation.settings.shard_dsns[0], poolclass=sa.NullPool)
    with engine.begin() as events:  # a batch of user events at work
        events.execute(sa.select(sa.func.pg_advisory_xact_lock_shared(SHARD_LOCK)))
        with pytest.raises(LockTimeout):
            rig.prepare(operation, 0)
        assert rig.state(operation) is OperationState.PREPARING
    rig.deliver()
    assert rig.state(operation) is OperationState.DONE


def test_a_prepared_shard_keeps_user_changes_out_and_readers_in(rig: Rig) -> None:
    rig.create()
    operation = roll_out(rig, 10_000)
    rig.prepare(operation, 0)
    engine = sa.create_engine(rig.installation.settings.shard_dsns[0], poolclass=sa.NullPool)
    with engine.begin() as connection:
        assert connection.execute(sa.text("SELECT count(*) FROM users")).scalar_one() > 0
        connection.execute(sa.text("SET LOCAL lock_timeout = '100ms'"))
        with pytest.raises(sa.exc.OperationalError, match="lock timeout"):
            connection.execute(sa.select(sa.func.pg_advisory_xact_lock_shared(SHARD_LOCK)))
    rig.deliver()


def test_past_its_deadline_an_operation_is_aborted_and_the_next_starts(rig: Rig) -> None:
    segment_id = rig.create()
    late = roll_out(rig, 10_000)
    following = roll_out(rig, 20_000)
    rig.messages.sent.clear()
    rig.prepare(late, 0)
    rig.installation.execute(None, "UPDATE operations SET deadline = now() WHERE id = :id", id=late.id)
    rig.settle()
    ended = rig.service.get(late.id)
    assert ended.state is OperationState.ABORTED
    assert ended.failure is not None
    assert (ended.failure.reason, ended.failure.metadata["why"]) == ("OPERATION_ABORTED", "DEADLINE")
    assert rig.state(following) is OperationState.DONE
    assert rig.installation.members(segment_id) == rig.expected("checkout", 20_000)
    rig.check_invariants()


def test_cancel_aborts_until_the_commit(rig: Rig) -> None:
    rig.create()
    operation = roll_out(rig, 10_000)
    rig.messages.sent.clear()
    for shard in range(SHARDS):
        rig.prepare(operation, shard)
    assert rig.service.cancel(operation.id).state is OperationState.ABORTED
    assert rig.service.cancel(operation.id).state is OperationState.ABORTED
    rig.check_invariants()
    committed = roll_out(rig, 10_000)
    rig.deliver()
    with pytest.raises(ServiceError) as caught:
        rig.service.cancel(committed.id)
    assert caught.value.reason is Reason.OPERATION_NOT_CANCELLABLE
    with pytest.raises(ServiceError) as caught:
        rig.service.cancel(UUID(int=0))
    assert caught.value.reason is Reason.OPERATION_NOT_FOUND


def test_what_changed_while_it_queued_is_found_at_the_start(rig: Rig) -> None:
    rig.create()
    segment = rig.ledger.segment("checkout")
    assert segment is not None
    first = rig.service.roll_out("checkout", Rule(1000), etag=segment.etag, request=None)
    stale = rig.service.roll_out("checkout", Rule(2000), etag=segment.etag, request=None)
    deletion = rig.service.delete("checkout", etag="", request=None)
    orphan = roll_out(rig, 3000)
    rig.deliver()
    assert [rig.state(op) for op in (first, deletion)] == [OperationState.DONE] * 2
    reasons = [(rig.service.get(op.id).failure or CANCELLED).reason for op in (stale, orphan)]
    assert reasons == ["ETAG_MISMATCH", "SEGMENT_NOT_FOUND"]
    rig.check_invariants()


def test_a_request_id_makes_one_operation(rig: Rig) -> None:
    rig.create()
    request = RequestKey("RollOutSegment", uuid4(), b"a" * 32)
    first = rig.service.roll_out("checkout", Rule(1000), etag="", request=request)
    rig.deliver()
    again = rig.service.roll_out("checkout", Rule(1000), etag="", request=request)
    assert again.id == first.id
    assert again.state is OperationState.DONE
    with pytest.raises(ServiceError) as caught:
        rig.service.roll_out(
            "checkout", Rule(2000), etag="", request=RequestKey("RollOutSegment", request.request_id, b"b" * 32)
        )
    assert caught.value.reason is Reason.REQUEST_ID_REUSED


def test_twins_of_a_request_at_once_make_one_segment(rig: Rig) -> None:
    request = RequestKey("CreateSegment", uuid4(), b"a" * 32)

    def create(_: int) -> UUID:
        return rig.service.create_segment("twin", SegmentText(), request=request, deadline_s=10).uid

    with ThreadPoolExecutor(4) as pool:
        assert len(set(pool.map(create, range(4)))) == 1
    assert len(rig.installation.execute(None, "SELECT FROM operations")) == 1


def test_a_creation_whose_turn_does_not_come_leaves_nothing(rig: Rig) -> None:
    rig.create("other")
    blocker = roll_out(rig, 1000, "other")
    request = RequestKey("CreateSegment", uuid4(), b"a" * 32)
    with pytest.raises(ServiceError) as caught:
        rig.service.create_segment("late", SegmentText(), request=request, deadline_s=0.1)
    assert caught.value.reason is Reason.OPERATION_QUEUE_BUSY
    rig.deliver()
    assert rig.state(blocker) is OperationState.DONE
    # Only successes are kept: the same request works now.
    created = rig.service.create_segment("late", SegmentText(), request=request, deadline_s=10)
    assert created.slug == "late"
    rig.check_invariants()


def test_existing_slugs_and_the_limit_are_refused(rig: Rig, monkeypatch: pytest.MonkeyPatch) -> None:
    rig.create()
    with pytest.raises(ServiceError) as caught:
        rig.create()
    assert caught.value.reason is Reason.SEGMENT_EXISTS
    monkeypatch.setattr("segsvc.services.operations.SEGMENTS_MAX", 2)
    monkeypatch.setattr("segsvc.postgres.ledger_steps.SEGMENTS_MAX", 2)
    with ThreadPoolExecutor(4) as pool:
        creations = [pool.submit(rig.create, f"s{i}") for i in range(4)]
        while wait(creations, timeout=0.01).not_done:
            rig.deliver()  # who finds that another's turn has come sends a chord for it
    outcomes = [creation.exception() for creation in creations]
    assert outcomes.count(None) == 1
    assert {e.reason for e in outcomes if isinstance(e, ServiceError)} == {Reason.TOO_MANY_SEGMENTS}
    rig.check_invariants()


def test_a_creation_that_every_shard_refuses_is_aborted_and_says_so(rig: Rig) -> None:
    for shard in range(SHARDS):
        # A copy that should not be there, under every id that can be drawn next.
        rig.installation.execute(
            shard, "INSERT INTO segments (id, slug, salt) SELECT n, 'stray', 0 FROM generate_series(1, 100) n"
        )
    with pytest.raises(ServiceError) as caught:
        rig.create()
    assert (caught.value.reason, caught.value.metadata["why"]) == (Reason.INTERNAL, "SHARD_REFUSED")
    assert "stray" not in caught.value.message
    assert rig.ledger.segment("checkout") is None
    for shard in range(SHARDS):
        rig.installation.execute(shard, "DELETE FROM segments")
    rig.create()
    rig.check_invariants()


def test_progress_says_what_is_certain_first(rig: Rig) -> None:
    rig.create()
    operation = roll_out(rig, 50_000)
    rig.prepare(operation, 1)
    _, shards = rig.service.progress(operation.id)
    assert [progress.state for progress in shards] == [ShardState.WAITING, ShardState.PREPARED, ShardState.WAITING]
    assert shards[1].added > 0
    rig.deliver()
    _, shards = rig.service.progress(operation.id)
    assert {progress.state for progress in shards} == {ShardState.FINISHED}
