"""A client's channel that sends a token with each call."""

from __future__ import annotations

from collections.abc import Callable, Iterator
from typing import Any, Final, NamedTuple

import grpc

AUTHORIZATION_KEY: Final = "authorization"
"""Metadata key of a token: ``Bearer <token>``."""


def with_token(channel: grpc.Channel, token: str) -> grpc.Channel:
    """The channel, whose calls send this token; as it is if the token is empty.

    gRPC's own call credentials do not send a token without TLS, which a front on this machine, or behind a proxy that
    ends TLS, does not have.
    """
    return grpc.intercept_channel(channel, _Sender(token)) if token else channel


class _Details(NamedTuple):
    """What gRPC asks an interceptor for. Its own class has no constructor."""

    method: str
    timeout: float | None
    metadata: Any
    credentials: Any
    wait_for_ready: bool | None
    compression: Any


class _Sender(
    grpc.UnaryUnaryClientInterceptor,
    grpc.UnaryStreamClientInterceptor,
    grpc.StreamUnaryClientInterceptor,
    grpc.StreamStreamClientInterceptor,
):
    def __init__(self, token: str) -> None:
        self._header = (AUTHORIZATION_KEY, f"Bearer {token}")

    def _with_header(self, details: Any) -> Any:
        return _Details(
            details.method,
            details.timeout,
            [*(details.metadata or ()), self._header],
            details.credentials,
            details.wait_for_ready,
            details.compression,
        )

    def intercept_unary_unary(
        self, continuation: Callable[[Any, Any], Any], client_call_details: Any, request: Any
    ) -> Any:
        """Add the token to a call."""
        return continuation(self._with_header(client_call_details), request)

    def intercept_unary_stream(
        self, continuation: Callable[[Any, Any], Any], client_call_details: Any, request: Any
    ) -> Any:
        """Add the token to a call."""
        return continuation(self._with_header(client_call_details), request)

    def intercept_stream_unary(
        self, continuation: Callable[[Any, Any], Any], client_call_details: Any, request_iterator: Iterator[Any]
    ) -> Any:
        """Add the token to a call."""
        return continuation(self._with_header(client_call_details), request_iterator)

    def intercept_stream_stream(
        self, continuation: Callable[[Any, Any], Any], client_call_details: Any, request_iterator: Iterator[Any]
    ) -> Any:
        """Add the token to a call."""
        return continuation(self._with_header(client_call_details), request_iterator)
