"""The commit protocol on real PostgreSQL: its normal course, and each rule that closes a hole."""

from __future__ import annotations

import threading
from concurrent.futures import ThreadPoolExecutor
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
    ShardCounts,
)
from segsvc.domain.segment import Rule
from segsvc.failpoints import NoFailpoints
from segsvc.postgres.locks import SHARD_LOCK
from segsvc.postgres.shard.participant import PostgresParticipant
from segsvc.services.shard_work import OperationWork
from segsvc.twophase.ports import Answer, Finish
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

        result = rig.operations.result(rig.operations.get(operation.id))
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

    counts = rig.operations.get(operation.id).votes
    assert sum(c.members for c in counts) == len(USERS) - 1  # the excluded user stays out
    assert sum(c.added for c in counts) == len(USERS) - len(by_rule) - 1  # the included user was a member

    operation = rig.acceptance.delete("checkout", etag="", request=None)
    rig.deliver()
    assert sum(c.removed for c in rig.operations.get(operation.id).votes) == len(USERS) - 1
    assert rig.installation.execute(out % SHARDS, "SELECT FROM overrides") == []


def test_a_deleted_segments_slug_is_free_for_a_new_one_with_other_buckets(rig: Rig) -> None:
    first = rig.create()
    before = rig.ledger.segment("checkout")

    rig.acceptance.delete("checkout", etag="", request=None)
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

    # Recovery's work does not grow with the queue.
    assert [seen.operation.id for seen in rig.ledger.open_operations()] == [first.id, second.id]
    assert [rig.state(op) for op in (first, second, third)] == [
        OperationState.PREPARING,
        OperationState.QUEUED,
        OperationState.QUEUED,
    ]
    assert rig.coordinator.start_next() is None

    rig.deliver()
    ended = rig.operations.list(OperationFilter(), page_size=3, before_seq=None)
    assert [op.id for op in ended] == [third.id, second.id, first.id]
    assert [op.commit_seq for op in ended] == sorted((op.commit_seq or 0 for op in ended), reverse=True)


def test_simultaneous_starts_start_one_operation(rig: Rig) -> None:
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
                return rig.ledger.start_next()

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

    class FailingWork(OperationWork):
        def perform(self, tx: object, *_: object, **_how: object) -> ShardCounts:
            with pytest.raises(sa.exc.DBAPIError):
                tx._connection.execute(sa.text("SELECT 1 / 0"))  # type: ignore[attr-defined]
            return ShardCounts(0, added=1)

    participant = PostgresParticipant(rig.databases, 0, FailingWork(), NoFailpoints())

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
    assert rig.ledger.vote(aborted.id, counts) is Answer.REFUSED

    rig.messages.sent.clear()
    rig.coordinator.recover()  # finds the zombie under an ABORTED operation
    assert rig.installation.prepared(0) == []

    committed = roll_out(rig, 20_000)
    rig.deliver()
    rig.prepare(committed, 1)  # a late twin of a DONE operation
    assert rig.ledger.vote(committed.id, counts) is Answer.REFUSED

    assert rig.installation.members(segment_id) == rig.expected("checkout", 20_000)
    rig.check_invariants()


def test_a_duplicate_vote_is_no_refusal(rig: Rig) -> None:
    rig.create()
    operation = roll_out(rig, 10_000)
    rig.prepare(operation, 0)
    rig.prepare(operation, 0)  # it finds its gid, counts again and votes again
    votes = rig.operations.get(operation.id).votes
    assert [vote.shard for vote in votes] == [0]
    assert rig.ledger.vote(operation.id, votes[0]) is Answer.TAKEN
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

    assert rig.ledger.commit(operation.id) is Answer.TAKEN
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
        str(Gid(rig.installation.settings.cluster, uuid4(), 1)),  # the gid of another shard
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

    ended = rig.operations.get(late.id)
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

    assert rig.acceptance.cancel(operation.id).state is OperationState.ABORTED
    assert rig.acceptance.cancel(operation.id).state is OperationState.ABORTED
    rig.check_invariants()

    committed = roll_out(rig, 10_000)
    rig.deliver()

    with pytest.raises(ServiceError) as caught:
        rig.acceptance.cancel(committed.id)
    assert caught.value.reason is Reason.OPERATION_NOT_CANCELLABLE
    with pytest.raises(ServiceError) as caught:
        rig.acceptance.cancel(UUID(int=0))
    assert caught.value.reason is Reason.OPERATION_NOT_FOUND
