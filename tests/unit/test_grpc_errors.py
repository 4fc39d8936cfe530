"""Errors as statuses: every reason, every detail, and nothing that a client must not see."""

from __future__ import annotations

import grpc
import pytest
from google.rpc.error_details_pb2 import BadRequest, ErrorInfo, RetryInfo

from grpc_api.errors import TEXT_BYTES_MAX, status_of, status_of_exception, trailing_metadata
from segsvc.domain.errors import FieldViolation, LockTimeout, Reason, ServiceError, invalid_field
from segsvc.domain.operation import Failure

CODES = {code.name: code.value[0] for code in grpc.StatusCode}


def info_of(status: object) -> ErrorInfo:
    info = ErrorInfo()
    assert status.details[0].Unpack(info)  # type: ignore[attr-defined]
    return info


@pytest.mark.parametrize("reason", Reason)
def test_every_reason_has_the_code_of_its_category(reason: Reason) -> None:
    status = status_of(ServiceError(reason, "what", {"key": "value"}))
    assert status.code == CODES[reason.category.value]
    assert status.message == "what"
    info = info_of(status)
    assert (info.domain, info.reason, dict(info.metadata)) == ("segsvc", reason.text, {"key": "value"})
    assert len(status.details) == 1


def test_wrong_fields_and_retries_are_details() -> None:
    error = ServiceError(Reason.FIELD_INVALID, "x", {}, (FieldViolation("a.b", "is bad"),), retry_after_s=1.25)
    _, second, third = status_of(error).details
    bad_request, retry = BadRequest(), RetryInfo()
    assert second.Unpack(bad_request)
    assert [(item.field, item.description) for item in bad_request.field_violations] == [("a.b", "is bad")]
    assert third.Unpack(retry)
    assert retry.retry_delay.ToMilliseconds() == 1250


def test_anything_else_is_internal_and_says_nothing() -> None:
    status = status_of_exception(RuntimeError("SELECT secret FROM host=db1"), "/a.B/C")
    assert status.code == CODES["INTERNAL"]
    assert "secret" not in str(status)
    assert info_of(status).reason == "INTERNAL"


def test_a_lock_timeout_means_try_again() -> None:
    status = status_of_exception(LockTimeout(), "/a.B/C")
    assert (status.code, info_of(status).reason) == (CODES["RESOURCE_EXHAUSTED"], "OVERLOADED")


@pytest.mark.parametrize("text", ["x" * 100_000, "界" * 100_000, "\ud800" * 100_000])
def test_headers_stay_small_whatever_the_text(text: str) -> None:
    violations = tuple(FieldViolation(text, text) for _ in range(100))
    status = status_of(ServiceError(Reason.FIELD_INVALID, text, {"field": text}, violations, retry_after_s=1.0))
    assert len(status.message.encode()) <= TEXT_BYTES_MAX
    assert status.message.endswith("…")
    ((key, value),) = trailing_metadata(status)
    assert key == "grpc-status-details-bin"
    assert 3 * len(status.message.encode()) + len(value) * 4 / 3 < 8192


def test_several_violations_fit() -> None:
    violations = tuple(FieldViolation(f"field{number}", "is required") for number in range(20))
    bad_request = BadRequest()
    assert status_of(ServiceError(Reason.FIELD_REQUIRED, "x", {}, violations)).details[1].Unpack(bad_request)
    assert [item.field for item in bad_request.field_violations] == [item.field for item in violations]


def test_an_aborted_operation_says_what_its_call_would_have_said() -> None:
    error = invalid_field("a", "b")
    assert status_of(Failure.of(error).to_error()).message == error.message
    failure = Failure("ETAG_MISMATCH", "stale", {"slug": "a"})
    status = status_of(failure.to_error())
    assert (status.code, info_of(status).reason, dict(info_of(status).metadata)) == (
        CODES["ABORTED"],
        "ETAG_MISMATCH",
        {"slug": "a"},
    )


def test_a_reason_of_a_newer_release_is_still_an_abort() -> None:
    status = status_of(Failure("NEW_REASON", "what").to_error())
    assert (status.code, info_of(status).reason) == (CODES["ABORTED"], "OPERATION_ABORTED")
    assert dict(info_of(status).metadata) == {"why": "NEW_REASON"}
