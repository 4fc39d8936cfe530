"""Operations as their callers see them: accepted once, refused for a reason, started in their turn, followed."""

from __future__ import annotations

from concurrent.futures import ThreadPoolExecutor, wait
from uuid import UUID, uuid4

import pytest

from segsvc.domain.errors import Reason, ServiceError
from segsvc.domain.operation import (
    OperationState,
    RequestKey,
    ShardState,
)
from segsvc.domain.segment import Rule, SegmentText
from tests.integration.operations.conftest import SHARDS, Rig, roll_out


def test_what_changed_while_it_queued_is_found_at_the_start(rig: Rig) -> None:
    rig.create()
    segment = rig.ledger.segment("checkout")
    assert segment is not None

    first = rig.acceptance.roll_out("checkout", Rule(1000), etag=segment.etag, request=None)
    stale = rig.acceptance.roll_out("checkout", Rule(2000), etag=segment.etag, request=None)
    deletion = rig.acceptance.delete("checkout", etag="", request=None)
    orphan = roll_out(rig, 3000)

    rig.deliver()
    assert [rig.state(op) for op in (first, deletion)] == [OperationState.DONE] * 2

    failures = [rig.operations.get(op.id).failure for op in (stale, orphan)]
    assert [failure and failure.reason for failure in failures] == ["ETAG_MISMATCH", "SEGMENT_NOT_FOUND"]
    rig.check_invariants()


def test_a_request_id_makes_one_operation(rig: Rig) -> None:
    rig.create()
    request = RequestKey("RollOutSegment", uuid4(), b"a" * 32)
    first = rig.acceptance.roll_out("checkout", Rule(1000), etag="", request=request)
    rig.deliver()

    again = rig.acceptance.roll_out("checkout", Rule(1000), etag="", request=request)
    assert again.id == first.id
    assert again.state is OperationState.DONE

    with pytest.raises(ServiceError) as caught:
        rig.acceptance.roll_out(
            "checkout", Rule(2000), etag="", request=RequestKey("RollOutSegment", request.request_id, b"b" * 32)
        )
    assert caught.value.reason is Reason.REQUEST_ID_REUSED


def test_twins_of_a_request_at_once_make_one_segment(rig: Rig) -> None:
    request = RequestKey("CreateSegment", uuid4(), b"a" * 32)

    def create(_: int) -> UUID:
        return rig.creations.create_segment("twin", SegmentText(), request=request, deadline_s=10).uid

    with ThreadPoolExecutor(4) as pool:
        assert len(set(pool.map(create, range(4)))) == 1
    assert len(rig.installation.execute(None, "SELECT FROM operations")) == 1


def test_a_creation_whose_turn_does_not_come_leaves_nothing(rig: Rig) -> None:
    rig.create("other")
    blocker = roll_out(rig, 1000, "other")
    request = RequestKey("CreateSegment", uuid4(), b"a" * 32)

    with pytest.raises(ServiceError) as caught:
        rig.creations.create_segment("late", SegmentText(), request=request, deadline_s=0.1)
    assert caught.value.reason is Reason.OPERATION_QUEUE_BUSY

    rig.deliver()
    assert rig.state(blocker) is OperationState.DONE

    # Only successes are stored: the same request succeeds now.
    created = rig.creations.create_segment("late", SegmentText(), request=request, deadline_s=10)
    assert created.slug == "late"
    rig.check_invariants()


def test_existing_slugs_and_the_limit_are_refused(rig: Rig, monkeypatch: pytest.MonkeyPatch) -> None:
    rig.create()
    with pytest.raises(ServiceError) as caught:
        rig.create()
    assert caught.value.reason is Reason.SEGMENT_EXISTS

    monkeypatch.setattr("segsvc.services.creations.SEGMENTS_MAX", 2)
    monkeypatch.setattr("segsvc.postgres.catalog.ledger.SEGMENTS_MAX", 2)
    with ThreadPoolExecutor(4) as pool:
        creations = [pool.submit(rig.create, f"s{i}") for i in range(4)]
        while wait(creations, timeout=0.01).not_done:
            rig.deliver()  # a creation that starts another creation sends a chord for it

    outcomes = [creation.exception() for creation in creations]
    assert outcomes.count(None) == 1
    assert {e.reason for e in outcomes if isinstance(e, ServiceError)} == {Reason.TOO_MANY_SEGMENTS}
    rig.check_invariants()


def test_a_creation_that_every_shard_refuses_is_aborted_and_says_so(rig: Rig) -> None:
    for shard in range(SHARDS):
        # A stray copy, under every id that can be drawn next.
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
    _, shards = rig.operations.progress_of([operation.id])[operation.id]
    assert [progress.state for progress in shards] == [ShardState.WAITING, ShardState.PREPARED, ShardState.WAITING]
    assert shards[1].added > 0
    rig.deliver()
    _, shards = rig.operations.progress_of([operation.id])[operation.id]
    assert {progress.state for progress in shards} == {ShardState.FINISHED}
