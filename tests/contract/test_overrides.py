"""Single users included or excluded by hand, and every reason that a membership can have."""

from __future__ import annotations

import json
import time
from collections.abc import Iterator
from typing import Any
from uuid import uuid4

import pytest
import sqlalchemy as sa
from google.protobuf.timestamp_pb2 import Timestamp
from grpc import StatusCode
from segmentation.v1 import membership_pb2 as pb
from segmentation.v1 import segments_pb2

from segsvc.domain.bucketing import bucket
from segsvc.domain.events import CreateUser, DeleteUser, UpdateUser
from segsvc.postgres.locks import SHARD_LOCK
from tests.contract.conftest import FrontUnderTest, new_slug
from tests.contract.refusals import refused, refused_in_time
from tests.contract.test_conditions import lists, members, rolled_out, salt_of
from tests.eventually import eventually

NOBODY = 9_999_998
IN, OUT = pb.Override.INCLUDE, pb.Override.EXCLUDE
Answer = pb.CheckMembershipResponse
_ids = iter(range(5_000_000, 6_000_000))


@pytest.fixture
def user_id(front: FrontUnderTest) -> Iterator[int]:
    """A user that only this test uses."""
    made = next(_ids)
    front.installation.apply([CreateUser(made, json.dumps({"age": 17}))])
    yield made
    front.installation.apply([DeleteUser(made)])


def modify(front: FrontUnderTest, user_id: int, *put: pb.Override, **fields: Any) -> pb.ModifyUserOverridesResponse:
    request = pb.ModifyUserOverridesRequest(user_id=user_id, set=put, **fields)
    return front.memberships.ModifyUserOverrides(request, timeout=10)


def overrides_of(front: FrontUnderTest, user_id: int, **fields: Any) -> pb.ListUserOverridesResponse:
    return front.memberships.ListUserOverrides(pb.ListUserOverridesRequest(user_id=user_id, **fields), timeout=10)


def check(front: FrontUnderTest, user_id: int, slug: str) -> pb.CheckMembershipResponse:
    answer = front.memberships.CheckMembership(pb.CheckMembershipRequest(user_id=user_id, slug=slug), timeout=10)
    assert answer.member == (slug in lists(front, user_id))
    assert answer.bucket == bucket(user_id, salt_of(front, slug))
    assert answer.explanation
    return answer


def in_seconds(seconds: float) -> Timestamp:
    made = Timestamp()
    made.FromNanoseconds(time.time_ns() + int(seconds * 1e9))
    return made


def test_in_and_out_and_back_to_the_rule(front: FrontUnderTest, user_id: int) -> None:
    everyone, nobody = front.create().slug, front.create().slug
    rolled_out(front, everyone, percent=100)
    for _ in range(2):
        assert nobody not in lists(front, user_id)

    answer = modify(front, user_id, pb.Override(slug=everyone, effect=OUT), pb.Override(slug=nobody, effect=IN))
    assert nobody in answer.user_segments.slugs
    assert everyone not in answer.user_segments.slugs
    assert list(answer.user_segments.slugs) == lists(front, user_id)
    assert answer.user_segments.user_id == user_id
    assert [(own.slug, own.effect) for own in answer.overrides] == sorted([(everyone, OUT), (nobody, IN)])
    assert all(own.HasField("create_time") and not own.HasField("expire_time") for own in answer.overrides)
    assert user_id in members(front, nobody)
    assert user_id not in members(front, everyone)

    rolled_out(front, everyone, percent=50)  # the override stays
    rolled_out(front, everyone, percent=100)
    assert everyone not in lists(front, user_id)

    cleared = modify(front, user_id, clear=[everyone, nobody])
    assert not cleared.overrides
    assert everyone in lists(front, user_id)
    assert nobody not in lists(front, user_id)
    assert modify(front, user_id, clear=[nobody]).user_segments.slugs == cleared.user_segments.slugs


def test_all_of_the_changes_or_none(front: FrontUnderTest, user_id: int) -> None:
    slug = front.create().slug
    refusal = refused(lambda: modify(front, user_id, pb.Override(slug=slug, effect=IN), clear=[new_slug()]))
    assert (refusal.code, refusal.reason) == (StatusCode.NOT_FOUND, "SEGMENT_NOT_FOUND")
    assert slug not in lists(front, user_id)
    assert not overrides_of(front, user_id).overrides


def test_an_override_ends_on_time(front: FrontUnderTest, user_id: int) -> None:
    slug = front.create().slug
    ends = in_seconds(3)
    modify(front, user_id, pb.Override(slug=slug, effect=IN, expire_time=ends))
    [own] = overrides_of(front, user_id).overrides
    assert own.expire_time.ToMicroseconds() == ends.ToMicroseconds()

    eventually(lambda: slug not in lists(front, user_id))
    # Not before, and not as late as an entry of the cache lives: a busy machine has only delayed this check.
    late_s = time.time() - ends.ToMicroseconds() / 1e6
    assert -0.01 < late_s < 20, late_s
    assert not overrides_of(front, user_id).overrides
    assert check(front, user_id, slug).reason == Answer.NO_RULE
    assert user_id not in members(front, slug)


def test_a_later_override_replaces_the_earlier(front: FrontUnderTest, user_id: int) -> None:
    slug = front.create().slug
    ends = in_seconds(2)
    modify(front, user_id, pb.Override(slug=slug, effect=IN, expire_time=ends))
    modify(front, user_id, pb.Override(slug=slug, effect=IN))
    eventually(lambda: time.time() > ends.ToMicroseconds() / 1e6 + 0.1)
    assert slug in lists(front, user_id)
    assert [own.effect for own in modify(front, user_id, pb.Override(slug=slug, effect=OUT)).overrides] == [OUT]


def test_a_repeated_request(front: FrontUnderTest, user_id: int) -> None:
    slug, request_id = front.create().slug, str(uuid4())
    first = modify(front, user_id, pb.Override(slug=slug, effect=IN), request_id=request_id)
    modify(front, user_id, clear=[slug])
    again = modify(front, user_id, pb.Override(slug=slug, effect=IN), request_id=request_id)
    assert again == first
    assert slug not in lists(front, user_id)
    refusal = refused(lambda: modify(front, user_id, pb.Override(slug=slug, effect=OUT), request_id=request_id))
    assert (refusal.code, refusal.reason) == (StatusCode.INVALID_ARGUMENT, "REQUEST_ID_REUSED")


def test_a_request_id_is_the_users_own(front: FrontUnderTest, user_id: int) -> None:
    other = next(_ids)
    front.installation.apply([CreateUser(other, "{}")])
    slug, request_id = front.create().slug, str(uuid4())
    for each in (user_id, other):
        modify(front, each, pb.Override(slug=slug, effect=IN), request_id=request_id)
        assert slug in lists(front, each)


def test_a_refused_request_is_not_kept(front: FrontUnderTest, user_id: int) -> None:
    slug, request_id = new_slug(), str(uuid4())
    refused(lambda: modify(front, user_id, pb.Override(slug=slug, effect=IN), request_id=request_id))
    front.create(slug)
    assert slug in modify(front, user_id, pb.Override(slug=slug, effect=IN), request_id=request_id).user_segments.slugs


def test_no_change_is_a_change_too(front: FrontUnderTest, user_id: int) -> None:
    slug = front.create().slug
    before = modify(front, user_id, pb.Override(slug=slug, effect=IN))
    answer = modify(front, user_id)
    assert answer.user_segments.slugs == before.user_segments.slugs
    assert answer.overrides == before.overrides


@pytest.mark.parametrize(
    ("fields", "reason", "field"),
    [
        ({"set": [{"slug": "a"}]}, "FIELD_REQUIRED", "set[0].effect"),
        ({"set": [{"slug": "a", "effect": 7}]}, "FIELD_INVALID", "set[0].effect"),
        ({"set": [{"effect": "INCLUDE"}]}, "FIELD_REQUIRED", "set[0].slug"),
        ({"set": [{"slug": "A", "effect": "INCLUDE"}]}, "FIELD_INVALID", "set[0].slug"),
        ({"clear": ["ok", "not ok"]}, "FIELD_INVALID", "clear[1]"),
        ({"set": [{"slug": "a", "effect": "INCLUDE"}], "clear": ["a"]}, "FIELD_INVALID", "clear[0]"),
        ({"clear": [f"s{n}" for n in range(1001)]}, "FIELD_INVALID", "set"),
        ({"clear": ["a"], "request_id": "no uuid"}, "FIELD_INVALID", "request_id"),
    ],
)
def test_wrong_changes(front: FrontUnderTest, user_id: int, fields: dict[str, Any], reason: str, field: str) -> None:
    request = pb.ModifyUserOverridesRequest(user_id=user_id, **fields)
    refusal = refused(lambda: front.memberships.ModifyUserOverrides(request, timeout=10))
    assert (refusal.code, refusal.reason) == (StatusCode.INVALID_ARGUMENT, reason)
    assert list(refusal.violations) == [field]


@pytest.mark.parametrize("ends", [Timestamp(seconds=1), in_seconds(-1), Timestamp(seconds=10**15)])
def test_an_end_that_cannot_be(front: FrontUnderTest, user_id: int, ends: Timestamp) -> None:
    slug = front.create().slug
    refusal = refused(lambda: modify(front, user_id, pb.Override(slug=slug, effect=IN, expire_time=ends)))
    assert (refusal.code, refusal.reason) == (StatusCode.INVALID_ARGUMENT, "FIELD_INVALID")
    assert list(refusal.violations) == ["set[0].expire_time"]
    assert slug not in lists(front, user_id)


@pytest.mark.parametrize("seconds", [0.6, 2.5])
def test_a_shard_that_an_operation_holds(front: FrontUnderTest, user_id: int, seconds: float) -> None:
    """The reason comes before the client gives up, whether its time is shorter or longer than the wait for a lock."""
    slug = front.create().slug
    request = pb.ModifyUserOverridesRequest(user_id=user_id, set=[pb.Override(slug=slug, effect=IN)])
    with front.installation.databases.shards[user_id % 4].begin() as holder:
        holder.execute(sa.select(sa.func.pg_advisory_xact_lock(SHARD_LOCK)))
        refusal = refused_in_time(lambda: front.memberships.ModifyUserOverrides(request, timeout=seconds))
    assert (refusal.code, refusal.reason) == (StatusCode.UNAVAILABLE, "SHARD_UNAVAILABLE")
    assert refusal.retry_after_s
    assert slug not in lists(front, user_id)
    assert slug in front.memberships.ModifyUserOverrides(request, timeout=10).user_segments.slugs


def test_a_user_who_is_being_changed(front: FrontUnderTest, user_id: int) -> None:
    """The shard is not at fault: for example, another change of this user waits for the cache."""
    slug = front.create().slug
    request = pb.ModifyUserOverridesRequest(user_id=user_id, set=[pb.Override(slug=slug, effect=IN)])

    with front.installation.databases.shards[user_id % 4].begin() as holder:
        holder.execute(sa.text("SELECT 1 FROM users WHERE id = :id FOR UPDATE"), {"id": user_id})
        refusal = refused_in_time(lambda: front.memberships.ModifyUserOverrides(request, timeout=1.0))

    assert (refusal.code, refusal.reason) == (StatusCode.RESOURCE_EXHAUSTED, "OVERLOADED")
    assert refusal.metadata == {"user_id": str(user_id)}
    assert "shard" not in refusal.message
    assert refusal.retry_after_s
    assert slug in front.memberships.ModifyUserOverrides(request, timeout=10).user_segments.slugs


def test_unknown_users(front: FrontUnderTest) -> None:
    slug = front.create().slug
    for call in (
        lambda: modify(front, NOBODY, pb.Override(slug=slug, effect=IN)),
        lambda: overrides_of(front, NOBODY),
        lambda: front.memberships.CheckMembership(pb.CheckMembershipRequest(user_id=NOBODY, slug=slug), timeout=10),
    ):
        refusal = refused(call)
        assert (refusal.code, refusal.reason) == (StatusCode.NOT_FOUND, "USER_NOT_FOUND")

    for call in (
        lambda: modify(front, 0, clear=[slug]),
        lambda: overrides_of(front, 0),
        lambda: front.memberships.CheckMembership(pb.CheckMembershipRequest(slug=slug), timeout=10),
    ):
        assert refused(call).reason == "FIELD_REQUIRED"

    assert refused(lambda: overrides_of(front, -1)).reason == "FIELD_INVALID"


def test_pages_of_overrides(front: FrontUnderTest, user_id: int) -> None:
    slugs = sorted(front.create(new_slug(prefix)).slug for prefix in ("b.", "a-", "a_", "a.", "c"))
    modify(front, user_id, *(pb.Override(slug=slug, effect=IN) for slug in slugs))

    found: list[str] = []
    token = ""
    while True:
        page = overrides_of(front, user_id, page_size=2, page_token=token)
        found += [own.slug for own in page.overrides]
        token = page.next_page_token
        if not token:
            break

    assert found == slugs
    assert [own.slug for own in overrides_of(front, user_id).overrides] == slugs

    for fields in (
        {"page_token": "x"},
        {"page_token": overrides_of(front, user_id, page_size=1).next_page_token + "A"},
    ):
        assert refused(lambda fields=fields: overrides_of(front, user_id, **fields)).reason == "PAGE_TOKEN_INVALID"
    assert refused(lambda: overrides_of(front, user_id, page_size=-1)).reason == "FIELD_INVALID"


def test_a_deleted_segment_takes_its_overrides_along(front: FrontUnderTest, user_id: int) -> None:
    slug = front.create().slug
    modify(front, user_id, pb.Override(slug=slug, effect=IN))
    front.segments.DeleteSegment(segments_pb2.DeleteSegmentRequest(slug=slug), timeout=20)
    assert not overrides_of(front, user_id).overrides
    front.create(slug)
    assert slug not in lists(front, user_id)
    assert check(front, user_id, slug).reason == Answer.NO_RULE


def test_every_reason(front: FrontUnderTest, user_id: int) -> None:
    slug = front.create().slug
    assert check(front, user_id, slug).reason == Answer.NO_RULE
    where = check(front, user_id, slug).bucket

    rolled_out(front, slug, percent=100)
    inside = check(front, user_id, slug)
    assert (inside.member, inside.reason, inside.rule.percent) == (True, Answer.IN_ROLL_OUT, 100)
    rolled_out(front, slug, percent=where / 1000)
    outside = check(front, user_id, slug)
    assert (outside.member, outside.reason) == (False, Answer.OUTSIDE_PERCENTAGE)
    assert str(where) in outside.explanation

    for percent in (100, where / 1000):
        rolled_out(front, slug, percent=percent, condition="user.age >= 18")
        unmet = check(front, user_id, slug)
        assert (unmet.member, unmet.reason) == (False, Answer.CONDITION_NOT_MET)
        assert unmet.explanation == "user.age >= 18 is not true: user.age is 17"

    modify(front, user_id, pb.Override(slug=slug, effect=IN, expire_time=in_seconds(60)))
    forced = check(front, user_id, slug)
    assert (forced.member, forced.reason) == (True, Answer.INCLUDED_BY_OVERRIDE)
    assert forced.override.HasField("expire_time")
    assert forced.rule.condition == "user.age >= 18"

    modify(front, user_id, pb.Override(slug=slug, effect=OUT))
    kept_out = check(front, user_id, slug)
    assert (kept_out.member, kept_out.reason, kept_out.override.effect) == (False, Answer.EXCLUDED_BY_OVERRIDE, OUT)

    modify(front, user_id, clear=[slug])


def test_reasons_of_a_frozen_rollout(front: FrontUnderTest, user_id: int) -> None:
    slug = front.create().slug
    rolled_out(front, slug, percent=100, condition="user.age >= 18", policy="FROZEN")
    assert check(front, user_id, slug).reason == Answer.CONDITION_NOT_MET
    front.installation.apply([UpdateUser(user_id, 1, json.dumps({"age": 18}))])
    late = check(front, user_id, slug)
    assert (late.member, late.reason) == (False, Answer.NOT_IN_FROZEN_ROLL_OUT)
    rolled_out(front, slug, percent=100, condition="user.age >= 18", policy="FROZEN")
    front.installation.apply([UpdateUser(user_id, 2, json.dumps({"age": 3}))])
    kept = check(front, user_id, slug)
    assert (kept.member, kept.reason) == (True, Answer.IN_ROLL_OUT)


def test_explaining_unknown_users_and_segments(front: FrontUnderTest, user_id: int) -> None:
    for slug, reason in (("", "FIELD_REQUIRED"), ("No", "FIELD_INVALID"), (new_slug(), "SEGMENT_NOT_FOUND")):
        request = pb.CheckMembershipRequest(user_id=user_id, slug=slug)
        assert refused(lambda r=request: front.memberships.CheckMembership(r, timeout=10)).reason == reason
