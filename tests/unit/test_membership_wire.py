"""Answers joined from bytes, compared with the generated classes."""

from __future__ import annotations

import pytest
from google.protobuf.internal.encoder import _VarintBytes  # type: ignore[attr-defined]
from hypothesis import given
from hypothesis import strategies as st
from segmentation.v1 import membership_pb2 as pb

from grpc_api.errors import status_of
from grpc_api.hot import wire
from segsvc.domain.errors import Reason, ServiceError, user_not_found
from segsvc.domain.membership import NEVER_US

ids = st.integers(1, 2**63 - 1)
times_us = st.integers(1_000_000, 4_000_000_000_000_000)
slug_lists = st.lists(st.text(min_size=1, max_size=300), max_size=30)


@given(ids, times_us, slug_lists)
def test_answer_is_the_message(user_id: int, time_us: int, slugs: list[str]) -> None:
    encoded = {number: wire.encode_slug(slug) for number, slug in enumerate(slugs)}
    entry = (NEVER_US, 1, time_us, 3, 5, *range(len(slugs)))
    message = pb.UserSegments(user_id=user_id, slugs=slugs)
    message.read_time.FromMicroseconds(time_us)
    expected = message.SerializeToString(deterministic=True)
    assert wire.encode_user_segments(wire.encode_user_id(user_id), entry, encoded) == expected


@given(st.lists(ids))
def test_plain_requests_are_read_together(user_ids: list[int]) -> None:
    payloads = [pb.GetUserSegmentsRequest(user_id=user_id).SerializeToString() for user_id in user_ids]
    assert wire.plain_user_ids(payloads) == (user_ids or None)
    assert wire.encode_user_ids(user_ids) == payloads


ODD_SPELLINGS = [
    b"\x08\x85\x00",
    b"\x08\x85\x80\x00",
    b"\x88\x00\x05",
    b"\x08\x05\x12\x00",
    b"\x12\x00\x08\x05",
    b"\x08\x07\x08\x05",
]


@pytest.mark.parametrize("request_bytes", ODD_SPELLINGS)
def test_odd_spelling_of_a_request_is_read_by_itself(request_bytes: bytes) -> None:
    assert wire.user_id_of(request_bytes) == 5
    assert wire.plain_user_ids([b"\x08\x09", request_bytes, b"\x08\x09"]) is None


@given(
    st.lists(
        st.one_of(
            st.sampled_from([*ODD_SPELLINGS, b"", b"\x08", b"\x08\x00", b"\x08\xff", b"\x0a\x02\x05\x06", b"\x0a\x00"]),
            st.binary(max_size=12),
            st.builds(lambda rest: b"\x08" + rest, st.binary(max_size=11)),
            st.builds(lambda groups: b"\x08" + bytes(n | 0x80 for n in groups), st.binary(max_size=10)),
        ),
        min_size=1,
        max_size=4,
    )
)
def test_no_request_changes_what_its_neighbours_say(payloads: list[bytes]) -> None:
    """For any bytes from a client: requests that are read together give the same ids as each request alone."""
    user_ids = wire.plain_user_ids(payloads)
    if user_ids is not None:
        assert user_ids == [wire.user_id_of(payload) for payload in payloads]


def test_many_bytes_are_not_read_together(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.delattr(wire, "pb")
    assert wire.plain_user_ids([b"\x08\x01" * 20_000] * 2) is None


def test_times_are_remembered_within_bounds() -> None:
    for time_us in range(70_000):
        wire.encode_user_segments(b"", (NEVER_US, 1, time_us, 3, 5), {})
    assert len(wire._times) <= 65_536


def test_unknown_segment_is_no_answer() -> None:
    with pytest.raises(KeyError):
        wire.encode_user_segments(b"", (NEVER_US, 1, 0, 3, 5, 77), {})


@given(ids, slug_lists)
def test_batch_is_the_message(user_id: int, slugs: list[str]) -> None:
    user = pb.UserSegments(user_id=user_id, slugs=slugs)
    status = status_of(user_not_found(user_id))
    expected = pb.BatchGetUserSegmentsResponse(
        results=[
            pb.BatchGetUserSegmentsResponse.Result(user_segments=user),
            pb.BatchGetUserSegmentsResponse.Result(error=status),
        ]
    )
    joined = wire.encode_result(user.SerializeToString()) + wire.encode_error_result(status)
    assert pb.BatchGetUserSegmentsResponse.FromString(joined) == expected


@pytest.mark.parametrize("user_id", [1, 127, 128, 2**35, 2**63 - 1])
def test_request_is_read(user_id: int) -> None:
    assert wire.user_id_of(pb.GetUserSegmentsRequest(user_id=user_id).SerializeToString()) == user_id


def test_fields_from_a_newer_contract_are_passed_over() -> None:
    payload = pb.GetUserSegmentsRequest(user_id=5).SerializeToString() + b"\x12\x03abc"
    assert wire.user_id_of(payload) == 5


@pytest.mark.parametrize(
    ("payload", "reason", "field"),
    [
        (b"", Reason.FIELD_REQUIRED, "user_id"),
        (pb.GetUserSegmentsRequest(user_id=0).SerializeToString(), Reason.FIELD_REQUIRED, "user_id"),
        (pb.GetUserSegmentsRequest(user_id=-1).SerializeToString(), Reason.FIELD_INVALID, "user_id"),
        (b"\x08", Reason.INTERNAL, None),
        (b"\xff\xff", Reason.INTERNAL, None),
        (b"\x08\x01" * 40_000, Reason.FIELD_INVALID, "user_id"),
    ],
)
def test_bad_request_is_refused(payload: bytes, reason: Reason, field: str | None) -> None:
    with pytest.raises(ServiceError) as refused:
        wire.user_id_of(payload)
    assert refused.value.reason is reason
    assert [violation.field for violation in refused.value.violations] == ([field] if field else [])


@pytest.mark.parametrize(("user_ids", "reason"), [([], Reason.FIELD_REQUIRED), ([1] * 1001, Reason.BATCH_TOO_LARGE)])
def test_batch_has_one_to_a_thousand_users(user_ids: list[int], reason: Reason) -> None:
    with pytest.raises(ServiceError) as refused:
        wire.user_ids_of(pb.BatchGetUserSegmentsRequest(user_ids=user_ids).SerializeToString())
    assert refused.value.reason is reason
    assert refused.value.violations[0].field == "user_ids"


def test_a_batch_of_many_bytes_is_refused_without_being_decoded(monkeypatch: pytest.MonkeyPatch) -> None:
    payload = pb.BatchGetUserSegmentsRequest(user_ids=[1] * 100_000).SerializeToString()
    monkeypatch.delattr(wire, "pb")
    with pytest.raises(ServiceError) as refused:
        wire.user_ids_of(payload)
    assert refused.value.reason is Reason.BATCH_TOO_LARGE
    assert refused.value.violations[0].field == "user_ids"


def test_batch_of_a_thousand_with_repetitions_is_read() -> None:
    user_ids = [7, *range(1, 1000)]
    assert wire.user_ids_of(pb.BatchGetUserSegmentsRequest(user_ids=user_ids).SerializeToString()) == user_ids


@given(st.lists(st.tuples(ids, times_us, slug_lists), max_size=5))
def test_many_results_are_those_one_by_one(users: list[tuple[int, int, list[str]]]) -> None:
    slugs = sorted({slug for _, _, names in users for slug in names})
    encoded = {n: wire.encode_slug(slug) for n, slug in enumerate(slugs)}
    entries = [(NEVER_US, 1, time_us, 3, 5, *map(slugs.index, names)) for _, time_us, names in users]
    user_ids = [user_id for user_id, _, _ in users]
    one_by_one = [
        wire.encode_result(wire.encode_user_segments(wire.encode_user_id(user_id), entry, encoded))
        for user_id, entry in zip(user_ids, entries, strict=True)
    ]
    assert wire.encode_results(user_ids, entries, encoded) == one_by_one


def test_results_without_an_entry_or_a_slug_are_left_open() -> None:
    known = (NEVER_US, 1, 0, 3, 5, 1)
    results = wire.encode_results([7, 8, 9], [None, known, (*known, 2)], {1: wire.encode_slug("a")})
    assert results[0] is None
    assert results[1] is not None
    assert results[2] is None


@given(st.integers(0, 2**64 - 1))
def test_varint_is_protobufs(value: int) -> None:
    assert wire.varint(value) == _VarintBytes(value)
