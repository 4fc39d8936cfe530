"""Rollouts with a condition, FROZEN rollouts, and their previews: compared with the definition, computed here."""

from __future__ import annotations

import json
from collections.abc import Mapping
from typing import Any

import pytest
import sqlalchemy as sa
from grpc import StatusCode
from segmentation.v1 import membership_pb2
from segmentation.v1 import segments_pb2 as pb

from segsvc.domain.bucketing import bucket
from segsvc.domain.events import CreateUser, DeleteUser, UpdateUser
from segsvc.postgres import tables
from tests.contract.conftest import FrontUnderTest, new_slug
from tests.contract.refusals import refused
from tests.contract.rollouts import held, operations_of

FIRST = 4_000_000
ADULTS = "user.country == 'RU' && user.age >= 18"
COUNTS = ("matched_count", "added_count", "removed_count", "member_count")


def attributes_of(user_id: int) -> dict[str, Any]:
    country = ("RU", "DE", "FR")[user_id % 3]
    return {"country": country} if user_id % 7 == 0 else {"country": country, "age": user_id % 60}


def is_adult(attributes: Mapping[str, Any]) -> bool:
    return attributes.get("country") == "RU" and attributes.get("age", 0) >= 18


@pytest.fixture(scope="module")
def users(front: FrontUnderTest) -> dict[int, dict[str, Any]]:
    found = {user_id: attributes_of(user_id) for user_id in range(FIRST, FIRST + 3000)}
    front.installation.create_users(found)
    return found


def salt_of(front: FrontUnderTest, slug: str) -> int:
    with front.installation.databases.catalog.connect() as connection:
        stored = connection.execute(sa.select(tables.segments.c.salt).where(tables.segments.c.slug == slug))
        return tables.salt_from_db(stored.scalar_one())


def rolled_out(front: FrontUnderTest, slug: str, **rule: Any) -> pb.RollOutSegmentResponse:
    operation = front.segments.RollOutSegment(pb.RollOutSegmentRequest(slug=slug, rule=rule), timeout=20)
    response = pb.RollOutSegmentResponse()
    assert operation.response.Unpack(response), operation
    return response


def preview(front: FrontUnderTest, slug: str, **rule: Any) -> pb.PreviewRollOutResponse:
    return front.segments.PreviewRollOut(pb.PreviewRollOutRequest(slug=slug, rule=rule), timeout=20)


def members(front: FrontUnderTest, slug: str) -> set[int]:
    stream = front.segments.ExportSegmentUsers(pb.ExportSegmentUsersRequest(slug=slug), timeout=20)
    return {user_id for batch in stream for user_id in batch.user_ids}


def lists(front: FrontUnderTest, user_id: int) -> list[str]:
    request = membership_pb2.GetUserSegmentsRequest(user_id=user_id)
    return list(front.memberships.GetUserSegments(request, timeout=10).slugs)


def counts(message: Any) -> list[int]:
    return [getattr(message, name) for name in COUNTS]


def test_a_condition_and_a_percentage(front: FrontUnderTest, users: dict[int, dict[str, Any]]) -> None:
    slug = front.create().slug
    response = rolled_out(front, slug, percent=30, condition=ADULTS)

    matching = {user_id for user_id, attributes in users.items() if is_adult(attributes)}
    wanted = {user_id for user_id in matching if bucket(user_id, salt_of(front, slug)) < 30_000}
    assert members(front, slug) & users.keys() == wanted

    assert response.matched_count >= len(matching)
    assert response.member_count == len(members(front, slug))
    assert (response.segment.rule.condition, response.segment.rule.policy) == (ADULTS, pb.RollOutRule.LIVE)
    assert [counts(response)] == [[sum(getattr(part, name) for part in response.shards) for name in COUNTS]]

    some = sorted(wanted)[:20] + sorted(users.keys() - wanted)[:20]
    assert {user_id for user_id in some if slug in lists(front, user_id)} == wanted.intersection(some)


def test_a_preview_is_what_the_rollout_counts(front: FrontUnderTest, users: dict[int, dict[str, Any]]) -> None:
    slug = front.create().slug
    for rule in (
        {"percent": 20},
        {"percent": 50, "condition": ADULTS},
        {"percent": 10, "condition": "has(user.age)", "policy": "FROZEN"},
        {"percent": 0},
    ):
        before = members(front, slug)
        foreseen = preview(front, slug, **rule)
        assert members(front, slug) == before

        response = rolled_out(front, slug, **rule)
        assert counts(foreseen) == counts(response)
        assert list(foreseen.shards) == list(response.shards)


def test_a_preview_does_not_wait(front: FrontUnderTest, users: dict[int, dict[str, Any]]) -> None:
    slug = front.create().slug
    with held(front):
        request = pb.RollOutSegmentRequest(slug=slug, rule={"percent": 50}, return_immediately=True)
        name = front.segments.RollOutSegment(request, timeout=10).name
        assert name
        foreseen = preview(front, slug, percent=50)
        assert foreseen.added_count == foreseen.member_count > 0


@pytest.mark.parametrize(
    ("rule", "reason", "field"),
    [
        ({"percent": 10, "condition": "user.a =="}, "CONDITION_INVALID", "rule.condition"),
        ({"percent": 10, "condition": "user.a + 1 > 2"}, "CONDITION_INVALID", "rule.condition"),
        ({"percent": 10, "condition": "user.a.b == 1"}, "CONDITION_INVALID", "rule.condition"),
        ({"percent": 10, "condition": "user.a == '" + "a" * 4096 + "'"}, "CONDITION_INVALID", "rule.condition"),
        ({"percent": 10, "condition": "1"}, "CONDITION_INVALID", "rule.condition"),
        ({"percent": 10, "condition": "(" * 33 + "true" + ")" * 33}, "CONDITION_INVALID", "rule.condition"),
        ({"percent": 10, "condition": "user.a in [" + "1," * 1000 + "1]"}, "CONDITION_INVALID", "rule.condition"),
        ({"condition": "true"}, "FIELD_REQUIRED", "rule.percent"),
        ({"percent": 101}, "FIELD_INVALID", "rule.percent"),
    ],
)
def test_a_rule_that_is_wrong(front: FrontUnderTest, rule: dict[str, Any], reason: str, field: str) -> None:
    slug = front.create().slug
    for call in (
        lambda: front.segments.RollOutSegment(pb.RollOutSegmentRequest(slug=slug, rule=rule), timeout=10),
        lambda: front.segments.PreviewRollOut(pb.PreviewRollOutRequest(slug=slug, rule=rule), timeout=10),
    ):
        refusal = refused(call)
        assert (refusal.code, refusal.reason) == (StatusCode.INVALID_ARGUMENT, reason)
        assert list(refusal.violations) == [field]
    assert not front.segments.GetSegment(pb.GetSegmentRequest(slug=slug), timeout=10).HasField("rule")


def test_a_wrong_condition_says_where(front: FrontUnderTest) -> None:
    rule = {"percent": 10, "condition": "true ||\n  user.a + 1 > 2"}
    refusal = refused(lambda: rolled_out(front, front.create().slug, **rule))
    assert (refusal.metadata["line"], refusal.metadata["column"]) == ("2", "10")
    assert "line 2, column 10: + is not allowed" in refusal.message


@pytest.mark.parametrize(
    ("condition", "column", "said"),
    [
        ('user.s == "é😀" && user.a + 1 > 2', 26, "+ is not allowed"),  # in characters, not bytes
        ("user.a in [" + "1," * 1000 + "1]", 11, "at most 1000 items, has 1001"),
        ("!(" * 31 + "user.a" + ")" * 31, 1, "at most 32 levels"),  # found by the depth of what it means
        ("user.a == " * 40 + "true", 1, "at most 32 levels"),
        ('user["a-b"] == 1', 6, "names of attributes match"),
        ("has(user.a) && user.b in user", 26, "user is not a value here"),
        ('user.a == "x\0"', 13, "U+0000 only as an escape"),
        ("(" * 33 + "user.a" + ")" * 33, 1, "at most 32 levels"),  # found by the depth of what is written
    ],
)
def test_the_place_and_the_limit_are_named(front: FrontUnderTest, condition: str, column: int, said: str) -> None:
    refusal = refused(lambda: preview(front, "anything", percent=10, condition=condition))
    assert refusal.reason == "CONDITION_INVALID"
    assert refusal.metadata["column"] == str(column)
    assert said in refusal.violations["rule.condition"]


def test_literals_that_no_user_can_have(front: FrontUnderTest, users: dict[int, dict[str, Any]]) -> None:
    slug = front.create().slug
    condition = r"'country' in user && user.country > 'DE\x00' && user.country < 'RU\u0000' && user.country != 'FR\000'"
    response = rolled_out(front, slug, percent=100, condition=condition)
    assert response.segment.rule.condition == condition
    found = members(front, slug) & users.keys()
    assert found == {user_id for user_id, attributes in users.items() if attributes["country"] in ("FR", "RU")}


def test_a_preview_of_an_unknown_segment(front: FrontUnderTest) -> None:
    refusal = refused(lambda: preview(front, new_slug(), percent=1))
    assert (refusal.code, refusal.reason) == (StatusCode.NOT_FOUND, "SEGMENT_NOT_FOUND")


def test_users_who_come_and_change_follow_a_live_rule(front: FrontUnderTest) -> None:
    slug = front.create().slug
    rolled_out(front, slug, percent=100, condition=ADULTS)
    user_id = FIRST + 10_000
    adult, minor = ({"country": "RU", "age": age} for age in (30, 10))
    apply = front.installation.apply

    apply([CreateUser(user_id, json.dumps(adult))])
    assert slug in lists(front, user_id)
    apply([UpdateUser(user_id, 2, json.dumps(minor))])
    assert slug not in lists(front, user_id)
    apply([UpdateUser(user_id, 1, json.dumps(adult))])  # overtaken by version 2
    assert slug not in lists(front, user_id)
    apply([UpdateUser(user_id, 3, json.dumps(adult))])
    assert slug in lists(front, user_id)

    apply([UpdateUser(user_id + 1, 5, json.dumps(adult)), CreateUser(user_id + 1, json.dumps(minor))])
    assert slug in lists(front, user_id + 1)
    apply([DeleteUser(user_id)])
    assert user_id not in members(front, slug)


def test_a_frozen_rollout_keeps_whom_it_found(front: FrontUnderTest) -> None:
    slug = front.create().slug
    inside, outside, later = (FIRST + 20_000 + n for n in range(3))
    adult, minor = (json.dumps({"country": "RU", "age": age}) for age in (30, 10))
    apply = front.installation.apply
    apply([CreateUser(inside, adult), CreateUser(outside, minor)])
    rolled_out(front, slug, percent=100, condition=ADULTS, policy="FROZEN")
    apply([UpdateUser(inside, 1, minor), UpdateUser(outside, 1, adult), CreateUser(later, adult)])
    assert [slug in lists(front, user_id) for user_id in (inside, outside, later)] == [True, False, False]
    rolled_out(front, slug, percent=100, condition=ADULTS)
    assert [slug in lists(front, user_id) for user_id in (inside, outside, later)] == [False, True, True]


def test_a_condition_that_costs_too_much_is_refused_before_anything_is_done(front: FrontUnderTest) -> None:
    slug = front.create().slug
    rule = {"percent": 10, "condition": "has(user.nobody) && (" + " || ".join(["user.a < user.b"] * 200) + ")"}

    for call in (
        lambda: front.segments.PreviewRollOut(pb.PreviewRollOutRequest(slug=slug, rule=rule), timeout=20),
        lambda: front.segments.RollOutSegment(pb.RollOutSegmentRequest(slug=slug, rule=rule), timeout=20),
    ):
        refusal = refused(call)
        assert (refusal.code, refusal.reason) == (StatusCode.FAILED_PRECONDITION, "CONDITION_TOO_COSTLY")
        assert set(refusal.metadata) == {"cost_us", "limit_us"}
        assert float(refusal.metadata["cost_us"]) > float(refusal.metadata["limit_us"]) > 0
        assert f"{refusal.metadata['cost_us']} µs a user" in refusal.message

    assert [operation.metadata for operation in operations_of(front, slug) if not operation.done] == []
    assert not front.segments.GetSegment(pb.GetSegmentRequest(slug=slug), timeout=10).HasField("rule")
