"""Dependencies that are down: calls that need them are refused with the reason, other calls are served, all recover."""

from __future__ import annotations

import time
from collections.abc import Callable
from concurrent.futures import ThreadPoolExecutor
from functools import partial
from typing import Any

import grpc
import pytest
import redis
from google.longrunning import operations_pb2
from grpc import StatusCode
from segmentation.v1 import membership_pb2
from segmentation.v1 import segments_pb2 as pb

from tests.contract.conftest import FrontUnderTest, new_slug
from tests.contract.refusals import read_status, refusal_of, refused, refused_in_time
from tests.contract.rollouts import held, roll_out, running_operation, wait
from tests.contract.test_protocol import SERVICES
from tests.eventually import eventually

USERS = range(4_000_000, 4_000_008)


@pytest.fixture
def users(front: FrontUnderTest) -> range:
    front.installation.create_users({user_id: {} for user_id in USERS})
    return USERS


def segments_of(front: FrontUnderTest, user_id: int, timeout: float = 5) -> membership_pb2.UserSegments:
    return front.memberships.GetUserSegments(membership_pb2.GetUserSegmentsRequest(user_id=user_id), timeout=timeout)


def test_the_catalog_is_down(front: FrontUnderTest, users: range) -> None:
    slug = front.create().slug
    calls = (
        lambda: front.segments.GetSegment(pb.GetSegmentRequest(slug=slug), timeout=5),
        lambda: front.segments.ListSegments(pb.ListSegmentsRequest(), timeout=5),
        lambda: front.segments.CreateSegment(pb.CreateSegmentRequest(segment={"slug": new_slug()}), timeout=5),
        lambda: front.segments.UpdateSegment(pb.UpdateSegmentRequest(segment={"slug": slug}), timeout=5),
        lambda: front.segments.RollOutSegment(pb.RollOutSegmentRequest(slug=slug, rule={"percent": 1}), timeout=5),
        lambda: front.segments.DeleteSegment(pb.DeleteSegmentRequest(slug=slug), timeout=5),
        lambda: front.segments.GetSegmentStatistics(pb.GetSegmentStatisticsRequest(slug=slug), timeout=5),
        lambda: list(front.segments.ExportSegmentUsers(pb.ExportSegmentUsersRequest(slug=slug), timeout=5)),
    )

    with front.installation.outage(front.installation.database_names[0]):
        for call in calls:
            refusal = refused(call)
            assert (refusal.code, refusal.reason) == (StatusCode.UNAVAILABLE, "CATALOG_UNAVAILABLE")
            assert refusal.retry_after_s

        # Reads need only their shard.
        assert segments_of(front, users[0]).user_id == users[0]
        request = membership_pb2.GetUserRequest(user_id=users[0])
        assert front.memberships.GetUser(request, timeout=5).user_id == users[0]
        eventually(lambda: not front.serving("segmentation.v1.SegmentService"))
        eventually(lambda: not front.serving("google.longrunning.Operations"))
        assert front.serving("segmentation.v1.MembershipService")
        assert front.serving()

    eventually(lambda: all(front.serving(service) for service in SERVICES))
    assert front.segments.GetSegment(pb.GetSegmentRequest(slug=slug), timeout=5).slug == slug
    assert front.create().slug


def test_a_shard_is_down(front: FrontUnderTest, users: range) -> None:
    slug = front.create().slug
    lost = users[2]
    shard = lost % 4

    with front.installation.outage(front.installation.database_names[1 + shard]):
        for call in (
            lambda: segments_of(front, lost),
            lambda: front.memberships.GetUser(membership_pb2.GetUserRequest(user_id=lost), timeout=5),
            lambda: front.segments.GetSegmentStatistics(pb.GetSegmentStatisticsRequest(slug=slug), timeout=5),
            lambda: list(front.segments.ExportSegmentUsers(pb.ExportSegmentUsersRequest(slug=slug), timeout=5)),
        ):
            refusal = refused(call)
            assert (refusal.code, refusal.reason) == (StatusCode.UNAVAILABLE, "SHARD_UNAVAILABLE")
            assert refusal.metadata == {"shard": str(shard)}

        assert segments_of(front, users[1]).user_id == users[1]
        request = membership_pb2.BatchGetUserSegmentsRequest(user_ids=[users[1], lost])
        found, missing = front.memberships.BatchGetUserSegments(request, timeout=5).results
        assert found.user_segments.user_id == users[1]
        assert read_status(missing.error).reason == "SHARD_UNAVAILABLE"
        assert front.segments.GetSegment(pb.GetSegmentRequest(slug=slug), timeout=5).slug == slug
        assert front.serving("segmentation.v1.MembershipService")

    eventually(lambda: _readable(front, lost))
    assert front.create().slug


def test_all_shards_are_down(front: FrontUnderTest, users: range) -> None:
    installation = front.installation
    one, two, three, four = installation.database_names[1:]
    with installation.outage(one), installation.outage(two), installation.outage(three), installation.outage(four):
        eventually(lambda: not front.serving("segmentation.v1.MembershipService"))
        assert front.serving("segmentation.v1.SegmentService")
        assert front.serving()
    eventually(lambda: front.serving("segmentation.v1.MembershipService"))


def test_a_server_that_hangs(front: FrontUnderTest, users: range) -> None:
    """It breaks no connection and answers nothing: a call must not wait for ever, nor until its deadline. Each refusal
    names the database that its call needed first."""
    slug, user_id = front.create().slug, users[3]
    operation = roll_out(front, slug, 1).name
    rule, new = {"percent": 1}, {"slug": new_slug()}

    of_shard: dict[str, Callable[..., Any]] = {
        "read": partial(front.memberships.GetUserSegments, membership_pb2.GetUserSegmentsRequest(user_id=user_id)),
        "user": partial(front.memberships.GetUser, membership_pb2.GetUserRequest(user_id=user_id)),
        "check": partial(
            front.memberships.CheckMembership, membership_pb2.CheckMembershipRequest(user_id=user_id, slug=slug)
        ),
        "overrides": partial(
            front.memberships.ListUserOverrides, membership_pb2.ListUserOverridesRequest(user_id=user_id)
        ),
        "override": partial(
            front.memberships.ModifyUserOverrides,
            membership_pb2.ModifyUserOverridesRequest(user_id=user_id, clear=[slug]),
        ),
    }

    of_catalog: dict[str, Callable[..., Any]] = {
        "segment": partial(front.segments.GetSegment, pb.GetSegmentRequest(slug=slug)),
        "list": partial(front.segments.ListSegments, pb.ListSegmentsRequest()),
        "preview": partial(front.segments.PreviewRollOut, pb.PreviewRollOutRequest(slug=slug, rule=rule)),
        "statistics": partial(front.segments.GetSegmentStatistics, pb.GetSegmentStatisticsRequest(slug=slug)),
        "export": lambda **key: list(front.segments.ExportSegmentUsers(pb.ExportSegmentUsersRequest(slug=slug), **key)),
        "create": partial(front.segments.CreateSegment, pb.CreateSegmentRequest(segment=new)),
        "edit": partial(front.segments.UpdateSegment, pb.UpdateSegmentRequest(segment={"slug": slug})),
        "roll out": partial(front.segments.RollOutSegment, pb.RollOutSegmentRequest(slug=slug, rule=rule)),
        "delete": partial(front.segments.DeleteSegment, pb.DeleteSegmentRequest(slug=slug)),
        "operation": partial(front.operations.GetOperation, operations_pb2.GetOperationRequest(name=operation)),
        "operations": partial(front.operations.ListOperations, operations_pb2.ListOperationsRequest()),
        "cancel": partial(front.operations.CancelOperation, operations_pb2.CancelOperationRequest(name=operation)),
    }

    calls = of_shard | of_catalog
    redis.Redis.from_url(front.installation.cache.url).flushall()  # the user is read from the shard
    server = front.installation.server
    server.pause()
    try:
        with ThreadPoolExecutor(len(calls)) as threads:
            made = [partial(call, timeout=12) for call in calls.values()]
            refusals = dict(zip(calls, threads.map(refused, made), strict=True))
        eventually(lambda: not front.serving())
    finally:
        server.resume()

    assert {name: refusal.reason for name, refusal in refusals.items()} == {
        name: "SHARD_UNAVAILABLE" if name in of_shard else "CATALOG_UNAVAILABLE" for name in calls
    }
    assert all(refusals[name].metadata == {"shard": str(user_id % 4)} for name in of_shard)
    assert all(refusal.code is StatusCode.UNAVAILABLE for refusal in refusals.values())

    eventually(lambda: _readable(front, user_id))
    eventually(lambda: all(front.serving(service) for service in SERVICES))
    assert front.create().slug
    # The front tries each database again by itself, at most one second after it has given it up.
    eventually(lambda: all(_asked(front, user) for user in users[:8]))


def test_a_server_that_hangs_and_calls_without_much_time(front: FrontUnderTest, users: range) -> None:
    """Each call is refused with a reason before its client gives up; soon at once, and with the true reason."""
    slug = front.create().slug
    rule = {"percent": 1}
    calls = {
        "read": lambda: segments_of(front, users[3], timeout=1),
        "check": lambda: front.memberships.CheckMembership(
            membership_pb2.CheckMembershipRequest(user_id=users[3], slug=slug), timeout=1
        ),
        "roll out": lambda: front.segments.RollOutSegment(pb.RollOutSegmentRequest(slug=slug, rule=rule), timeout=1),
        "list": lambda: front.segments.ListSegments(pb.ListSegmentsRequest(), timeout=1),
        "export": lambda: list(front.segments.ExportSegmentUsers(pb.ExportSegmentUsersRequest(slug=slug), timeout=1)),
        "operations": lambda: front.operations.ListOperations(
            operations_pb2.ListOperationsRequest(name="operations"), timeout=1
        ),
    }
    shard = {"read", "check"}

    def told_at_once() -> bool:
        begun = time.monotonic()
        with ThreadPoolExecutor(len(calls)) as threads:
            found = threads.map(refused_in_time, calls.values())
            reasons = dict(zip(calls, [each.reason for each in found], strict=True))
        for name, reason in reasons.items():
            assert reason in ("DEADLINE_EXCEEDED", "SHARD_UNAVAILABLE" if name in shard else "CATALOG_UNAVAILABLE")
        return "DEADLINE_EXCEEDED" not in reasons.values() and time.monotonic() - begun < 0.5

    redis.Redis.from_url(front.installation.cache.url).flushall()  # the user is read from the shard
    server = front.installation.server
    server.pause()
    try:
        eventually(told_at_once)

        end = time.monotonic() + 2.5  # longer than an attempt to connect takes
        rounds = [told_at_once()]
        while time.monotonic() < end:
            rounds.append(told_at_once())
        # Each thread of the cold reads tries once, and a busy machine may delay some other rounds.
        assert rounds.count(True) > 2 * rounds.count(False)
    finally:
        server.resume()

    eventually(lambda: _readable(front, users[3]))
    eventually(lambda: all(front.serving(service) for service in SERVICES))
    assert front.create().slug


def test_a_server_that_hangs_after_a_rollout_was_accepted(front: FrontUnderTest) -> None:
    """The rollout goes on, so the call that waits for it answers in time with what it knows."""
    slug = front.create().slug
    server = front.installation.server

    with ThreadPoolExecutor(1) as threads, held(front):
        begun = time.monotonic()
        waiting = threads.submit(roll_out, front, slug, 10, timeout=4)
        name = running_operation(front, slug)
        server.pause()
        try:
            operation = waiting.result(timeout=20)
        finally:
            server.resume()
        assert (operation.name, operation.done) == (name, False)
        assert 3 < time.monotonic() - begun < 4

    eventually(lambda: front.serving("google.longrunning.Operations"))
    eventually(lambda: _ended(front, name))


def _ended(front: FrontUnderTest, name: str) -> bool:
    """Whether an operation has ended well. Until then only the catalog may be the reason: a connection that hung with
    the server may be cut off a moment after the front serves again."""
    try:
        return bool(wait(front, name).response.value)
    except grpc.RpcError as error:
        reason = refusal_of(error).reason
    if reason != "CATALOG_UNAVAILABLE":
        raise AssertionError(reason)
    return False


def _asked(front: FrontUnderTest, user_id: int) -> bool:
    """Whether the user's shard answers a call that no cache can answer."""
    try:
        return front.memberships.GetUser(membership_pb2.GetUserRequest(user_id=user_id)).user_id == user_id
    except grpc.RpcError as error:
        reason = refusal_of(error).reason
    if reason != "SHARD_UNAVAILABLE":
        raise AssertionError(reason)
    return False


def _readable(front: FrontUnderTest, user_id: int) -> bool:
    """Whether the user can be read again; until then only the shard may be the reason."""
    try:
        return segments_of(front, user_id).user_id == user_id
    except grpc.RpcError as error:
        reason = refusal_of(error).reason
    if reason != "SHARD_UNAVAILABLE":
        raise AssertionError(reason)
    return False
