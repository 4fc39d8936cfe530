"""Segments: created, read, edited."""

from __future__ import annotations

from collections.abc import Callable
from typing import Any
from uuid import UUID, uuid4

import pytest
import sqlalchemy as sa
from google.protobuf.field_mask_pb2 import FieldMask
from grpc import StatusCode
from segmentation.v1 import segments_pb2 as pb

from segsvc.postgres import tables
from tests.contract.conftest import FrontUnderTest, new_slug
from tests.contract.refusals import refused


def get(front: FrontUnderTest, slug: str) -> pb.Segment:
    return front.segments.GetSegment(pb.GetSegmentRequest(slug=slug), timeout=10)


def update(front: FrontUnderTest, mask: list[str] | None = None, **fields: Any) -> pb.Segment:
    request = pb.UpdateSegmentRequest(
        segment=pb.Segment(**fields), update_mask=FieldMask(paths=mask) if mask is not None else None
    )
    return front.segments.UpdateSegment(request, timeout=10)


def test_a_new_segment_has_everything_but_a_rule(front: FrontUnderTest) -> None:
    slug = new_slug("a.b_c")
    created = front.create(slug, display_name="Ä", description="über\nzwei Zeilen", labels={"team": "growth", "x": ""})

    assert created.slug == slug
    assert (created.display_name, created.description) == ("Ä", "über\nzwei Zeilen")
    assert dict(created.labels) == {"team": "growth", "x": ""}
    assert not created.HasField("rule")
    assert created.state == pb.Segment.ACTIVE
    assert UUID(created.uid)
    assert created.etag
    assert created.create_time.ToDatetime() <= created.update_time.ToDatetime()
    assert created.member_count == 0
    assert get(front, slug) == created


def test_output_only_fields_of_a_new_segment_are_ignored(front: FrontUnderTest) -> None:
    created = front.create(uid="mine", etag="mine", state=pb.Segment.DELETING, member_count=7, rule={"percent": 50})
    assert created.uid != "mine"
    assert created.etag != "mine"
    assert (created.state, created.member_count, created.HasField("rule")) == (pb.Segment.ACTIVE, 0, False)


def test_a_slug_is_taken_once(front: FrontUnderTest) -> None:
    slug = front.create().slug
    refusal = refused(lambda: front.create(slug))
    assert (refusal.code, refusal.reason) == (StatusCode.ALREADY_EXISTS, "SEGMENT_EXISTS")
    assert refusal.metadata == {"slug": slug}


@pytest.mark.parametrize(
    ("fields", "field", "reason"),
    [
        ({"slug": "Upper"}, "segment.slug", "FIELD_INVALID"),
        ({"slug": "-a"}, "segment.slug", "FIELD_INVALID"),
        ({"slug": "a\n"}, "segment.slug", "FIELD_INVALID"),
        ({"slug": "a" * 64}, "segment.slug", "FIELD_INVALID"),
        ({"slug": ""}, "segment.slug", "FIELD_REQUIRED"),
        ({"display_name": "a" * 201}, "segment.display_name", "FIELD_INVALID"),
        ({"display_name": "a\0"}, "segment.display_name", "FIELD_INVALID"),
        ({"description": "ж" * 4001}, "segment.description", "FIELD_INVALID"),
        ({"labels": {f"l{number}": "" for number in range(33)}}, "segment.labels", "FIELD_INVALID"),
        ({"labels": {"Upper": ""}}, "segment.labels['Upper']", "FIELD_INVALID"),
        ({"labels": {"a": "v" * 64}}, "segment.labels['a']", "FIELD_INVALID"),
    ],
)
def test_limits_of_a_new_segment(front: FrontUnderTest, fields: dict[str, Any], field: str, reason: str) -> None:
    segment = pb.Segment(**{"slug": new_slug(), **fields})
    refusal = refused(lambda: front.segments.CreateSegment(pb.CreateSegmentRequest(segment=segment), timeout=10))
    assert (refusal.code, refusal.reason) == (StatusCode.INVALID_ARGUMENT, reason)
    assert list(refusal.violations) == [field]


def test_the_largest_segment_is_legal(front: FrontUnderTest) -> None:
    largest = {
        "display_name": "界" * 200,
        "description": "界" * 4000,
        "labels": {f"{number:02}" + "k" * 61: "界" * 63 for number in range(32)},
    }
    created = front.create("z" + new_slug().ljust(62, "9"), **largest)
    assert len(created.slug) == 63
    assert created.description == largest["description"]
    assert get(front, created.slug) == created


@pytest.mark.parametrize(
    ("call", "field"),
    [
        (lambda front: front.segments.CreateSegment(pb.CreateSegmentRequest()), "segment"),
        (lambda front: front.segments.UpdateSegment(pb.UpdateSegmentRequest()), "segment"),
        (lambda front: front.segments.UpdateSegment(pb.UpdateSegmentRequest(segment={})), "segment.slug"),
        (lambda front: front.segments.GetSegment(pb.GetSegmentRequest()), "slug"),
        (lambda front: front.segments.DeleteSegment(pb.DeleteSegmentRequest()), "slug"),
        (lambda front: front.segments.RollOutSegment(pb.RollOutSegmentRequest()), "slug"),
        (lambda front: front.segments.RollOutSegment(pb.RollOutSegmentRequest(slug="a")), "rule"),
        (lambda front: front.segments.RollOutSegment(pb.RollOutSegmentRequest(slug="a", rule={})), "rule.percent"),
        (lambda front: front.segments.GetSegmentStatistics(pb.GetSegmentStatisticsRequest()), "slug"),
        (lambda front: list(front.segments.ExportSegmentUsers(pb.ExportSegmentUsersRequest())), "slug"),
    ],
)
def test_required_fields(front: FrontUnderTest, call: Callable[[FrontUnderTest], Any], field: str) -> None:
    refusal = refused(lambda: call(front))
    assert (refusal.code, refusal.reason) == (StatusCode.INVALID_ARGUMENT, "FIELD_REQUIRED")
    assert list(refusal.violations) == [field]


@pytest.mark.parametrize(
    "call",
    [
        lambda front, slug: front.segments.GetSegment(pb.GetSegmentRequest(slug=slug)),
        lambda front, slug: update(front, slug=slug, display_name="x"),
        lambda front, slug: front.segments.DeleteSegment(pb.DeleteSegmentRequest(slug=slug)),
        lambda front, slug: front.segments.RollOutSegment(pb.RollOutSegmentRequest(slug=slug, rule={"percent": 1})),
        lambda front, slug: front.segments.GetSegmentStatistics(pb.GetSegmentStatisticsRequest(slug=slug)),
        lambda front, slug: list(front.segments.ExportSegmentUsers(pb.ExportSegmentUsersRequest(slug=slug))),
    ],
)
def test_a_segment_that_does_not_exist(front: FrontUnderTest, call: Callable[[FrontUnderTest, str], Any]) -> None:
    slug = new_slug()
    refusal = refused(lambda: call(front, slug))
    assert (refusal.code, refusal.reason) == (StatusCode.NOT_FOUND, "SEGMENT_NOT_FOUND")
    assert refusal.metadata == {"slug": slug}


# -- edit -----------------------------------------------------------------------------------------------------------


def test_without_a_mask_every_field_that_is_set_is_changed(front: FrontUnderTest) -> None:
    before = front.create(display_name="name", description="text", labels={"a": "1"})
    after = update(front, slug=before.slug, display_name="new", labels={"b": "2"})
    assert (after.display_name, after.description, dict(after.labels)) == ("new", "text", {"b": "2"})
    assert after.etag != before.etag
    assert after.update_time.ToDatetime() > before.update_time.ToDatetime()
    assert (after.uid, after.create_time) == (before.uid, before.create_time)
    assert get(front, before.slug) == after


def test_a_mask_changes_its_fields_and_no_others(front: FrontUnderTest) -> None:
    before = front.create(display_name="name", description="text", labels={"a": "1"})
    after = update(front, ["description"], slug=before.slug, display_name="ignored")
    assert (after.display_name, after.description, dict(after.labels)) == ("name", "", {"a": "1"})


def test_a_star_changes_all_that_can_be_changed(front: FrontUnderTest) -> None:
    before = front.create(display_name="name", description="text", labels={"a": "1"})
    after = update(front, ["*"], slug=before.slug, description="new")
    assert (after.display_name, after.description, dict(after.labels)) == ("", "new", {})
    assert after.state == pb.Segment.ACTIVE


@pytest.mark.parametrize(
    "path", ["rule", "slug", "state", "etag", "member_count", "nonsense", "labels.a", "", "*,slug"]
)
def test_a_mask_cannot_name_anything_else(front: FrontUnderTest, path: str) -> None:
    slug = front.create().slug
    refusal = refused(lambda: update(front, path.split(","), slug=slug, display_name="x"))
    assert (refusal.code, refusal.reason) == (StatusCode.INVALID_ARGUMENT, "FIELD_INVALID")
    assert list(refusal.violations) == ["update_mask"]


def test_an_update_of_nothing_changes_nothing(front: FrontUnderTest) -> None:
    before = front.create(display_name="name")
    assert update(front, slug=before.slug) == before


def test_an_edit_is_in_the_audit_trail(front: FrontUnderTest) -> None:
    slug = front.create().slug
    update(front, slug=slug, display_name="one", labels={"a": "b"})
    update(front, slug=slug, description="two")
    audit = tables.audit.c
    with front.installation.databases.catalog.connect() as connection:
        trail = connection.execute(
            sa.select(audit.action, audit.details).where(audit.slug == slug).order_by(audit.seq)
        ).all()
    assert [row.action for row in trail] == ["created", "edited", "edited"]
    assert [row.details for row in trail[1:]] == [{"display_name": "one", "labels": {"a": "b"}}, {"description": "two"}]


def test_a_stale_etag_is_refused(front: FrontUnderTest) -> None:
    before = front.create()
    after = update(front, slug=before.slug, display_name="one", etag=before.etag)
    refusal = refused(lambda: update(front, slug=before.slug, display_name="two", etag=before.etag))
    assert (refusal.code, refusal.reason) == (StatusCode.ABORTED, "ETAG_MISMATCH")
    assert get(front, before.slug) == after


def test_a_rollout_or_deletion_with_a_stale_etag_is_refused(front: FrontUnderTest) -> None:
    before = front.create()
    update(front, slug=before.slug, display_name="one")
    roll_out = pb.RollOutSegmentRequest(slug=before.slug, rule={"percent": 1}, etag=before.etag)
    delete = pb.DeleteSegmentRequest(slug=before.slug, etag=before.etag)
    for call in (lambda: front.segments.RollOutSegment(roll_out), lambda: front.segments.DeleteSegment(delete)):
        refusal = refused(call)
        assert (refusal.code, refusal.reason) == (StatusCode.ABORTED, "ETAG_MISMATCH")


def test_an_etag_that_was_never_issued(front: FrontUnderTest) -> None:
    slug = front.create().slug
    refusal = refused(lambda: update(front, slug=slug, display_name="x", etag="no\0etag"))
    assert (refusal.reason, list(refusal.violations)) == ("FIELD_INVALID", ["segment.etag"])


def test_limits_of_an_edit(front: FrontUnderTest) -> None:
    slug = front.create().slug
    refusal = refused(lambda: update(front, slug=slug, display_name="a" * 201))
    assert (refusal.reason, list(refusal.violations)) == ("FIELD_INVALID", ["segment.display_name"])


# -- request_id -----------------------------------------------------------------------------------------------------


def test_a_repeated_creation_answers_as_the_first_time(front: FrontUnderTest) -> None:
    request = pb.CreateSegmentRequest(
        segment=pb.Segment(slug=new_slug(), labels={"a": "1", "b": "2"}), request_id=str(uuid4())
    )
    first = front.segments.CreateSegment(request, timeout=10)
    update(front, slug=first.slug, display_name="changed since")
    assert front.segments.CreateSegment(request, timeout=10) == first
    request.request_id = request.request_id.upper()
    assert front.segments.CreateSegment(request, timeout=10) == first


def test_a_request_id_is_for_one_content(front: FrontUnderTest) -> None:
    request = pb.CreateSegmentRequest(segment=pb.Segment(slug=new_slug()), request_id=str(uuid4()))
    front.segments.CreateSegment(request, timeout=10)
    request.segment.display_name = "other"
    refusal = refused(lambda: front.segments.CreateSegment(request, timeout=10))
    assert (refusal.code, refusal.reason) == (StatusCode.INVALID_ARGUMENT, "REQUEST_ID_REUSED")
    assert list(refusal.violations) == ["request_id"]


def test_failures_are_not_kept(front: FrontUnderTest) -> None:
    taken = front.create().slug
    request = pb.CreateSegmentRequest(segment=pb.Segment(slug=taken), request_id=str(uuid4()))
    assert refused(lambda: front.segments.CreateSegment(request, timeout=10)).reason == "SEGMENT_EXISTS"
    front.segments.DeleteSegment(pb.DeleteSegmentRequest(slug=taken), timeout=10)
    assert front.segments.CreateSegment(request, timeout=10).slug == taken


def test_a_request_id_must_be_a_uuid(front: FrontUnderTest) -> None:
    request = pb.CreateSegmentRequest(segment=pb.Segment(slug=new_slug()), request_id="once")
    refusal = refused(lambda: front.segments.CreateSegment(request, timeout=10))
    assert (refusal.reason, list(refusal.violations)) == ("FIELD_INVALID", ["request_id"])
