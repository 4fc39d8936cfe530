"""What a client sees of a refused call."""

from __future__ import annotations

import re
from collections.abc import Callable, Mapping
from dataclasses import dataclass
from typing import Any, TypeVar

import grpc
from google.rpc import error_details_pb2
from google.rpc.status_pb2 import Status
from grpc_status import rpc_status

T = TypeVar("T")

ATTEMPTS = 10
"""A busy machine delays some answers beyond a short deadline; a fault of the front delays all of them."""

_INTERNALS = re.compile(
    r"psycopg|sqlalchemy|SELECT |relation |Traceback|Exception|/tmp|\.py|host=|socket", re.IGNORECASE
)


@dataclass(frozen=True)
class Refusal:
    """A status with its details.

    Attributes:
        violations: descriptions by field.
        retry_after_s: None: no RetryInfo.
    """

    code: grpc.StatusCode
    reason: str
    message: str
    metadata: Mapping[str, str]
    violations: Mapping[str, str]
    retry_after_s: float | None
    request_id: str


def refused(call: Callable[[], Any]) -> Refusal:
    """Make a call that must be refused, and read the refusal. It must have details, and must not show internals."""
    try:
        result = call()
    except grpc.RpcError as error:
        return refusal_of(error)
    raise AssertionError(f"the call was not refused: {result}")


def refused_in_time(call: Callable[[], Any]) -> Refusal:
    """``refused`` for a call with a short deadline: if the client gave up before the answer came, call again."""
    for _ in range(ATTEMPTS):
        try:
            result = call()
        except grpc.RpcError as error:
            if not gave_up(error):
                return refusal_of(error)
        else:
            raise AssertionError(f"the call was not refused: {result}")
    raise AssertionError(f"the client gave up first, {ATTEMPTS} times")


def answered_in_time(call: Callable[[], T]) -> T:
    """The answer to a call with a short deadline: if the client gave up before the answer came, call again."""
    for _ in range(ATTEMPTS):
        try:
            return call()
        except grpc.RpcError as error:
            if not gave_up(error):
                raise
    raise AssertionError(f"the client gave up first, {ATTEMPTS} times")


def gave_up(error: Any) -> bool:
    """Whether the call's deadline has passed at the client, or in the front's own transport: without a reason."""
    return error.code() is grpc.StatusCode.DEADLINE_EXCEEDED and rpc_status.from_call(error) is None


def refusal_of(error: Any) -> Refusal:
    status = rpc_status.from_call(error)
    assert status is not None, f"{error.code()} {error.details()}: has no details"
    assert not _INTERNALS.search(str(status)), f"shows internals: {status}"
    trailing = dict(error.trailing_metadata())
    return _read(status, error.code(), trailing["x-request-id"])


def read_status(status: Status) -> Refusal:
    """A status inside a response."""
    code = next(code for code in grpc.StatusCode if code.value[0] == status.code)
    return _read(status, code, "")


def _read(status: Status, code: grpc.StatusCode, request_id: str) -> Refusal:
    info = error_details_pb2.ErrorInfo()
    bad_request = error_details_pb2.BadRequest()
    retry = error_details_pb2.RetryInfo()
    for detail in status.details:
        assert detail.Unpack(info) or detail.Unpack(bad_request) or detail.Unpack(retry), detail

    assert info.domain == "segsvc"
    has_retry = any(detail.Is(retry.DESCRIPTOR) for detail in status.details)
    return Refusal(
        code,
        info.reason,
        status.message,
        dict(info.metadata),
        {violation.field: violation.description for violation in bad_request.field_violations},
        retry.retry_delay.ToTimedelta().total_seconds() if has_retry else None,
        request_id,
    )
