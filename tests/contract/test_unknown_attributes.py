"""A rule that names an attribute that no user has: the preview and the operation report it, and do not refuse it."""

from __future__ import annotations

import json
from typing import Any

import pytest
from segmentation.v1 import segments_pb2 as pb

from tests.contract.conftest import FrontUnderTest
from tests.contract.rollouts import roll_out, wait

FIRST = 7_000_000
RARE = 7_900_001


@pytest.fixture(scope="module")
def users(front: FrontUnderTest) -> None:
    """Users who all have a country; one user, on one shard, has one attribute more."""
    front.installation.create_users({FIRST + n: {"country": "RU", "age": n} for n in range(40)})
    front.installation.create_users({RARE: {"rare_name": "x", "country": "DE"}})


@pytest.mark.usefixtures("users")
@pytest.mark.parametrize(
    ("condition", "unknown"),
    [
        ("", []),
        ("user.country == 'RU' && user.age > 3", []),
        ("user.rare_name == 'x'", []),
        ("user.contry == 'RU'", ["contry"]),
        ("user.country == 'RU' || user.zeta in ['a'] || user.alpha > 1", ["alpha", "zeta"]),
        ("has(user.contry) || 'rare_name' in user || 'Country' in user", ["Country", "contry"]),
        ("user.age in [user.nobody, 1] || size(user.tagz) == 1", ["nobody", "tagz"]),
        ("user.country == 'DE' && user.age == user.agee", ["agee"]),
    ],
)
def test_preview_and_operation_name_them(front: FrontUnderTest, condition: str, unknown: list[str]) -> None:
    slug = front.create().slug
    rule: dict[str, Any] = {"percent": 100, "condition": condition}
    request = pb.PreviewRollOutRequest(slug=slug, rule=rule)
    counts, call = front.segments.PreviewRollOut.with_call(request, timeout=20)
    assert list(counts.unknown_attributes) == unknown
    similar = dict(call.trailing_metadata()).get("segsvc-similar-attributes")
    assert list(json.loads(similar or "{}")) == unknown

    operation = front.segments.RollOutSegment(pb.RollOutSegmentRequest(slug=slug, rule=rule), timeout=20)
    for done in (operation, wait(front, operation.name)):
        response = pb.RollOutSegmentResponse()
        assert done.response.Unpack(response)
        assert list(response.unknown_attributes) == unknown


def test_a_preview_warns_of_what_the_condition_does_not_mean(front: FrontUnderTest) -> None:
    slug = front.create().slug

    def warnings(condition: str) -> list[str]:
        request = pb.PreviewRollOutRequest(slug=slug, rule={"percent": 100, "condition": condition})
        _, call = front.segments.PreviewRollOut.with_call(request, timeout=20)
        found: list[str] = json.loads(dict(call.trailing_metadata()).get("segsvc-condition-warnings", "[]"))
        return found

    [warning] = warnings("user.app < '10.0'")
    assert "for versions write semver" in warning
    [warning] = warnings("user.since < '2026-01-31' || user.name == 'é'")
    assert "for times write timestamp" in warning
    assert warnings("semver(user.app).isLessThan(semver('10.0.0'))") == []


@pytest.mark.usefixtures("users")
@pytest.mark.parametrize(
    ("name", "nearest"), [("contry", "country"), ("Country", "country"), ("rarename", "rare_name"), ("qqqqq", None)]
)
def test_the_nearest_names_are_in_the_message(front: FrontUnderTest, name: str, nearest: str | None) -> None:
    request = pb.PreviewRollOutRequest(
        slug=front.create().slug, rule={"percent": 100, "condition": f"has(user.{name})"}
    )
    _, call = front.segments.PreviewRollOut.with_call(request, timeout=20)
    similar = json.loads(dict(call.trailing_metadata())["segsvc-similar-attributes"])
    assert similar[name][:1] == ([nearest] if nearest else [])


@pytest.mark.usefixtures("users")
def test_unknown_attributes_are_those_of_the_moment(front: FrontUnderTest) -> None:
    slug = front.create().slug
    rule = {"percent": 100, "condition": "user.later == 1"}
    request = pb.PreviewRollOutRequest(slug=slug, rule=rule)
    assert list(front.segments.PreviewRollOut(request, timeout=20).unknown_attributes) == ["later"]
    front.installation.create_users({RARE + 1000: {"later": 2}})
    assert list(front.segments.PreviewRollOut(request, timeout=20).unknown_attributes) == []
    assert roll_out(front, slug, 10).done
