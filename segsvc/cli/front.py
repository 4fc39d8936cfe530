"""A client of the running front, through its public interface."""

from __future__ import annotations

from collections.abc import Iterator
from contextlib import contextmanager
from typing import Any, Final

import grpc
from google.longrunning import operations_pb2_grpc as longrunning_grpc
from google.protobuf.json_format import MessageToDict
from google.protobuf.message import Message
from google.rpc import code_pb2, error_details_pb2
from google.rpc.status_pb2 import Status
from grpc_health.v1 import health_pb2, health_pb2_grpc
from grpc_status import rpc_status
from segmentation.v1 import membership_pb2_grpc, operations_pb2_grpc, segments_pb2_grpc

from grpc_api.token_sender import with_token
from segsvc.access.own_token import TokenError, own_token
from segsvc.cli.base import Refusal, complain
from segsvc.cli.front_tls import reachable, tls_files, uses_tls, why_no_answer
from segsvc.config import Settings

ANSWER_BYTES_MAX: Final = 64 << 20
"""A page of a thousand segments with long conditions is larger than a client accepts by default."""


_HINT: Final = "; SEGSVC_TOKEN or SEGSVC_TOKEN_FILE gives the command line its token"


class Front:
    """Stubs of all services on one channel.

    Args:
        timeout_s: deadline of a call that does not wait for an operation.
    """

    def __init__(self, channel: grpc.Channel, timeout_s: float) -> None:
        self.timeout_s = timeout_s
        self.segments = segments_pb2_grpc.SegmentServiceStub(channel)
        self.memberships = membership_pb2_grpc.MembershipServiceStub(channel)
        self.watching = operations_pb2_grpc.OperationServiceStub(channel)
        # The wheels of these two have no type annotations.
        self.operations: Any = longrunning_grpc.OperationsStub(channel)  # type: ignore[no-untyped-call]
        self.health: Any = health_pb2_grpc.HealthStub(channel)


@contextmanager
def connected(settings: Settings) -> Iterator[Front]:
    """Connect to the front of this installation while the block runs.

    Raises:
        Refusal: a call was refused or failed, or the front cannot be reached.
    """
    channel = _channel(settings)
    try:
        yield Front(channel, settings.client_timeout_s)
    except grpc.RpcError as error:
        raise Refusal(_failure_line(error, settings)) from None
    finally:
        channel.close()


@contextmanager
def unidentified(settings: Settings) -> Iterator[grpc.Channel]:
    """A channel to the front that sends no token, while the block runs. Raises Refusal as ``connected``."""
    with _bare_channel(settings) as channel:
        yield channel


def is_serving(settings: Settings) -> bool:
    """Whether the front says that it serves; for that nobody needs a token."""
    channel = _bare_channel(settings)
    try:
        answer = Front(channel, settings.client_timeout_s).health.Check(health_pb2.HealthCheckRequest(), timeout=2)
    except grpc.RpcError:
        return False
    finally:
        channel.close()
    return bool(answer.status == health_pb2.HealthCheckResponse.SERVING)


def _channel(settings: Settings) -> grpc.Channel:
    """Raises Refusal if a file of the client's TLS, or its token, cannot be used."""
    return with_token(_bare_channel(settings), _own_token(settings))


def _own_token(settings: Settings) -> str:
    try:
        return own_token(settings, lambda text: complain(text, "warning"))
    except TokenError as error:
        raise Refusal(str(error)) from None


def _bare_channel(settings: Settings) -> grpc.Channel:
    address = reachable(settings.grpc_address)
    options: list[tuple[str, Any]] = [
        ("grpc.max_receive_message_length", ANSWER_BYTES_MAX),
        # By default the library uses the proxy of `http_proxy`, for internal servers too, without a word.
        ("grpc.enable_http_proxy", int(settings.client_http_proxy)),
    ]
    if not uses_tls(settings):
        return grpc.insecure_channel(address, options)
    if settings.client_tls_name:
        options.append(("grpc.ssl_target_name_override", settings.client_tls_name))
    files = tls_files(settings)
    return grpc.secure_channel(address, grpc.ssl_channel_credentials(files.ca, files.key, files.cert), options)


def _failure_line(error: Any, settings: Settings) -> str:
    """Why a call failed. ``error``: what a stub raised, which is also a ``grpc.Call``, unlike its declared type."""
    status = rpc_status.from_call(error)
    if status is not None:
        return describe(status) + (_HINT if error.code() is grpc.StatusCode.UNAUTHENTICATED else "")
    code: grpc.StatusCode = error.code()
    if code in (grpc.StatusCode.UNAVAILABLE, grpc.StatusCode.DEADLINE_EXCEEDED):
        return f"{code.name}: {why_no_answer(settings, timed_out=code is grpc.StatusCode.DEADLINE_EXCEEDED)}"
    return f"{code.name}: {error.details()}"


def describe(status: Status) -> str:
    """A status as ``REASON: message``. For a refused field, the message already names the field."""
    info = error_details_pb2.ErrorInfo()
    for detail in status.details:
        if detail.Unpack(info):
            return f"{info.reason}: {status.message}"
    return f"{code_pb2.Code.Name(status.code)}: {status.message}"


def to_json(message: Message) -> dict[str, Any]:
    """A message as JSON with the names of the protos; unset fields have their default value.

    64-bit integers are strings, as in protobuf's own JSON: user ids go up to 2^63 - 1, and programs that read numbers
    as doubles (JavaScript, jq) are exact up to 2^53 only.
    """
    return MessageToDict(message, preserving_proto_field_name=True, always_print_fields_with_no_presence=True)
