"""GetUserSegments and BatchGetUserSegments as bytes: answers are joined from encoded parts, without message objects.

The field numbers are those of ``segmentation/v1/membership.proto``; a test holds every answer against the generated
classes.
"""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from typing import Final

from google.protobuf.message import DecodeError
from google.rpc.status_pb2 import Status
from segmentation.v1 import membership_pb2 as pb

from segsvc.domain import sharding
from segsvc.domain.errors import Reason, ServiceError, invalid_field, required_field
from segsvc.domain.membership import FIRST_SEGMENT, READ_TIME, Entry

BATCH_USERS_MAX: Final = 1000
REQUEST_BYTES_MAX: Final = 64 * 1024
"""Larger requests are not decoded: a thousand users need 11 KB, and a hundred megabytes would keep the lane, and
everybody else's calls, for seconds."""

_TIMES_MAX: Final = 65_536


def varint(value: int) -> bytes:
    """A non-negative integer as protobuf writes it."""
    out = bytearray()
    while value > 0x7F:
        out.append(value & 0x7F | 0x80)
        value >>= 7
    out.append(value)
    return bytes(out)


def _field(number: int, content: bytes) -> bytes:
    """A field of bytes, text or message."""
    return bytes((number << 3 | 2,)) + varint(len(content)) + content


def encode_slug(slug: str) -> bytes:
    """``UserSegments.slugs``, one of them."""
    return _field(2, slug.encode())


class _Times(dict[int, bytes]):
    """Microseconds since 1970 -> ``UserSegments.read_time``. Users loaded together share theirs, so most are known."""

    def __missing__(self, time_us: int) -> bytes:
        if len(self) >= _TIMES_MAX:
            self.clear()
        seconds, microseconds = divmod(time_us, 1_000_000)
        nanos = b"\x10" + varint(microseconds * 1000) if microseconds else b""
        encoded = self[time_us] = _field(3, b"\x08" + varint(seconds) + nanos)
        return encoded


_times: Final = _Times()


def user_id_of(payload: bytes) -> int:
    """The user of a GetUserSegmentsRequest. Raises ServiceError FIELD_REQUIRED, FIELD_INVALID, INTERNAL."""
    if len(payload) > REQUEST_BYTES_MAX:
        raise _too_large(payload, "user_id", Reason.FIELD_INVALID)
    try:
        user_id: int = pb.GetUserSegmentsRequest.FromString(payload).user_id
    except DecodeError:
        raise _not_a_message() from None
    if user_id <= 0:
        check_user_id(user_id)
    return user_id


def check_user_id(user_id: int, field: str = "user_id") -> None:
    """Raises ServiceError FIELD_REQUIRED (0, which protobuf cannot tell from absent) or FIELD_INVALID."""
    if not user_id:
        raise required_field(field)
    sharding.check_user_id(user_id, field)


def _too_large(payload: bytes, field: str, reason: Reason) -> ServiceError:
    return invalid_field(field, f"the request must be at most {REQUEST_BYTES_MAX} bytes, is {len(payload)}", reason)


def _not_a_message() -> ServiceError:
    """As the other methods answer it, and as grpcio does itself."""
    return ServiceError(Reason.INTERNAL, "the request is not a valid message")


def user_ids_of(payload: bytes) -> Sequence[int]:
    """The users of a BatchGetUserSegmentsRequest; each is still to be checked.

    Raises:
        ServiceError: FIELD_REQUIRED (none), BATCH_TOO_LARGE, INTERNAL.
    """
    if len(payload) > REQUEST_BYTES_MAX:
        raise _too_large(payload, "user_ids", Reason.BATCH_TOO_LARGE)
    try:
        user_ids = pb.BatchGetUserSegmentsRequest.FromString(payload).user_ids
    except DecodeError:
        raise _not_a_message() from None
    if not user_ids:
        raise required_field("user_ids")
    if len(user_ids) > BATCH_USERS_MAX:
        raise invalid_field(
            "user_ids", f"at most {BATCH_USERS_MAX} in one call, are {len(user_ids)}", Reason.BATCH_TOO_LARGE
        )
    return list(user_ids)


def encode_user_id(user_id: int, request: bytes = b"") -> bytes:
    """``UserSegments.user_id``.

    Args:
        request: the GetUserSegmentsRequest that asked, whose only field is the same: as a rule, it can be copied.
    """
    # Tag and shortest form of the number leave no other way to write it in so many bytes.
    if len(request) == 1 + (user_id.bit_length() + 6) // 7:
        return request
    return b"\x08" + varint(user_id)


def encode_user_segments(encoded_user_id: bytes, entry: Entry, encoded_slugs: Mapping[int, bytes]) -> bytes:
    """A UserSegments. Raises KeyError if the slug of one of the segments is not known yet."""
    slugs = [encoded_slugs[segment_id] for segment_id in entry[FIRST_SEGMENT:]]
    return b"".join((encoded_user_id, *slugs, _times[entry[READ_TIME]]))


def encode_result(user_segments: bytes) -> bytes:
    """A BatchGetUserSegmentsResponse.results with an answer."""
    return _field(1, _field(1, user_segments))


def encode_error_result(status: Status) -> bytes:
    """A BatchGetUserSegmentsResponse.results with an error."""
    return _field(1, _field(2, status.SerializeToString()))
