"""Requests read and responses written."""

from __future__ import annotations

from collections.abc import Callable
from datetime import UTC, datetime
from typing import Any
from uuid import UUID, uuid4

import pytest
from google.protobuf import json_format
from google.protobuf.field_mask_pb2 import FieldMask
from hypothesis import given
from hypothesis import strategies as st
from segmentation.v1 import operations_pb2
from segmentation.v1 import segments_pb2 as pb

from grpc_api import convert
from segsvc.domain.catalog import EditedField
from segsvc.domain.errors import Reason, ServiceError
from segsvc.domain.operation import OperationFilter, OperationKind, OperationState, ShardState
from segsvc.domain.segment import Policy, SegmentState
from segsvc.domain.user import User


def reason_of(read: Callable[[], object]) -> Reason | None:
    """Why a text is refused; None: it is not."""
    try:
        read()
    except ServiceError as error:
        return error.reason
    return None


NOW = datetime(2026, 1, 2, 3, 4, 5, 678901, tzinfo=UTC)


def test_the_domain_has_the_numbers_of_the_protos() -> None:
    for ours, theirs in (
        (OperationKind, operations_pb2.OperationMetadata.Kind),
        (OperationState, operations_pb2.OperationMetadata.State),
        (ShardState, operations_pb2.ShardProgress.State),
        (Policy, pb.RollOutRule.Policy),
    ):
        named = {name: number for name, number in theirs.items() if not name.endswith("_UNSPECIFIED")}
        assert {item.name: item.value for item in ours} == named  # type: ignore[attr-defined]
    assert SegmentState.ACTIVE == pb.Segment.ACTIVE
    assert SegmentState.DELETING == pb.Segment.DELETING


def test_a_request_key_is_of_the_content_without_its_id() -> None:
    labels = {str(number): "x" for number in range(20)}
    one = pb.CreateSegmentRequest(segment={"slug": "a", "labels": labels}, request_id=str(uuid4()))
    other = pb.CreateSegmentRequest(
        segment={"slug": "a", "labels": dict(reversed(labels.items()))}, request_id=str(uuid4())
    )

    first, second = convert.request_key_of("/m", one), convert.request_key_of("/m", other)
    assert first is not None
    assert second is not None
    assert first.content_hash == second.content_hash
    assert (first.method, first.request_id) == ("/m", UUID(one.request_id))

    other.segment.slug = "b"
    changed = convert.request_key_of("/m", other)
    assert changed is not None
    assert changed.content_hash != second.content_hash

    assert one.request_id, "the request itself is not touched"
    assert convert.request_key_of("/m", pb.CreateSegmentRequest()) is None


ID = "3f8c2d1e-7a46-4b0f-9d52-6c1e8a90b7f4"


@pytest.mark.parametrize("request_id", ["1", "{" + ID + "}", ID.replace("-", ""), f"urn:uuid:{ID}", f"{ID}\n"])
def test_a_request_id_is_a_uuid_in_its_usual_form(request_id: str) -> None:
    with pytest.raises(ServiceError) as caught:
        convert.request_key_of("/m", pb.DeleteSegmentRequest(slug="a", request_id=request_id))
    assert caught.value.reason is Reason.FIELD_INVALID


@pytest.mark.parametrize(
    ("segment", "paths", "fields"),
    [
        ({}, [], set()),
        ({"display_name": "x", "etag": "y", "slug": "z"}, [], {EditedField.DISPLAY_NAME}),
        ({"labels": {"a": "b"}}, [], {EditedField.LABELS}),
        ({}, ["*"], set(EditedField)),
        ({}, ["labels", "description", "labels"], {EditedField.LABELS, EditedField.DESCRIPTION}),
    ],
)
def test_masks(segment: dict[str, Any], paths: list[str], fields: set[EditedField]) -> None:
    assert convert.edited_fields_of(pb.Segment(**segment), FieldMask(paths=paths)) == fields


@pytest.mark.parametrize(
    ("text", "expected"),
    [
        ("", OperationFilter()),
        ("slug = checkout AND state = PREPARING", OperationFilter("checkout", None, OperationState.PREPARING)),
        ('kind="ROLL_OUT"', OperationFilter(kind=OperationKind.ROLL_OUT)),
        (
            "state=DONE  AND  kind=DELETE AND slug=and",
            OperationFilter("and", OperationKind.DELETE, OperationState.DONE),
        ),
    ],
)
def test_filters(text: str, expected: OperationFilter) -> None:
    assert convert.filter_of(text) == expected


@given(st.text())
def test_any_text_as_a_filter_is_read_or_refused(text: str) -> None:
    assert reason_of(lambda: convert.filter_of(text)) in (None, Reason.FIELD_INVALID)


@given(st.text() | st.text("operations/0123456789abcdef-", max_size=60))
def test_any_text_as_a_name_is_read_or_refused(text: str) -> None:
    assert reason_of(lambda: convert.operation_id_of(text)) in (None, Reason.FIELD_INVALID, Reason.FIELD_REQUIRED)


@given(st.integers(0, 100_000))
def test_every_percentage_survives_the_way(threshold: int) -> None:
    request = pb.RollOutSegmentRequest(rule={"percent": threshold / 1000})
    rule = convert.rule_of(request)
    assert rule.threshold == threshold
    assert convert.rule_message(rule).percent == request.rule.percent


def test_attributes_are_what_they_were_but_for_large_integers() -> None:
    attributes = {"t": True, "f": False, "i": 1, "big": 2**53 + 1, "min": -(2**63), "d": 0.1, "s": "1", "l": ["a"]}
    message = convert.user_message(User(7, attributes, 3, NOW, NOW, 1))
    found = json_format.MessageToDict(message.attributes)
    assert found == {**attributes, "big": 2.0**53, "min": -(2.0**63)}
    assert found["t"] is True
    assert found["f"] is False
    assert message.create_time.ToMicroseconds() == int(NOW.timestamp()) * 1_000_000 + 678901
