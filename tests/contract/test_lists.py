"""ListSegments: order, filter, and pages that stay right while segments come and go."""

from __future__ import annotations

from collections.abc import Iterator
from uuid import uuid4

import pytest
from grpc import StatusCode
from segmentation.v1 import segments_pb2 as pb

from tests.contract.conftest import FrontUnderTest, new_slug
from tests.contract.refusals import refused


def pages(front: FrontUnderTest, **fields: object) -> Iterator[pb.ListSegmentsResponse]:
    token = ""
    while True:
        page = front.segments.ListSegments(pb.ListSegmentsRequest(page_token=token, **fields), timeout=10)
        yield page
        token = page.next_page_token
        if not token:
            return


def slugs(front: FrontUnderTest, **fields: object) -> list[str]:
    return [segment.slug for page in pages(front, **fields) for segment in page.segments]


@pytest.fixture
def mine() -> dict[str, str]:
    """Labels that only this test's segments have."""
    return {"test": uuid4().hex}


@pytest.fixture
def seven(front: FrontUnderTest, mine: dict[str, str]) -> list[str]:
    """Slugs of seven segments, in the order of their creation, which is not the order of their names."""
    names = [new_slug(prefix) for prefix in ("d", "a.z", "a-z", "a_z", "g", "b", "0")]
    for number, name in enumerate(names):
        front.create(name, labels={**mine, "parity": str(number % 2)})
    return names


@pytest.mark.parametrize("page_size", [1, 2, 3, 7, 8, 5000])
def test_every_segment_once_by_slug(
    front: FrontUnderTest, mine: dict[str, str], seven: list[str], page_size: int
) -> None:
    assert slugs(front, labels=mine, page_size=page_size) == sorted(seven)
    assert slugs(front, labels=mine, page_size=page_size, order_by=" slug  desc ") == sorted(seven, reverse=True)


def test_by_creation(front: FrontUnderTest, mine: dict[str, str], seven: list[str]) -> None:
    assert slugs(front, labels=mine, page_size=2, order_by="create_time") == seven
    assert slugs(front, labels=mine, page_size=2, order_by="create_time desc") == seven[::-1]


def test_by_members(front: FrontUnderTest, mine: dict[str, str], seven: list[str]) -> None:
    front.installation.create_users({number: {} for number in range(1, 41)})
    for slug, percent in zip(seven, (0, 10, 20, 40, 80, 100, 5), strict=True):
        front.segments.RollOutSegment(pb.RollOutSegmentRequest(slug=slug, rule={"percent": percent}), timeout=10)

    listed = [
        (segment.member_count, segment.slug)
        for page in pages(front, labels=mine, page_size=3, order_by="member_count desc")
        for segment in page.segments
    ]

    assert [count for count, _ in listed] == sorted((count for count, _ in listed), reverse=True)
    assert {slug for _, slug in listed} == set(seven)
    assert listed[0][1] == seven[5]
    assert listed[0][0] >= 40


def test_only_segments_with_all_labels(front: FrontUnderTest, mine: dict[str, str], seven: list[str]) -> None:
    assert slugs(front, labels={**mine, "parity": "1"}) == sorted(seven[1::2])
    assert slugs(front, labels={**mine, "parity": "2"}) == []


def test_the_total_is_of_all_pages(front: FrontUnderTest, mine: dict[str, str], seven: list[str]) -> None:
    assert [page.total_size for page in pages(front, labels=mine, page_size=3)] == [7, 7, 7]


def test_a_page_holds_fifty_unless_asked(front: FrontUnderTest) -> None:
    marker = uuid4().hex
    front.installation.fill_catalog(51, marker)
    try:
        sizes = [len(page.segments) for page in pages(front, labels={"marker": marker})]
    finally:
        front.installation.empty_catalog()
    assert sizes == [50, 1]


def test_what_exists_throughout_comes_exactly_once(
    front: FrontUnderTest, mine: dict[str, str], seven: list[str]
) -> None:
    names = sorted(seven)
    walk = pages(front, labels=mine, page_size=2)
    seen = [segment.slug for segment in next(walk).segments]

    front.create("0-" + new_slug(), labels=mine)  # before the current page
    late = front.create("zz-" + new_slug(), labels=mine).slug
    for gone in (names[0], names[1], names[2]):  # the last one seen is among them
        front.segments.DeleteSegment(pb.DeleteSegmentRequest(slug=gone), timeout=10)

    seen += [segment.slug for page in walk for segment in page.segments]
    assert seen == [*names[:2], *names[3:], late]


def test_the_size_may_change_from_page_to_page(front: FrontUnderTest, mine: dict[str, str], seven: list[str]) -> None:
    first = front.segments.ListSegments(pb.ListSegmentsRequest(labels=mine, page_size=1))
    rest = front.segments.ListSegments(pb.ListSegmentsRequest(labels=mine, page_token=first.next_page_token))
    assert [segment.slug for segment in [*first.segments, *rest.segments]] == sorted(seven)


def test_pages_of_large_segments_fit_a_message(front: FrontUnderTest) -> None:
    marker = uuid4().hex
    front.installation.fill_catalog(400, marker, description="界" * 4000)
    try:
        found = list(pages(front, labels={"marker": marker}, page_size=1000))
    finally:
        front.installation.empty_catalog()
    assert len(found) > 1
    assert all(page.ByteSize() < 4 << 20 for page in found)
    assert len({segment.slug for page in found for segment in page.segments}) == 400
    assert all(page.total_size == 400 for page in found)


@pytest.mark.parametrize(
    ("fields", "field"),
    [
        ({"page_size": -1}, "page_size"),
        ({"order_by": "name"}, "order_by"),
        ({"order_by": "slug asc"}, "order_by"),
        ({"order_by": "slug, create_time"}, "order_by"),
        ({"labels": {"Not A Label": ""}}, "labels['Not A Label']"),
        ({"labels": {"a": "b\0"}}, "labels['a']"),
    ],
)
def test_what_cannot_be_asked(front: FrontUnderTest, fields: dict[str, object], field: str) -> None:
    refusal = refused(lambda: front.segments.ListSegments(pb.ListSegmentsRequest(**fields)))
    assert (refusal.code, refusal.reason) == (StatusCode.INVALID_ARGUMENT, "FIELD_INVALID")
    assert list(refusal.violations) == [field]


def test_a_token_of_another_list_is_refused(front: FrontUnderTest, mine: dict[str, str], seven: list[str]) -> None:
    token = front.segments.ListSegments(pb.ListSegmentsRequest(labels=mine, page_size=2)).next_page_token

    for fields in (
        {"labels": {}},
        {"labels": mine, "order_by": "create_time"},
        {"labels": mine, "order_by": "slug desc"},
    ):
        refusal = refused(
            lambda fields=fields: front.segments.ListSegments(pb.ListSegmentsRequest(page_token=token, **fields))
        )
        assert (refusal.code, refusal.reason) == (StatusCode.INVALID_ARGUMENT, "PAGE_TOKEN_INVALID")
        assert list(refusal.violations) == ["page_token"]


@pytest.mark.parametrize("token", ["x", "AAAA", "ü", "=", "a" * 10_000, "…"])
def test_garbage_is_no_token(front: FrontUnderTest, token: str) -> None:
    refusal = refused(lambda: front.segments.ListSegments(pb.ListSegmentsRequest(page_token=token)))
    assert refusal.reason == "PAGE_TOKEN_INVALID"


def test_a_token_that_was_cut_or_altered_is_refused(
    front: FrontUnderTest, mine: dict[str, str], seven: list[str]
) -> None:
    token = front.segments.ListSegments(pb.ListSegmentsRequest(labels=mine, page_size=2)).next_page_token
    for wrong in (token[:-4], token + "AAAA", ("B" if token[0] == "A" else "A") + token[1:]):
        refusal = refused(
            lambda wrong=wrong: front.segments.ListSegments(pb.ListSegmentsRequest(labels=mine, page_token=wrong))
        )
        assert refusal.reason == "PAGE_TOKEN_INVALID"
