"""Rollouts and deletions, and the operations that carry them out."""

from __future__ import annotations

import time
from concurrent.futures import ThreadPoolExecutor
from contextlib import ExitStack
from typing import Any
from uuid import uuid4

import pytest
import sqlalchemy as sa
from google.longrunning import operations_pb2 as lro
from google.protobuf.duration_pb2 import Duration
from grpc import StatusCode
from segmentation.v1 import operations_pb2
from segmentation.v1 import segments_pb2 as pb

from tests.contract.conftest import FrontUnderTest, new_slug
from tests.contract.refusals import answered_in_time, read_status, refused, refused_in_time
from tests.contract.rollouts import (
    NOBODY,
    State,
    delete,
    get_operation,
    held,
    metadata,
    operations_of,
    roll_out,
    running_operation,
    wait,
)
from tests.eventually import eventually


@pytest.fixture
def users(front: FrontUnderTest) -> range:
    """Users 1 … 400 exist."""
    front.installation.create_users({user_id: {} for user_id in range(1, 401)})
    return range(1, 401)


# -- rollouts and deletions -----------------------------------------------------------------------------------------


def test_a_rollout_answers_when_it_is_done(front: FrontUnderTest, users: range) -> None:
    before = front.create()
    operation = roll_out(front, before.slug, 30.5)

    assert operation.done
    response = pb.RollOutSegmentResponse()
    assert operation.response.Unpack(response)

    segment = front.segments.GetSegment(pb.GetSegmentRequest(slug=before.slug))
    assert response.segment == segment
    assert (segment.rule.percent, segment.rule.condition, segment.rule.policy) == (30.5, "", pb.RollOutRule.LIVE)
    assert segment.etag != before.etag
    assert 0 < segment.member_count == response.member_count == response.added_count < response.matched_count
    assert segment.HasField("member_count_time")
    assert response.removed_count == 0

    assert [counts.shard for counts in response.shards] == [0, 1, 2, 3]
    assert sum(counts.member_count for counts in response.shards) == response.member_count
    assert sum(counts.matched_count for counts in response.shards) == response.matched_count >= len(users)


def test_a_lower_percentage_removes(front: FrontUnderTest, users: range) -> None:
    slug = front.create().slug
    responses = []
    for percent in (30, 60, 30, 0):
        responses.append(pb.RollOutSegmentResponse())
        assert roll_out(front, slug, percent).response.Unpack(responses[-1])
    first, raised, lowered, zero = responses
    assert raised.added_count == lowered.removed_count > 0
    assert lowered.member_count == first.member_count
    assert (zero.member_count, zero.removed_count) == (0, first.member_count)
    assert zero.segment.rule.HasField("percent")


def test_metadata_of_a_finished_operation(front: FrontUnderTest, users: range) -> None:
    slug = front.create().slug
    found = metadata(roll_out(front, slug, 50))
    assert (found.kind, found.slug, found.state) == (operations_pb2.OperationMetadata.ROLL_OUT, slug, State.DONE)
    assert [shard.shard for shard in found.shards] == [0, 1, 2, 3]
    assert {shard.state for shard in found.shards} == {operations_pb2.ShardProgress.FINISHED}
    assert sum(shard.added_count for shard in found.shards) > 0
    times = [found.create_time, found.start_time, found.commit_time, found.end_time]
    moments = [time.ToDatetime() for time in times]
    assert moments == sorted(moments)


def test_a_deletion_removes_the_segment_and_frees_its_slug(front: FrontUnderTest, users: range) -> None:
    before = front.create()
    rolled = pb.RollOutSegmentResponse()
    assert roll_out(front, before.slug, 50).response.Unpack(rolled)

    response = pb.DeleteSegmentResponse()
    operation = delete(front, before.slug)
    assert operation.response.Unpack(response)
    assert response.removed_count == rolled.member_count
    assert metadata(operation).kind == operations_pb2.OperationMetadata.DELETE

    gone = refused(lambda: front.segments.GetSegment(pb.GetSegmentRequest(slug=before.slug)))
    assert gone.reason == "SEGMENT_NOT_FOUND"

    again = front.create(before.slug)
    assert again.uid != before.uid
    assert not again.HasField("rule")


def test_a_creation_is_an_operation_whose_response_is_the_segment(front: FrontUnderTest) -> None:
    created = front.create()
    (operation,) = front.operations.ListOperations(
        lro.ListOperationsRequest(name="operations", filter=f"slug = {created.slug} AND kind = CREATE")
    ).operations
    response = pb.Segment()
    assert operation.response.Unpack(response)
    assert response == created
    assert get_operation(front, operation.name) == operation


@pytest.mark.parametrize(
    ("rule", "field"),
    [
        ({"percent": -0.001}, "rule.percent"),
        ({"percent": 100.001}, "rule.percent"),
        ({"percent": float("nan")}, "rule.percent"),
        ({"percent": float("inf")}, "rule.percent"),
        ({"percent": 0.0005}, "rule.percent"),
        ({"percent": 1, "policy": 7}, "rule.policy"),
    ],
)
def test_rules_that_are_none(front: FrontUnderTest, rule: dict[str, Any], field: str) -> None:
    request = pb.RollOutSegmentRequest(slug=front.create().slug, rule=rule)
    refusal = refused(lambda: front.segments.RollOutSegment(request, timeout=10))
    assert (refusal.code, refusal.reason) == (StatusCode.INVALID_ARGUMENT, "FIELD_INVALID")
    assert list(refusal.violations) == [field]


@pytest.mark.parametrize("percent", [0.001, 33.333, 99.999, 100])
def test_three_decimals_are_exact(front: FrontUnderTest, percent: float) -> None:
    response = pb.RollOutSegmentResponse()
    assert roll_out(front, front.create().slug, percent).response.Unpack(response)
    assert response.segment.rule.percent == percent


# -- waiting --------------------------------------------------------------------------------------------------------


def test_an_accepted_operation_is_answered_at_once_if_wanted(front: FrontUnderTest) -> None:
    slug = front.create().slug
    with held(front):
        operation = roll_out(front, slug, 10, return_immediately=True)
        assert not operation.done
        assert operation.WhichOneof("result") is None
        assert metadata(operation).state in (State.QUEUED, State.PREPARING)
    assert wait(front, operation.name).done


@pytest.mark.parametrize(("timeout", "reserve"), [(4.0, 0.4), (1.0, 0.2)])
def test_a_call_stops_waiting_while_its_answer_can_still_arrive(
    front: FrontUnderTest, timeout: float, reserve: float
) -> None:
    slug, request_id = front.create().slug, str(uuid4())
    with held(front):
        waited = 0.0

        def once() -> lro.Operation:
            nonlocal waited
            begun = time.monotonic()
            operation = roll_out(front, slug, 10, timeout=timeout, request_id=request_id)
            waited = time.monotonic() - begun
            return operation

        operation = answered_in_time(once)
        assert not operation.done
        assert timeout - reserve - 0.1 < waited < timeout
    assert metadata(wait(front, operation.name)).state == State.DONE


def test_waiting_has_its_own_limit(front: FrontUnderTest) -> None:
    slug = front.create().slug
    with held(front):
        name = roll_out(front, slug, 10, return_immediately=True).name
        begun = time.monotonic()
        request = lro.WaitOperationRequest(name=name, timeout=Duration(nanos=300_000_000))
        assert not front.operations.WaitOperation(request, timeout=10).done
        assert 0.3 <= time.monotonic() - begun < 8
        assert not answered_in_time(lambda: wait(front, name, timeout=1)).done
    assert wait(front, name).done
    assert wait(front, name).done


def test_many_wait_at_once(front: FrontUnderTest) -> None:
    slug = front.create().slug
    with ThreadPoolExecutor(100) as threads:
        with held(front):
            name = roll_out(front, slug, 10, return_immediately=True).name
            waiting = [threads.submit(wait, front, name) for _ in range(100)]
            # Other calls are served meanwhile.
            assert front.segments.GetSegment(pb.GetSegmentRequest(slug=slug), timeout=5).slug == slug
        assert all(waiter.result().done for waiter in waiting)


def test_a_negative_wait_is_refused(front: FrontUnderTest) -> None:
    request = lro.WaitOperationRequest(name=NOBODY, timeout=Duration(seconds=-1))
    assert list(refused(lambda: front.operations.WaitOperation(request)).violations) == ["timeout"]


# -- cancel and abort -----------------------------------------------------------------------------------------------


def test_a_cancelled_rollout_answers_with_its_error(front: FrontUnderTest, users: range) -> None:
    before = front.create()
    with ThreadPoolExecutor(1) as threads, held(front):
        waiting = threads.submit(roll_out, front, before.slug, 10)
        name = running_operation(front, before.slug)
        front.operations.CancelOperation(lro.CancelOperationRequest(name=name), timeout=10)
        operation = waiting.result(timeout=10)

    assert operation.done
    error = read_status(operation.error)
    assert (error.code, error.reason) == (StatusCode.ABORTED, "OPERATION_ABORTED")
    assert error.metadata["why"] == "CANCELLED"
    assert metadata(operation).state == State.ABORTED
    assert front.segments.GetSegment(pb.GetSegmentRequest(slug=before.slug)) == before

    front.operations.CancelOperation(lro.CancelOperationRequest(name=name), timeout=10)
    eventually(lambda: _nothing_prepared(front))


def test_a_committed_operation_cannot_be_cancelled(front: FrontUnderTest) -> None:
    name = roll_out(front, front.create().slug, 10).name
    refusal = refused(lambda: front.operations.CancelOperation(lro.CancelOperationRequest(name=name)))
    assert (refusal.code, refusal.reason) == (StatusCode.FAILED_PRECONDITION, "OPERATION_NOT_CANCELLABLE")


def test_an_etag_that_becomes_stale_in_the_queue(front: FrontUnderTest) -> None:
    slug = front.create().slug
    with held(front):
        roll_out(front, slug, 10, return_immediately=True)
        etag = front.segments.GetSegment(pb.GetSegmentRequest(slug=slug)).etag
        queued = roll_out(front, slug, 20, return_immediately=True, etag=etag)
    operation = wait(front, queued.name)
    error = read_status(operation.error)
    assert (error.code, error.reason) == (StatusCode.ABORTED, "ETAG_MISMATCH")
    assert front.segments.GetSegment(pb.GetSegmentRequest(slug=slug)).rule.percent == 10


def test_a_full_queue_refuses_with_a_delay_unless_asked_to_replace(front: FrontUnderTest) -> None:
    slug, other = front.create().slug, front.create().slug
    with held(front):
        running, *queued = [roll_out(front, slug, percent, return_immediately=True) for percent in range(1, 12)]
        refusal = refused(lambda: roll_out(front, slug, 50))
        assert (refusal.code, refusal.reason) == (StatusCode.RESOURCE_EXHAUSTED, "OVERLOADED")
        assert refusal.metadata == {"limit": "10", "slug": slug}
        assert refusal.retry_after_s

        roll_out(front, other, 10, return_immediately=True)
        newest = roll_out(front, slug, 50, return_immediately=True, replace_queued=True)

        for operation in queued:
            error = read_status(wait(front, operation.name).error)
            assert (error.code, error.reason) == (StatusCode.ABORTED, "OPERATION_ABORTED")
            assert error.metadata == {"why": "REPLACED", "operation": newest.name}

    assert not wait(front, running.name).HasField("error")
    assert wait(front, newest.name).HasField("response")
    assert front.segments.GetSegment(pb.GetSegmentRequest(slug=slug)).rule.percent == 50


def test_a_segment_that_is_being_deleted(front: FrontUnderTest) -> None:
    slug = front.create().slug
    with held(front, "before-commit-prepared"):
        name = delete(front, slug, return_immediately=True).name
        eventually(lambda: metadata(get_operation(front, name)).state == State.COMMITTED)
        shown = front.segments.GetSegment(pb.GetSegmentRequest(slug=slug))
        assert shown.state == pb.Segment.DELETING

        edit = pb.UpdateSegmentRequest(segment=pb.Segment(slug=slug, display_name="x"))
        for call in (
            lambda: roll_out(front, slug, 1),
            lambda: delete(front, slug),
            lambda: front.segments.UpdateSegment(edit),
        ):
            refusal = refused(call)
            assert (refusal.code, refusal.reason) == (StatusCode.FAILED_PRECONDITION, "SEGMENT_DELETING")

    assert wait(front, name).done


def test_a_creation_whose_turn_does_not_come(front: FrontUnderTest) -> None:
    slug, late = front.create().slug, new_slug()
    with held(front):
        roll_out(front, slug, 10, return_immediately=True)
        request = pb.CreateSegmentRequest(segment=pb.Segment(slug=late), request_id=str(uuid4()))
        refusal = refused_in_time(lambda: front.segments.CreateSegment(request, timeout=1))
        assert (refusal.code, refusal.reason) == (StatusCode.UNAVAILABLE, "OPERATION_QUEUE_BUSY")
    assert refused(lambda: front.segments.GetSegment(pb.GetSegmentRequest(slug=late))).reason == "SEGMENT_NOT_FOUND"
    assert front.segments.CreateSegment(request, timeout=10).slug == late


def test_a_creation_that_has_started_and_is_not_decided(front: FrontUnderTest) -> None:
    slug, late = front.create().slug, new_slug()
    request = pb.CreateSegmentRequest(segment=pb.Segment(slug=late), request_id=str(uuid4()))
    with ThreadPoolExecutor(1) as threads, held(front) as release:
        roll_out(front, slug, 10, return_immediately=True)
        creation = threads.submit(refused, lambda: front.segments.CreateSegment(request, timeout=5))
        with held(front, "worked-not-prepared", running_operation(front, late)):
            release()
            refusal = creation.result(timeout=20)
    assert refusal.code == StatusCode.DEADLINE_EXCEEDED
    assert front.segments.CreateSegment(request, timeout=10).slug == late


def test_a_creation_outlives_a_twin_of_less_patience(front: FrontUnderTest) -> None:
    """The same request twice: when the deadline of one call passes, the other call is not refused."""
    slug, late = front.create().slug, new_slug()
    request = pb.CreateSegmentRequest(segment=pb.Segment(slug=late), request_id=str(uuid4()))

    with ThreadPoolExecutor(1) as threads:
        with held(front):
            roll_out(front, slug, 10, return_immediately=True)
            patient = threads.submit(front.segments.CreateSegment, request, timeout=20)
            running_operation(front, late)
            refusal = refused_in_time(lambda: front.segments.CreateSegment(request, timeout=1))
            assert refusal.reason == "OPERATION_QUEUE_BUSY"
            running_operation(front, late)  # another operation, in its place
            assert not patient.done()
        created = patient.result(timeout=20)

    assert front.segments.CreateSegment(request, timeout=10) == created
    last, *aborted = operations_of(front, late)
    assert not last.HasField("error")
    assert aborted
    assert all(operation.HasField("error") for operation in aborted)


def test_creations_side_by_side_need_no_broker(front: FrontUnderTest, broker_down: None) -> None:
    """Each creation may start another one, or be started by one that has ended; no message to the broker starts it."""
    with ThreadPoolExecutor(6) as threads:
        slugs = [new_slug() for _ in range(6)]
        assert [made.slug for made in threads.map(front.create, slugs)] == slugs


def test_waiting_previews_hold_up_no_other_call(front: FrontUnderTest, users: range) -> None:
    slug = front.create().slug
    request = pb.PreviewRollOutRequest(slug=slug, rule={"percent": 30})

    with ExitStack() as stack, ThreadPoolExecutor(20) as threads:
        holders = [stack.enter_context(engine.begin()) for engine in front.installation.databases.shards]
        for holder in holders:
            holder.exec_driver_sql("LOCK TABLE directory IN ACCESS EXCLUSIVE MODE")  # a rollout's counts come from it
        previews = [threads.submit(front.segments.PreviewRollOut, request, timeout=20) for _ in range(20)]
        waits = "SELECT count(*) FROM pg_locks WHERE NOT granted AND relation = 'directory'::regclass"
        for holder in holders:
            eventually(lambda holder=holder: holder.exec_driver_sql(waits).scalar_one() > 0)  # type: ignore[misc]

        created = pb.CreateSegmentRequest(segment={"slug": new_slug()})
        front.segments.CreateSegment(created, timeout=10)
        front.segments.GetSegment(pb.GetSegmentRequest(slug=slug), timeout=10)
        assert not all(preview.done() for preview in previews)
        for holder in holders:
            holder.rollback()

        # A preview that waited two seconds for a lock was asked to try again.
        codes = {refused(preview.result).code for preview in previews if preview.exception() is not None}
        assert codes <= {StatusCode.RESOURCE_EXHAUSTED}


def test_the_broker_is_asked_before_anything_is_accepted(front: FrontUnderTest, broker_down: None) -> None:
    slug = front.create().slug  # needs no broker
    for call in (lambda: roll_out(front, slug, 1), lambda: delete(front, slug)):
        refusal = refused(call)
        assert (refusal.code, refusal.reason) == (StatusCode.UNAVAILABLE, "BROKER_UNAVAILABLE")
        assert refusal.retry_after_s
    assert [metadata(operation).kind for operation in operations_of(front, slug)] == [
        operations_pb2.OperationMetadata.CREATE
    ]


def test_more_segments_than_there_may_be(front: FrontUnderTest) -> None:
    marker = uuid4().hex
    front.installation.fill_catalog(4096, marker)

    try:
        refusal = refused(front.create)
        assert (refusal.code, refusal.reason) == (StatusCode.RESOURCE_EXHAUSTED, "TOO_MANY_SEGMENTS")
        request = pb.ListSegmentsRequest(labels={"marker": marker}, page_size=2000)
        listed = front.segments.ListSegments(request, timeout=10)
        assert (len(listed.segments), listed.total_size) == (1000, 4096)
    finally:
        front.installation.empty_catalog()

    assert front.create().slug


# -- request_id -----------------------------------------------------------------------------------------------------


def test_a_repeated_rollout_is_the_same_operation(front: FrontUnderTest) -> None:
    slug, request_id = front.create().slug, str(uuid4())
    first = roll_out(front, slug, 10, request_id=request_id)
    roll_out(front, slug, 20)
    assert roll_out(front, slug, 10, request_id=request_id) == first
    assert front.segments.GetSegment(pb.GetSegmentRequest(slug=slug)).rule.percent == 20
    assert refused(lambda: roll_out(front, slug, 30, request_id=request_id)).reason == "REQUEST_ID_REUSED"


def test_a_repeated_request_may_wait_for_what_was_sent_off(front: FrontUnderTest) -> None:
    slug, request_ids = front.create().slug, [str(uuid4()) for _ in range(2)]
    for change in (lambda **how: roll_out(front, slug, 10, **how), lambda **how: delete(front, slug, **how)):
        request_id = request_ids.pop()
        with held(front):
            sent = change(request_id=request_id, return_immediately=True)
            assert not sent.done
        waited = change(request_id=request_id)
        assert (waited.name, waited.done) == (sent.name, True)
        assert change(request_id=request_id, return_immediately=True) == waited


def test_a_repeated_deletion_is_the_same_operation(front: FrontUnderTest) -> None:
    slug, request_id = front.create().slug, str(uuid4())
    first = delete(front, slug, request_id=request_id)
    front.create(slug)
    assert delete(front, slug, request_id=request_id) == first
    assert front.segments.GetSegment(pb.GetSegmentRequest(slug=slug)).slug == slug


def test_a_request_id_belongs_to_its_method(front: FrontUnderTest) -> None:
    slug, request_id = front.create().slug, str(uuid4())
    assert roll_out(front, slug, 10, request_id=request_id).name != delete(front, slug, request_id=request_id).name


def _nothing_prepared(front: FrontUnderTest) -> bool:
    with front.installation.databases.shards[0].connect() as connection:
        cluster = front.installation.name
        count = connection.execute(
            sa.text("SELECT count(*) FROM pg_prepared_xacts WHERE gid LIKE :pattern"),
            {"pattern": f"segsvc:{cluster}:%"},
        ).scalar_one()
    return bool(count == 0)
