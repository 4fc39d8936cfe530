"""Reads of users: their segments, one user at a time and in batches, and the users themselves."""

from __future__ import annotations

from typing import Any

import pytest
from google.protobuf import json_format
from grpc import StatusCode
from segmentation.v1 import membership_pb2 as pb
from segmentation.v1 import segments_pb2

from segsvc.domain.sharding import USER_ID_MAX
from tests.contract.conftest import FrontUnderTest, new_slug
from tests.contract.refusals import read_status, refused

NOBODY = 9_999_999
FIRST = 2_000_000


def segments_of(front: FrontUnderTest, user_id: int) -> pb.UserSegments:
    return front.memberships.GetUserSegments(pb.GetUserSegmentsRequest(user_id=user_id), timeout=10)


def get_user(front: FrontUnderTest, user_id: int) -> pb.User:
    return front.memberships.GetUser(pb.GetUserRequest(user_id=user_id), timeout=10)


def roll_out(front: FrontUnderTest, slug: str, percent: float) -> None:
    request = segments_pb2.RollOutSegmentRequest(slug=slug, rule={"percent": percent})
    assert front.segments.RollOutSegment(request, timeout=20).done


@pytest.fixture
def users(front: FrontUnderTest) -> range:
    found = range(FIRST, FIRST + 40)
    front.installation.create_users({user_id: {} for user_id in found})
    return found


def test_a_user_is_in_what_is_rolled_out_to_all(front: FrontUnderTest, users: range) -> None:
    slugs = [front.create(prefix + front.create().slug).slug for prefix in ("b.", "a-", "a_", "a.")]
    for slug in slugs:
        roll_out(front, slug, 100)
    for user_id in users:
        for _ in range(2):  # from the shard, then from the cache
            answer = segments_of(front, user_id)
            assert answer.user_id == user_id
            assert list(answer.slugs) == sorted(answer.slugs)
            assert set(slugs) <= set(answer.slugs)
            assert answer.HasField("read_time")


def test_a_rollout_is_seen_at_once(front: FrontUnderTest, users: range) -> None:
    slug = front.create().slug
    for percent in (0, 100, 0, 100):
        roll_out(front, slug, percent)
        assert {slug in segments_of(front, user_id).slugs for user_id in users} == {percent == 100}
    front.segments.DeleteSegment(segments_pb2.DeleteSegmentRequest(slug=slug), timeout=20)
    assert not any(slug in segments_of(front, user_id).slugs for user_id in users)


def test_a_user_of_no_segment_has_an_answer(front: FrontUnderTest) -> None:
    front.installation.create_users({USER_ID_MAX: {}})
    answer = segments_of(front, USER_ID_MAX)
    assert answer.user_id == USER_ID_MAX
    assert answer.HasField("read_time")


@pytest.mark.parametrize("call", [segments_of, get_user])
@pytest.mark.parametrize(
    ("user_id", "code", "reason"),
    [
        (NOBODY, StatusCode.NOT_FOUND, "USER_NOT_FOUND"),
        (0, StatusCode.INVALID_ARGUMENT, "FIELD_REQUIRED"),
        (-1, StatusCode.INVALID_ARGUMENT, "FIELD_INVALID"),
        (-(2**63), StatusCode.INVALID_ARGUMENT, "FIELD_INVALID"),
    ],
)
def test_users_that_cannot_be_read(
    front: FrontUnderTest, call: Any, user_id: int, code: StatusCode, reason: str
) -> None:
    refusal = refused(lambda: call(front, user_id))
    assert (refusal.code, refusal.reason) == (code, reason)
    if reason == "USER_NOT_FOUND":
        assert refusal.metadata == {"user_id": str(user_id)}
    else:
        assert list(refusal.violations) == ["user_id"]


def test_a_deleted_user_is_gone(front: FrontUnderTest) -> None:
    front.installation.create_users({FIRST + 1000: {}})
    assert segments_of(front, FIRST + 1000).user_id == FIRST + 1000
    front.installation.delete_users([FIRST + 1000])
    for call in (segments_of, get_user):
        assert refused(lambda call=call: call(front, FIRST + 1000)).reason == "USER_NOT_FOUND"


# -- batches --------------------------------------------------------------------------------------------------------


def batch(front: FrontUnderTest, user_ids: list[int]) -> list[pb.BatchGetUserSegmentsResponse.Result]:
    request = pb.BatchGetUserSegmentsRequest(user_ids=user_ids)
    return list(front.memberships.BatchGetUserSegments(request, timeout=10).results)


@pytest.mark.parametrize("warm", [False, True])
def test_a_batch_is_bounded_in_bytes(front: FrontUnderTest, warm: bool) -> None:
    """For a client with gRPC's own limit; the answer comes from the shard, then from the cache."""
    user_id = FIRST + 2000 + warm
    front.installation.create_users({user_id: {}})
    slugs = [front.create(new_slug("long").ljust(63, "x")).slug for _ in range(50)]
    request = pb.ModifyUserOverridesRequest(user_id=user_id)
    for slug in slugs:
        request.set.add(slug=slug, effect="INCLUDE")
    front.memberships.ModifyUserOverrides(request, timeout=10)
    if warm:
        segments_of(front, user_id)
    asked = pb.BatchGetUserSegmentsRequest(user_ids=[user_id] * 1000)

    response = front.memberships.BatchGetUserSegments(asked, timeout=20)

    assert response.ByteSize() <= 3 << 20
    outcomes = [result.WhichOneof("outcome") for result in response.results]
    assert len(outcomes) == 1000
    found = outcomes.count("user_segments")
    assert 500 < found < 1000
    assert outcomes[:found] == ["user_segments"] * found
    refusals = [read_status(result.error) for result in response.results[found:]]
    assert {(refusal.code, refusal.reason) for refusal in refusals} == {
        (StatusCode.RESOURCE_EXHAUSTED, "ANSWER_TOO_LARGE")
    }
    assert set(slugs) <= set(response.results[0].user_segments.slugs)


def test_a_batch_answers_in_its_order_each_for_itself(front: FrontUnderTest, users: range) -> None:
    asked = [users[3], NOBODY, users[0], users[3], -5, 0]
    results = batch(front, asked)

    assert [result.WhichOneof("outcome") for result in results] == [
        *("user_segments", "error", "user_segments", "user_segments", "error", "error")
    ]

    for index in (0, 2, 3):
        assert results[index].user_segments == segments_of(front, asked[index])

    unknown, negative, zero = (read_status(results[index].error) for index in (1, 4, 5))
    assert (unknown.code, unknown.reason) == (StatusCode.NOT_FOUND, "USER_NOT_FOUND")
    assert (negative.code, list(negative.violations)) == (StatusCode.INVALID_ARGUMENT, ["user_ids[4]"])
    assert (zero.code, list(zero.violations)) == (StatusCode.INVALID_ARGUMENT, ["user_ids[5]"])


def test_a_batch_of_a_thousand(front: FrontUnderTest, users: range) -> None:
    assert len(batch(front, [users[index % len(users)] for index in range(1000)])) == 1000


@pytest.mark.parametrize(("count", "reason"), [(0, "FIELD_REQUIRED"), (1001, "BATCH_TOO_LARGE")])
def test_limits_of_a_batch(front: FrontUnderTest, count: int, reason: str) -> None:
    refusal = refused(lambda: batch(front, [FIRST] * count))
    assert (refusal.code, refusal.reason) == (StatusCode.INVALID_ARGUMENT, reason)
    assert list(refusal.violations) == ["user_ids"]


# -- the user -------------------------------------------------------------------------------------------------------


def test_a_user_with_all_kinds_of_attributes(front: FrontUnderTest) -> None:
    attributes = {
        "country": "RU",
        "name": "Ünïcode ✓\n",
        "age": 42,
        "balance": -0.5,
        "vip": True,
        "banned": False,
        "tags": ["a", "b"],
        "none": [],
        "huge": 2**63 - 1,
    }

    user_id = FIRST + 3001
    front.installation.create_users({user_id: attributes})
    user = get_user(front, user_id)

    assert json_format.MessageToDict(user.attributes) == {**attributes, "huge": float(2**63)}
    assert (user.user_id, user.version, user.shard) == (user_id, 0, user_id % 4)
    assert user.create_time == user.update_time
    assert user.HasField("create_time")


def test_a_user_without_attributes(front: FrontUnderTest, users: range) -> None:
    user = get_user(front, users[0])
    assert user.HasField("attributes")
    assert len(user.attributes) == 0
