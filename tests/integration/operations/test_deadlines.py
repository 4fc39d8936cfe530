"""The deadline is checked at each decision: a process that sleeps past it commits nothing."""

from __future__ import annotations

import threading
from collections.abc import Callable
from typing import Any

import pytest

from segsvc.domain.operation import Operation, OperationState, ShardCounts
from segsvc.postgres.catalog import audit_trail
from segsvc.services.deadlines import DeadlineKeeper
from segsvc.twophase.ports import Answer
from tests.eventually import eventually
from tests.integration.operations.conftest import SHARDS, Rig, roll_out


def pass_deadline(rig: Rig, operation: Operation) -> None:
    rig.installation.execute(None, "UPDATE operations SET deadline = clock_timestamp() WHERE id = :id", id=operation.id)


def assert_aborted_late(rig: Rig, operation: Operation, *, missing: str = "") -> None:
    ended = rig.operations.get(operation.id)
    assert ended.state is OperationState.ABORTED
    assert ended.failure is not None
    assert ended.failure.reason == "OPERATION_ABORTED"
    assert ended.failure.metadata == {"why": "DEADLINE", "shards_missing": missing}
    rig.check_invariants()


@pytest.fixture
def started(rig: Rig) -> Operation:
    """A rollout that is PREPARING; its chord is lost."""
    rig.create()
    operation = roll_out(rig, 10_000)
    rig.messages.sent.clear()
    return operation


def test_a_decider_that_wakes_after_the_deadline_aborts(rig: Rig, started: Operation) -> None:
    for shard in range(SHARDS):
        rig.prepare(started, shard)
    pass_deadline(rig, started)
    assert rig.ledger.commit(started.id) is Answer.LATE
    assert rig.coordinator.finalize(started.id)
    assert_aborted_late(rig, started)
    assert rig.cache.dropped == []


def test_a_decision_that_waits_beyond_the_deadline_is_not_made(
    rig: Rig, started: Operation, monkeypatch: pytest.MonkeyPatch
) -> None:
    """It may wait for the lock of another change of the segment, and holds the operation's row meanwhile."""
    for shard in range(SHARDS):
        rig.prepare(started, shard)

    record = audit_trail.record

    def record_late(*args: Any, **kwargs: Any) -> int:
        eventually(rig.ledger.late)
        return record(*args, **kwargs)

    monkeypatch.setattr(audit_trail, "record", record_late)

    rig.installation.execute(
        None, "UPDATE operations SET deadline = clock_timestamp() + interval '200 ms' WHERE id = :id", id=started.id
    )

    assert rig.ledger.commit(started.id) is Answer.LATE
    rig.coordinator.abort_late_ones()
    assert_aborted_late(rig, started)


def test_a_late_vote_is_refused_and_aborts(rig: Rig, started: Operation, arm: Callable[[str, str], None]) -> None:
    rig.prepare(started, 0)
    arm("prepared-not-voted", "hold shard=1")
    voter = threading.Thread(target=lambda: rig.prepare(started, 1))
    voter.start()
    eventually(lambda: rig.installation.prepared(1))

    pass_deadline(rig, started)
    assert rig.ledger.vote(started.id, ShardCounts(2)) is Answer.LATE
    assert rig.ledger.vote(started.id, ShardCounts(0)) is Answer.TAKEN, "it has voted already"

    arm("prepared-not-voted", "")
    voter.join()
    assert_aborted_late(rig, started, missing=",".join(map(str, range(1, SHARDS))))


def test_a_late_message_prepares_nothing(rig: Rig, started: Operation) -> None:
    pass_deadline(rig, started)
    assert not rig.ledger.claim_dispatch(started.id)
    rig.prepare(started, 0)
    assert_aborted_late(rig, started, missing=",".join(map(str, range(SHARDS))))


def test_a_late_body_aborts_also_with_votes_missing(rig: Rig, started: Operation) -> None:
    rig.prepare(started, 0)
    assert not rig.coordinator.finalize(started.id)
    pass_deadline(rig, started)
    assert rig.coordinator.finalize(started.id)
    assert_aborted_late(rig, started, missing=",".join(map(str, range(1, SHARDS))))


def test_no_process_aborts_before_the_deadline(rig: Rig, started: Operation) -> None:
    assert not rig.coordinator.abort_late(started)
    assert rig.state(started) is OperationState.PREPARING
    rig.settle()
    assert rig.state(started) is OperationState.DONE


def test_without_any_worker_a_front_keeps_deadlines_and_the_queue_goes_on(rig: Rig, started: Operation) -> None:
    following, last = roll_out(rig, 20_000), roll_out(rig, 30_000)
    rig.prepare(started, 0)
    ended = rig.operations.watch_end(started.id)
    keeper = DeadlineKeeper(rig.coordinator, interval_s=0.02)

    try:
        pass_deadline(rig, started)
        assert ended.result(20).state is OperationState.ABORTED
        eventually(lambda: rig.installation.prepared(0) == [])
        eventually(lambda: rig.state(following) is OperationState.PREPARING)
        pass_deadline(rig, following)
        eventually(lambda: rig.state(last) is OperationState.PREPARING)
    finally:
        keeper.close()

    assert_aborted_late(rig, following, missing=",".join(map(str, range(SHARDS))))
    rig.settle()
    assert rig.state(last) is OperationState.DONE
