"""GetUserSegments and BatchGetUserSegments as bytes: answers are joined from encoded parts, without message objects.

The field numbers are those of ``segmentation/v1/membership.proto``; a test compares every answer with the generated
classes.
"""

from __future__ import annotations

from collections.abc import Iterable, Mapping, Sequence
from typing import Final

from google.protobuf.message import DecodeError
from google.rpc.status_pb2 import Status
from segmentation.v1 import membership_pb2 as pb

from segsvc.domain import sharding
from segsvc.domain.errors import Reason, ServiceError, invalid_field, required_field
from segsvc.domain.membership import FIRST_SEGMENT, READ_TIME, Entry

BATCH_USERS_MAX: Final = 1000
REQUEST_BYTES_MAX: Final = 64 * 1024
"""Larger requests are not decoded: a thousand users need 11 KB, and a hundred megabytes would hold up the lane, and all
other calls, for seconds."""

_TIMES_MAX: Final = 65_536
_LENGTHS_MAX: Final = 65_536


# Two groups of seven bits as varint bytes: the last groups of a number, and groups that more groups follow.
_LAST: Final = [bytes((n,)) if n < 0x80 else bytes((n & 0x7F | 0x80, n >> 7)) for n in range(1 << 14)]
_FOLLOWED: Final = [bytes((n & 0x7F | 0x80, n >> 7 | 0x80)) for n in range(1 << 14)]
# The same for single groups: these tables are small enough to stay in a core's cache.
_LAST_SEVEN: Final = [bytes((n,)) for n in range(1 << 7)]
_SEVEN: Final = [bytes((n | 0x80,)) for n in range(1 << 7)]
_ID_SEVEN: Final = [b"\x08" + group for group in _SEVEN]


def varint(value: int) -> bytes:
    """A non-negative integer as protobuf writes it."""
    encoded = b""
    while value >= 1 << 14:
        encoded += _FOLLOWED[value & 0x3FFF]
        value >>= 14
    return encoded + _LAST[value]


def _field(number: int, content: bytes) -> bytes:
    """A field of bytes, text or message."""
    return bytes((number << 3 | 2,)) + varint(len(content)) + content


def encode_slug(slug: str) -> bytes:
    """One of ``UserSegments.slugs``."""
    return _field(2, slug.encode())


class _Times(dict[int, bytes]):
    """Microseconds since 1970 -> ``UserSegments.read_time``. Users loaded together share one, so most are known."""

    def __missing__(self, time_us: int) -> bytes:
        if len(self) >= _TIMES_MAX:
            self.clear()
        seconds, microseconds = divmod(time_us, 1_000_000)
        nanos = b"\x10" + varint(microseconds * 1000) if microseconds else b""
        encoded = self[time_us] = _field(3, b"\x08" + varint(seconds) + nanos)
        return encoded


_times: Final = _Times()


class _ResultHeads(dict[int, bytes]):
    """Length of a UserSegments -> the bytes before it in ``BatchGetUserSegmentsResponse.results``."""

    def __missing__(self, length: int) -> bytes:
        if len(self) >= _LENGTHS_MAX:
            self.clear()
        inner = b"\x0a" + varint(length)
        head = self[length] = b"\x0a" + varint(len(inner) + length) + inner
        return head


_result_heads: Final = _ResultHeads()


def user_id_of(payload: bytes) -> int:
    """The user of a GetUserSegmentsRequest. Raises ServiceError FIELD_REQUIRED, FIELD_INVALID, INTERNAL."""
    if len(payload) > REQUEST_BYTES_MAX:
        raise _too_large(payload, "user_id", Reason.FIELD_INVALID)
    try:
        user_id: int = pb.GetUserSegmentsRequest.FromString(payload).user_id
    except DecodeError:
        raise _not_a_message() from None
    if user_id <= 0:
        require_user_id(user_id)
    return user_id


def plain_user_ids(payloads: list[bytes]) -> list[int] | None:
    """The users of many GetUserSegmentsRequests, if each request is encoded exactly as protobuf itself encodes it. It
    then equals the ``encode_user_id`` of its answer. None: at least one request is encoded differently; ``user_id_of``
    reads each of them, or says what is wrong with it.

    Such requests, joined, are a BatchGetUserSegmentsRequest in the encoding that is not packed. Other bytes could be
    read as the same message, so the users are encoded again and compared with the requests, call by call.
    """
    joined = b"".join(payloads)
    if len(joined) > REQUEST_BYTES_MAX:
        return None
    try:
        user_ids = list(pb.BatchGetUserSegmentsRequest.FromString(joined).user_ids)
    except DecodeError:
        return None
    if len(user_ids) != len(payloads) or min(user_ids, default=0) <= 0:
        return None
    return user_ids if encode_user_ids(user_ids) == payloads else None


def require_user_id(user_id: int, field: str = "user_id") -> None:
    """Raises ServiceError FIELD_REQUIRED (0, which protobuf cannot tell from absent) or FIELD_INVALID."""
    if not user_id:
        raise required_field(field)
    sharding.check_user_id(user_id, field)


def _too_large(payload: bytes, field: str, reason: Reason) -> ServiceError:
    return invalid_field(field, f"the request must be at most {REQUEST_BYTES_MAX} bytes, is {len(payload)}", reason)


def _not_a_message() -> ServiceError:
    """The error that the other methods answer, as grpcio itself does."""
    return ServiceError(Reason.INTERNAL, "the request is not a valid message")


def user_ids_of(payload: bytes) -> Sequence[int]:
    """The users of a BatchGetUserSegmentsRequest; the caller must still check each of them.

    Raises:
        ServiceError: FIELD_REQUIRED (there are none), BATCH_TOO_LARGE, INTERNAL.
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


def encode_user_id(user_id: int) -> bytes:
    """``UserSegments.user_id``. Usually also the bytes of a GetUserSegmentsRequest, whose only field is the same."""
    return b"\x08" + varint(user_id)


def encode_user_ids(user_ids: Iterable[int]) -> list[bytes]:
    """``encode_user_id`` of each user, in half the time."""
    first, middle, last = _ID_SEVEN, _SEVEN, _LAST_SEVEN
    return [
        first[user_id & 0x7F] + middle[user_id >> 7 & 0x7F] + last[user_id >> 14]
        if 1 << 14 <= user_id < 1 << 21
        else first[user_id & 0x7F] + middle[user_id >> 7 & 0x7F] + middle[user_id >> 14 & 0x7F] + last[user_id >> 21]
        if 1 << 21 <= user_id < 1 << 28
        else encode_user_id(user_id)
        for user_id in user_ids
    ]


def encode_user_segments(encoded_user_id: bytes, entry: Entry, encoded_slugs: Mapping[int, bytes]) -> bytes:
    """A UserSegments. Raises KeyError if a segment's slug is not known yet."""
    slugs = map(encoded_slugs.__getitem__, entry[FIRST_SEGMENT:])
    return b"".join((encoded_user_id, *slugs, _times[entry[READ_TIME]]))


def encode_all(
    encoded_user_ids: Iterable[bytes], entries: Iterable[Entry | None], encoded_slugs: Mapping[int, bytes]
) -> list[bytes | None]:
    """``encode_user_segments`` for each user, without a function call for each. None: there is no entry, or one of its
    slugs is not known yet."""
    slug_of, times, join = encoded_slugs.__getitem__, _times, b"".join
    answers: list[bytes | None] = []
    for encoded_user_id, entry in zip(encoded_user_ids, entries, strict=True):
        if entry is not None:
            try:
                answers.append(join((encoded_user_id, *map(slug_of, entry[FIRST_SEGMENT:]), times[entry[READ_TIME]])))
            except KeyError:
                pass  # the segment was created after the map was filled
            else:
                continue
        answers.append(None)
    return answers


def encode_result(user_segments: bytes) -> bytes:
    """One of BatchGetUserSegmentsResponse.results, with an answer."""
    return _result_heads[len(user_segments)] + user_segments


def encode_results(
    user_ids: Sequence[int], entries: Iterable[Entry | None], encoded_slugs: Mapping[int, bytes]
) -> list[bytes | None]:
    """BatchGetUserSegmentsResponse.results of many users; None means the same as in ``encode_all``."""
    heads = _result_heads
    answers = encode_all(encode_user_ids(user_ids), entries, encoded_slugs)
    return [None if answer is None else heads[len(answer)] + answer for answer in answers]


def encode_error_result(status: Status) -> bytes:
    """One of BatchGetUserSegmentsResponse.results, with an error."""
    return _field(1, _field(2, status.SerializeToString()))
