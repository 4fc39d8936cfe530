"""Interceptors around every call. Their order matters; ``interceptors()`` gives the reason for each."""

from __future__ import annotations

import asyncio
import inspect
import time
from abc import ABC, abstractmethod
from collections.abc import AsyncIterator, Awaitable, Callable, Collection
from contextlib import AbstractAsyncContextManager, aclosing, asynccontextmanager
from dataclasses import replace
from typing import Any, TypeAlias, TypeVar
from uuid import uuid4

import grpc
import structlog
from google.protobuf.message import DecodeError
from grpc import aio

from grpc_api import call_scope
from grpc_api.access import Gate
from grpc_api.call_scope import REQUEST_ID_CHARACTERS_MAX, REQUEST_ID_KEY
from grpc_api.errors import status_of_exception, trailing_metadata
from segsvc.domain.errors import Reason, ServiceError
from segsvc.log import get_logger
from segsvc.metrics import CODES, rpc_seconds, rpcs

UNKNOWN_METHOD = "unknown"
"""Label of calls to methods that do not exist."""

_CODES = {code.value[0]: code for code in grpc.StatusCode}

_log = get_logger(__name__)

_Q = TypeVar("_Q")
_R = TypeVar("_R")
# In quotes: generic in the stubs only, not when the program runs.
Handler: TypeAlias = "grpc.RpcMethodHandler[Any, Any]"
Context: TypeAlias = "aio.ServicerContext[Any, Any]"


def interceptors(methods: Collection[str], gate: Gate) -> list[aio.ServerInterceptor]:
    """All interceptors, outermost first.

    Args:
        methods: full names of the methods that exist. A client may send any other name, so those are no metric's label.
        gate: knows who may call what.
    """
    return [
        EnterCall(),  # first: request id and deadline exist before anything can be logged or can fail
        Observe(methods),  # outside the mapping of errors, so that it counts the code which the client gets
        MapErrors(),  # no exception of a servicer, nor a refusal of the next one, passes it unmapped
        Admit(gate),  # innermost: nothing of a request is read before its caller is known
    ]


async def _no_such_method(_: bytes, context: Context) -> bytes:
    raise ServiceError(Reason.NOT_IMPLEMENTED, "there is no such method", {"method": call_scope.current().method})


_NO_SUCH_METHOD: Handler = grpc.unary_unary_rpc_method_handler(_no_such_method)
"""Handles calls of methods that do not exist, so that their error has details like every other error."""


def _as_it_is(request: Any) -> Any:
    return request


class Around(aio.ServerInterceptor, ABC):
    """An interceptor that is an asynchronous context around the servicer's method, for unary calls and streams."""

    @abstractmethod
    def around(self, method: str, context: Context) -> AbstractAsyncContextManager[None]:
        """Entered before the method runs and left when it ends; it sees the method's exception."""

    def decode(self, handler: Handler) -> tuple[Callable[[bytes], Any] | None, Callable[[Any], Any]]:
        """The two steps from bytes to the request: the one that grpc takes, then the one taken inside the context."""
        return handler.request_deserializer, _as_it_is

    async def intercept_service(
        self,
        continuation: Callable[[grpc.HandlerCallDetails], Awaitable[grpc.RpcMethodHandler[_Q, _R] | None]],
        handler_call_details: grpc.HandlerCallDetails,
    ) -> Any:
        handler: Any = await continuation(handler_call_details) or _NO_SUCH_METHOD
        method = handler_call_details.method
        if handler.request_streaming:
            # gRPC decodes the messages: only reflection, which is off in production, reads a stream.
            streams = handler.stream_stream or handler.stream_unary
            make = (
                grpc.stream_stream_rpc_method_handler
                if handler.response_streaming
                else (grpc.stream_unary_rpc_method_handler)
            )
            around = self._generator if handler.response_streaming else self._unary
            return make(around(method, streams, _as_it_is), handler.request_deserializer, handler.response_serializer)

        outer, inner = self.decode(handler)
        if not handler.response_streaming:
            return grpc.unary_unary_rpc_method_handler(
                self._unary(method, handler.unary_unary, inner), outer, handler.response_serializer
            )

        wrap = self._generator if inspect.isasyncgenfunction(handler.unary_stream) else self._writer
        return grpc.unary_stream_rpc_method_handler(
            wrap(method, handler.unary_stream, inner), outer, handler.response_serializer
        )

    def _unary(self, method: str, behaviour: Any, decode: Callable[[Any], Any]) -> Any:
        async def call(request: Any, context: Context) -> Any:
            async with self.around(method, context):
                return await behaviour(decode(request), context)

        return call

    def _generator(self, method: str, behaviour: Any, decode: Callable[[Any], Any]) -> Any:
        async def call(request: Any, context: Context) -> AsyncIterator[Any]:
            async with self.around(method, context), aclosing(behaviour(decode(request), context)) as messages:
                async for message in messages:
                    yield message

        return call

    def _writer(self, method: str, behaviour: Any, decode: Callable[[Any], Any]) -> Any:
        """For streams that call ``context.write`` instead of yielding (the health service's Watch)."""

        async def call(request: Any, context: Context) -> None:
            async with self.around(method, context):
                await behaviour(decode(request), context)

        return call


class OneMessage(aio.ServerInterceptor):
    """Calls a method that takes one message with that message, or with None if the client sends none.

    grpcio itself would never answer a call without a message. So the request is read as a stream of messages, and the
    first one is used.
    """

    async def intercept_service(
        self,
        continuation: Callable[[grpc.HandlerCallDetails], Awaitable[grpc.RpcMethodHandler[_Q, _R] | None]],
        handler_call_details: grpc.HandlerCallDetails,
    ) -> Any:
        handler: Any = await continuation(handler_call_details)
        if handler is None or handler.request_streaming:
            return handler
        decode, encode = handler.request_deserializer, handler.response_serializer
        if not handler.response_streaming:
            return grpc.stream_unary_rpc_method_handler(_first_to(handler.unary_unary), decode, encode)
        stream = handler.unary_stream
        wrap = _first_to_generator if inspect.isasyncgenfunction(stream) else _first_to
        return grpc.stream_stream_rpc_method_handler(wrap(stream), decode, encode)


def _first_to(behaviour: Any) -> Any:
    async def call(requests: AsyncIterator[Any], context: Context) -> Any:
        return await behaviour(await anext(aiter(requests), None), context)

    return call


def _first_to_generator(behaviour: Any) -> Any:
    async def call(requests: AsyncIterator[Any], context: Context) -> AsyncIterator[Any]:
        async with aclosing(behaviour(await anext(aiter(requests), None), context)) as messages:
            async for message in messages:
                yield message

    return call


class EnterCall(Around):
    """Gives the call its request id (the client's, or a new one), sends it back, and notes the deadline."""

    @asynccontextmanager
    async def around(self, method: str, context: Context) -> AsyncIterator[None]:
        start = time.monotonic()
        remaining_s: float | None = context.time_remaining()
        request_id = _request_id(context)
        deadline = None if remaining_s is None else start + remaining_s
        call_scope.enter(call_scope.CallScope(method, request_id, start, deadline))
        # Bound for the life of the task, which serves this call alone.
        structlog.contextvars.bind_contextvars(request_id=request_id)
        try:
            await context.send_initial_metadata(((REQUEST_ID_KEY, request_id),))
            yield
        except aio.InternalError:
            # The client has gone, so gRPC cannot send; it has not cancelled the call's task for that yet.
            raise asyncio.CancelledError from None


class Observe(Around):
    """Counts and times calls, and logs those that failed."""

    def __init__(self, methods: Collection[str]) -> None:
        self._methods = frozenset(methods)
        for method in (*methods, UNKNOWN_METHOD):
            rpc_seconds.labels(method)
            for code in CODES:
                rpcs.labels(method, code)

    @asynccontextmanager
    async def around(self, method: str, context: Context) -> AsyncIterator[None]:
        call = call_scope.current()
        label = method if method in self._methods else UNKNOWN_METHOD
        code = grpc.StatusCode.OK

        try:
            yield
        except (asyncio.CancelledError, aio.InternalError, GeneratorExit):
            # The client has gone, or its deadline has passed. A stream gets GeneratorExit when its client has gone.
            remaining_s = call.remaining_s()
            expired = remaining_s is not None and remaining_s <= 0
            code = grpc.StatusCode.DEADLINE_EXCEEDED if expired else grpc.StatusCode.CANCELLED
            raise
        except aio.AbortError:
            code = _code(context)
            raise
        except BaseException:
            code = grpc.StatusCode.UNKNOWN  # what grpc makes of an exception; MapErrors lets none through
            raise
        finally:
            seconds = time.monotonic() - call.start
            rpcs.labels(label, code.name).inc()
            rpc_seconds.labels(label).observe(seconds)
            if code is not grpc.StatusCode.OK:
                _log.info("call_refused", method=method, code=code.name, seconds=round(seconds, 4))


class MapErrors(Around):
    """Turns every exception into a status with details, so that no text of a driver or of Python reaches a client."""

    @asynccontextmanager
    async def around(self, method: str, context: Context) -> AsyncIterator[None]:
        try:
            yield
        except aio.AbortError:
            raise
        except DecodeError:
            # gRPC's convention for bytes that are no message; the hot lane gives the same answer.
            await _abort(context, ServiceError(Reason.INTERNAL, "the request is not a valid message"), method)
        except Exception as error:  # noqa: BLE001  # whatever it is, it must be mapped
            await _abort(context, error, method)


class Admit(Around):
    """Lets in the calls whose callers may make them, and decodes the requests of these.

    They are decoded here and not by grpc, which would answer an invalid message with the decoder's exception, and would
    read what anybody sends.
    """

    def __init__(self, gate: Gate) -> None:
        self._gate = gate

    def decode(self, handler: Handler) -> tuple[Callable[[bytes], Any] | None, Callable[[Any], Any]]:
        deserialize = handler.request_deserializer

        def decoded(request: bytes | None) -> Any:
            if request is None:
                # The native front gives the same answer on the hot methods.
                raise ServiceError(Reason.INTERNAL, "the call came without a request message")
            return request if deserialize is None else deserialize(request)

        return None, decoded

    @asynccontextmanager
    async def around(self, method: str, context: Context) -> AsyncIterator[None]:
        # A stream of the native front has no certificates.
        certificate = getattr(context, "auth_context", None)
        principal = self._gate.admit(method, context.invocation_metadata() or (), certificate)
        if principal is not None:
            call_scope.enter(replace(call_scope.current(), actor=principal.name))
            # In each line of the log about this call.
            structlog.contextvars.bind_contextvars(actor=principal.name)
        yield


async def _abort(context: Context, error: Exception, method: str) -> None:
    status = status_of_exception(error, method)
    # The request id is also in here, as in the hot lane's errors, which have only trailing metadata.
    request_id = (REQUEST_ID_KEY, call_scope.current().request_id)
    metadata: tuple[tuple[str, str | bytes], ...] = (*trailing_metadata(status), request_id)
    await context.abort(_CODES[status.code], status.message, metadata)


def _code(context: Context) -> grpc.StatusCode:
    """The code of an aborted call; grpc keeps it as a number."""
    code: Any = context.code()
    return code if isinstance(code, grpc.StatusCode) else _CODES.get(code, grpc.StatusCode.UNKNOWN)


def _request_id(context: Context) -> str:
    """The client's request id if it is fit for logs, else a new one."""
    for key, value in context.invocation_metadata() or ():
        if key == REQUEST_ID_KEY and isinstance(value, str) and value.isprintable():
            return value if 0 < len(value) <= REQUEST_ID_CHARACTERS_MAX else str(uuid4())
    return str(uuid4())
