"""The service's errors as gRPC statuses. Only this module maps a category to a code.

A status carries ``google.rpc.ErrorInfo`` (domain ``segsvc``, the stable reason, metadata), ``BadRequest`` for invalid
fields, and ``RetryInfo`` where a retry makes sense. Both fronts answer with the same status: grpcio by
``abort(code, message, trailing_metadata(status))``, the hot lane by
``fail(call_id, status.code, status.message, trailing_metadata(status))``.
"""

from __future__ import annotations

from typing import Final

from google.protobuf.any_pb2 import Any as AnyMessage
from google.protobuf.duration_pb2 import Duration
from google.protobuf.message import Message
from google.rpc import code_pb2
from google.rpc.error_details_pb2 import BadRequest, ErrorInfo, RetryInfo
from google.rpc.status_pb2 import Status

from segsvc.domain.errors import Category, LockTimeout, Reason, ServiceError, internal_error
from segsvc.log import get_logger

DOMAIN: Final = "segsvc"
"""``ErrorInfo.domain`` of every error."""

DETAILS_KEY: Final = "grpc-status-details-bin"
"""Trailing metadata that holds the serialised Status, by gRPC's convention."""

TEXT_BYTES_MAX: Final = 1024
NAME_BYTES_MAX: Final = 256
DETAILS_BYTES_MAX: Final = 3584
"""Longest message or description; longest name of a field or value in the metadata; size beyond which no further field
violation is added. HTTP headers carry the status twice, as percent-encoded text and as base64, and clients refuse more
than 8 KiB of headers: the call would fail with an unrelated error."""

_CODES: Final[dict[Category, int]] = {
    Category.UNAUTHENTICATED: code_pb2.UNAUTHENTICATED,
    Category.PERMISSION_DENIED: code_pb2.PERMISSION_DENIED,
    Category.INVALID_ARGUMENT: code_pb2.INVALID_ARGUMENT,
    Category.NOT_FOUND: code_pb2.NOT_FOUND,
    Category.ALREADY_EXISTS: code_pb2.ALREADY_EXISTS,
    Category.ABORTED: code_pb2.ABORTED,
    Category.FAILED_PRECONDITION: code_pb2.FAILED_PRECONDITION,
    Category.RESOURCE_EXHAUSTED: code_pb2.RESOURCE_EXHAUSTED,
    Category.UNAVAILABLE: code_pb2.UNAVAILABLE,
    Category.UNIMPLEMENTED: code_pb2.UNIMPLEMENTED,
    Category.INTERNAL: code_pb2.INTERNAL,
    Category.DEADLINE_EXCEEDED: code_pb2.DEADLINE_EXCEEDED,
}
"""A category is named after its code; the table is written out so that a typing mistake is an error at import."""

_log = get_logger(__name__)


def status_of(error: ServiceError) -> Status:
    """The status that a client gets for a refusal.

    Texts that are too long are shortened. Violations that do not fit are left out, but never the first one.
    """
    status = Status(code=_CODES[error.reason.category], message=_shortened(error.message, TEXT_BYTES_MAX))
    info = ErrorInfo(domain=DOMAIN, reason=error.reason.text)
    for key, value in error.metadata.items():
        info.metadata[key] = _shortened(value, NAME_BYTES_MAX)
    _add(status, info)

    bad_request = BadRequest()
    for item in error.violations:
        violation = BadRequest.FieldViolation(
            field=_shortened(item.field, NAME_BYTES_MAX), description=_shortened(item.description, TEXT_BYTES_MAX)
        )
        size = status.ByteSize() + bad_request.ByteSize() + violation.ByteSize()
        if bad_request.field_violations and size > DETAILS_BYTES_MAX:
            break
        bad_request.field_violations.append(violation)
    if bad_request.field_violations:
        _add(status, bad_request)

    if error.retry_after_s is not None:
        delay = Duration()
        delay.FromNanoseconds(round(error.retry_after_s * 1e9))
        _add(status, RetryInfo(retry_delay=delay))
    return status


def status_of_exception(error: BaseException, method: str) -> Status:
    """The status for an exception that a handler raised.

    A ServiceError has its own status. A lock that was not acquired in time means "try again". Any other exception is a
    fault of this service: it is logged with its traceback and answered with a fixed INTERNAL, because the text of an
    exception may contain SQL, hosts or data.

    Args:
        method: full name of the method (``/package.Service/Method``), for the log.
    """
    if isinstance(error, ServiceError):
        return status_of(error)
    if isinstance(error, LockTimeout):
        return status_of(
            ServiceError(Reason.OVERLOADED, "another change took too long; nothing was done", retry_after_s=0.5)
        )
    _log.error("call_failed", method=method, exc_info=error)
    return status_of(internal_error())


def trailing_metadata(status: Status) -> tuple[tuple[str, bytes], ...]:
    """A call's trailing metadata, which comes beside code and message."""
    return ((DETAILS_KEY, status.SerializeToString()),)


def _add(status: Status, detail: Message) -> None:
    packed = AnyMessage()
    packed.Pack(detail)
    status.details.append(packed)


def _shortened(text: str, bytes_max: int) -> str:
    encoded = text.encode("utf-8", errors="replace")
    if len(encoded) <= bytes_max:
        return encoded.decode("utf-8")
    return encoded[: bytes_max - 3].decode("utf-8", errors="ignore") + "…"
