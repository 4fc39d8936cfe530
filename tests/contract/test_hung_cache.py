"""A cache that hangs: calls that do not need it succeed, calls that need it name it, and no call blames a shard."""

from __future__ import annotations

from collections.abc import Callable, Iterator
from concurrent.futures import ThreadPoolExecutor
from contextlib import contextmanager
from functools import partial
from typing import Any
from uuid import uuid4

import grpc
import pytest
from grpc import StatusCode
from segmentation.v1 import membership_pb2 as members
from segmentation.v1 import segments_pb2 as pb

from tests.contract.conftest import FrontUnderTest, new_slug
from tests.contract.refusals import answered_in_time, gave_up, refusal_of
from tests.contract.rollouts import roll_out, wait
from tests.eventually import eventually

USERS = range(9_300_000, 9_300_008)


@contextmanager
def hung_cache(front: FrontUnderTest) -> Iterator[None]:
    front.installation.cache.pause()
    try:
        yield
    finally:
        front.installation.cache.resume()


@pytest.fixture
def slug(front: FrontUnderTest) -> str:
    front.installation.create_users({user_id: {} for user_id in USERS})
    made = front.create().slug
    roll_out(front, made, 50)
    return made


def ended(call: Callable[..., Any], timeout: float) -> tuple[StatusCode, str, str]:
    """How a call ended: code, reason and message; no reason: it succeeded, or the client gave up."""
    try:
        call(timeout=timeout)
    except grpc.RpcError as error:
        if gave_up(error):
            return StatusCode.DEADLINE_EXCEEDED, "", ""
        refusal = refusal_of(error)
        assert "shard" not in refusal.message, refusal
        assert "shard" not in refusal.metadata, refusal
        return refusal.code, refusal.reason, refusal.message
    return StatusCode.OK, "", ""


def test_each_kind_of_call(front: FrontUnderTest, slug: str) -> None:
    override = members.Override(slug=slug, effect=members.Override.INCLUDE)
    calls: dict[str, Callable[..., Any]] = {
        "read": partial(front.memberships.GetUserSegments, members.GetUserSegmentsRequest(user_id=USERS[0])),
        "batch": partial(
            front.memberships.BatchGetUserSegments, members.BatchGetUserSegmentsRequest(user_ids=list(USERS))
        ),
        "user": partial(front.memberships.GetUser, members.GetUserRequest(user_id=USERS[0])),
        "check": partial(
            front.memberships.CheckMembership, members.CheckMembershipRequest(user_id=USERS[0], slug=slug)
        ),
        "overrides": partial(front.memberships.ListUserOverrides, members.ListUserOverridesRequest(user_id=USERS[0])),
        "segment": partial(front.segments.GetSegment, pb.GetSegmentRequest(slug=slug)),
        "list": partial(front.segments.ListSegments, pb.ListSegmentsRequest()),
        "statistics": partial(front.segments.GetSegmentStatistics, pb.GetSegmentStatisticsRequest(slug=slug)),
        "preview": partial(front.segments.PreviewRollOut, pb.PreviewRollOutRequest(slug=slug, rule={"percent": 9})),
        "export": lambda **key: list(front.segments.ExportSegmentUsers(pb.ExportSegmentUsersRequest(slug=slug), **key)),
        "edit": partial(front.segments.UpdateSegment, pb.UpdateSegmentRequest(segment={"slug": slug})),
        "create": partial(front.segments.CreateSegment, pb.CreateSegmentRequest(segment={"slug": new_slug()})),
        "override": partial(
            front.memberships.ModifyUserOverrides, members.ModifyUserOverridesRequest(user_id=USERS[1], set=[override])
        ),
    }

    request_id = str(uuid4())
    with ThreadPoolExecutor(len(calls)) as threads, hung_cache(front):
        found = dict(zip(calls, threads.map(lambda call: ended(call, 15), calls.values()), strict=True))
        accepted = answered_in_time(lambda: roll_out(front, slug, 60, timeout=1.0, request_id=request_id))

    code, reason, message = found.pop("override")
    assert (code, reason) == (StatusCode.UNAVAILABLE, "CACHE_UNAVAILABLE")
    assert "the cache" in message
    assert set(found.values()) == {(StatusCode.OK, "", "")}, found

    # The rollout must not be reported as done before the cache knows of it.
    assert not accepted.done
    assert wait(front, accepted.name, timeout=30).done


def test_many_changes_of_one_user(front: FrontUnderTest, slug: str) -> None:
    """Each change holds the user's row while it waits for the cache, and the next change waits for the row."""
    override = members.Override(slug=slug, effect=members.Override.INCLUDE)
    request = members.ModifyUserOverridesRequest(user_id=USERS[2], set=[override])
    change = partial(front.memberships.ModifyUserOverrides, request)

    with ThreadPoolExecutor(12) as threads, hung_cache(front):
        found = {end[:2] for end in threads.map(lambda _: ended(change, 1.0), range(12))}

    assert found <= {
        (StatusCode.UNAVAILABLE, "CACHE_UNAVAILABLE"),
        (StatusCode.RESOURCE_EXHAUSTED, "OVERLOADED"),
        (StatusCode.DEADLINE_EXCEEDED, "DEADLINE_EXCEEDED"),
        # A busy machine may delay the answer beyond the deadline.
        (StatusCode.DEADLINE_EXCEEDED, ""),
    }
    eventually(lambda: ended(change, 10)[0] is StatusCode.OK)
