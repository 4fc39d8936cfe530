"""What holds for every method: request ids, deadlines, unknown methods, garbage, health, reflection."""

from __future__ import annotations

from concurrent.futures import ThreadPoolExecutor
from typing import Any
from uuid import UUID

import grpc
import pytest
from google.protobuf.descriptor_pb2 import FileDescriptorProto
from grpc import StatusCode
from grpc_health.v1 import health_pb2
from grpc_reflection.v1alpha import reflection_pb2, reflection_pb2_grpc
from segmentation.v1 import membership_pb2, segments_pb2

from grpc_api.hot.wire import varint
from tests.contract.conftest import FrontUnderTest
from tests.contract.refusals import refused, refused_in_time
from tests.eventually import eventually

SERVICES = (
    "google.longrunning.Operations",
    "segmentation.v1.MembershipService",
    "segmentation.v1.OperationService",
    "segmentation.v1.SegmentService",
)
HOT = "/segmentation.v1.MembershipService/GetUserSegments"
HOT_BATCH = "/segmentation.v1.MembershipService/BatchGetUserSegments"
COLD = "/segmentation.v1.SegmentService/GetSegment"
STREAM = "/segmentation.v1.SegmentService/ExportSegmentUsers"


def raw(front: FrontUnderTest, method: str) -> Any:
    """A method that takes and gives bytes."""
    return front.channel.unary_unary(method)


# -- request ids ----------------------------------------------------------------------------------------------------


@pytest.mark.parametrize("given", ["my-request-1", "x" * 128])
def test_the_request_id_comes_back(front: FrontUnderTest, given: str) -> None:
    front.installation.create_users({1: {}})
    slug = front.create().slug
    metadata = (("x-request-id", given),)

    for method, request in (
        (front.memberships.GetUserSegments, membership_pb2.GetUserSegmentsRequest(user_id=1)),
        (front.segments.GetSegment, segments_pb2.GetSegmentRequest(slug=slug)),
    ):
        _, call = method.with_call(request, metadata=metadata, timeout=10)
        assert dict(call.initial_metadata())["x-request-id"] == given

    stream = front.segments.ExportSegmentUsers(
        segments_pb2.ExportSegmentUsersRequest(slug=slug), metadata=metadata, timeout=10
    )
    assert dict(stream.initial_metadata())["x-request-id"] == given


@pytest.mark.parametrize("given", [None, "", "x" * 129])
def test_a_request_id_is_made_if_there_is_none_fit_for_logs(front: FrontUnderTest, given: str | None) -> None:
    front.installation.create_users({1: {}})
    metadata = (("x-request-id", given),) if given is not None else None
    made = set()

    for method, request in (
        (front.memberships.GetUserSegments, membership_pb2.GetUserSegmentsRequest(user_id=1)),
        (front.segments.ListSegments, segments_pb2.ListSegmentsRequest()),
    ):
        _, call = method.with_call(request, metadata=metadata, timeout=10)
        made.add(dict(call.initial_metadata())["x-request-id"])

    assert all(UUID(request_id) for request_id in made)
    assert len(made) == 2


def test_a_refusal_carries_the_request_id_too(front: FrontUnderTest) -> None:
    metadata = (("x-request-id", "mine"),)
    for method, request in (
        (front.memberships.GetUserSegments, membership_pb2.GetUserSegmentsRequest(user_id=77_777_777)),
        (front.segments.GetSegment, segments_pb2.GetSegmentRequest(slug="nothing")),
    ):
        refusal = refused(lambda m=method, r=request: m(r, metadata=metadata, timeout=10))
        assert refusal.request_id == "mine"


# -- invalid calls --------------------------------------------------------------------------------------------------


@pytest.mark.parametrize(
    "method",
    [
        "/segmentation.v1.SegmentService/Nothing",
        "/segmentation.v1.MembershipService/getUserSegments",
        "/segmentation.v2.SegmentService/GetSegment",
        "/nothing",
    ],
)
def test_a_method_that_does_not_exist(front: FrontUnderTest, method: str) -> None:
    refusal = refused(lambda: raw(front, method)(b"", timeout=10))
    assert (refusal.code, refusal.reason) == (StatusCode.UNIMPLEMENTED, "NOT_IMPLEMENTED")


@pytest.mark.parametrize("garbage", [b"\xff", b"\x08", b"\x0a\x05abc", b"\x00" * 100])
@pytest.mark.parametrize("method", [HOT, COLD, "/google.longrunning.Operations/GetOperation"])
def test_garbage_is_refused_as_such(front: FrontUnderTest, method: str, garbage: bytes) -> None:
    refusal = refused(lambda: raw(front, method)(garbage, timeout=10))
    assert (refusal.code, refusal.reason) == (StatusCode.INTERNAL, "INTERNAL")
    assert refusal.message == "the request is not a valid message"


def test_garbage_to_a_stream(front: FrontUnderTest) -> None:
    refusal = refused(lambda: list(front.channel.unary_stream(STREAM)(b"\xff", timeout=10)))
    assert (refusal.code, refusal.message) == (StatusCode.INTERNAL, "the request is not a valid message")


def test_text_that_is_not_utf8_is_garbage(front: FrontUnderTest) -> None:
    refusal = refused(lambda: raw(front, COLD)(b"\x0a\x01\xff", timeout=10))
    assert (refusal.code, refusal.message) == (StatusCode.INTERNAL, "the request is not a valid message")


def test_unknown_fields_are_ignored(front: FrontUnderTest) -> None:
    front.installation.create_users({1: {}})
    unknown = b"\xfa\x01\x03abc"  # field 31, three bytes
    hot = membership_pb2.GetUserSegmentsRequest(user_id=1).SerializeToString() + unknown
    assert membership_pb2.UserSegments.FromString(raw(front, HOT)(hot, timeout=10)).user_id == 1
    slug = front.create().slug
    cold = segments_pb2.GetSegmentRequest(slug=slug).SerializeToString() + unknown
    assert segments_pb2.Segment.FromString(raw(front, COLD)(cold, timeout=10)).slug == slug


def test_a_message_that_is_too_large(front: FrontUnderTest) -> None:
    with pytest.raises(grpc.RpcError) as caught:
        raw(front, COLD)(b"\x0a" + b"a" * (5 << 20), timeout=10)
    assert caught.value.code() == StatusCode.RESOURCE_EXHAUSTED


def test_a_large_request_of_a_hot_method(front: FrontUnderTest) -> None:
    users = 3 << 20
    payload = b"\x0a" + varint(users) + b"\x01" * users
    refusal = refused(lambda: raw(front, HOT_BATCH)(payload, timeout=10))
    assert (refusal.code, refusal.reason) == (StatusCode.INVALID_ARGUMENT, "BATCH_TOO_LARGE")
    refusal = refused(lambda: raw(front, HOT)(payload, timeout=10))
    assert (refusal.code, refusal.reason) == (StatusCode.INVALID_ARGUMENT, "FIELD_INVALID")


# -- deadlines ------------------------------------------------------------------------------------------------------


def test_a_deadline_reaches_the_database(front: FrontUnderTest) -> None:
    """A statement that waits for a lock ends at the deadline of its call, not at the session's limit."""
    slug = front.create().slug
    request = segments_pb2.UpdateSegmentRequest(segment=segments_pb2.Segment(slug=slug, display_name="late"))

    with front.installation.databases.catalog.begin() as connection:
        connection.exec_driver_sql("LOCK TABLE segments IN ACCESS EXCLUSIVE MODE")
        refusal = refused_in_time(lambda: front.segments.UpdateSegment(request, timeout=1))
        assert (refusal.code, refusal.reason) == (StatusCode.DEADLINE_EXCEEDED, "DEADLINE_EXCEEDED")
        waiting = "SELECT count(*) FROM pg_locks WHERE NOT granted AND relation = 'segments'::regclass"
        eventually(lambda: connection.exec_driver_sql(waiting).scalar_one() == 0, within_s=15)

    shown = front.segments.GetSegment(segments_pb2.GetSegmentRequest(slug=slug), timeout=10)
    assert shown.display_name == ""


def test_a_lock_that_does_not_come(front: FrontUnderTest) -> None:
    slug = front.create().slug
    request = segments_pb2.UpdateSegmentRequest(segment=segments_pb2.Segment(slug=slug, display_name="late"))
    with front.installation.databases.catalog.begin() as connection:
        connection.exec_driver_sql(f"SELECT 1 FROM segments WHERE slug = '{slug}' FOR UPDATE")
        refusal = refused(lambda: front.segments.UpdateSegment(request, timeout=10))
    assert (refusal.code, refusal.reason) == (StatusCode.RESOURCE_EXHAUSTED, "OVERLOADED")
    assert refusal.retry_after_s


def test_a_call_whose_deadline_has_passed(front: FrontUnderTest) -> None:
    with pytest.raises(grpc.RpcError) as caught:
        front.segments.ListSegments(segments_pb2.ListSegmentsRequest(), timeout=0.000_001)
    assert caught.value.code() == StatusCode.DEADLINE_EXCEEDED


def test_calls_side_by_side(front: FrontUnderTest) -> None:
    slugs = [front.create().slug for _ in range(4)]
    with ThreadPoolExecutor(16) as threads:
        found = threads.map(
            lambda index: front.segments.GetSegment(segments_pb2.GetSegmentRequest(slug=slugs[index % 4]), timeout=10),
            range(400),
        )
        assert [segment.slug for segment in found] == slugs * 100


# -- health and reflection ------------------------------------------------------------------------------------------


def test_health_of_each_service(front: FrontUnderTest) -> None:
    assert all(front.serving(service) for service in ("", *SERVICES))
    with pytest.raises(grpc.RpcError) as caught:
        front.serving("nothing.of.the.kind")
    assert caught.value.code() == StatusCode.NOT_FOUND


def test_health_of_all_services_at_once(front: FrontUnderTest) -> None:
    statuses = front.health.List(health_pb2.HealthListRequest(), timeout=10).statuses
    serving = health_pb2.HealthCheckResponse.SERVING
    assert {name: answer.status for name, answer in statuses.items()} == dict.fromkeys(("", *SERVICES), serving)


def test_health_can_be_watched(front: FrontUnderTest) -> None:
    watch = front.health.Watch(health_pb2.HealthCheckRequest(service=SERVICES[0]), timeout=10)
    assert next(watch).status == health_pb2.HealthCheckResponse.SERVING
    watch.cancel()


def test_reflection_lists_the_services_and_gives_their_files(front: FrontUnderTest) -> None:
    stub = reflection_pb2_grpc.ServerReflectionStub(front.channel)
    requests = [
        reflection_pb2.ServerReflectionRequest(list_services=""),
        *(reflection_pb2.ServerReflectionRequest(file_containing_symbol=name) for name in SERVICES),
    ]

    listed, *files = stub.ServerReflectionInfo(iter(requests), timeout=10)
    names = {service.name for service in listed.list_services_response.service}
    assert {*SERVICES, "grpc.health.v1.Health"} <= names
    for response, name in zip(files, SERVICES, strict=True):
        contents = map(FileDescriptorProto.FromString, response.file_descriptor_response.file_descriptor_proto)
        assert name in {f"{file.package}.{service.name}" for file in contents for service in file.service}
