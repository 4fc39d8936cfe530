"""Server streams of the native front: exports and watches, served as grpcio serves them, with three differences.

If grpcio behind the front served them, a stream whose reader stalls would go on until megabytes are buffered between
the two; here a message is built only when the client has room for it. grpcio would see all clients as one, the socket;
here each client has its address. And a reader that takes nothing for long loses its place.

The methods are the servicers' own, inside the same interceptors as all other methods.
"""

from __future__ import annotations

import asyncio
import functools
import time
from collections.abc import Iterable, Sequence
from contextlib import aclosing
from dataclasses import dataclass
from typing import Any, Final

import grpc
from grpc import aio
from pygrpc_native import STREAM_FULL, STREAM_SENT, NativeGrpcFront

from grpc_api.errors import status_of, trailing_metadata
from segsvc.domain.errors import Reason, ServiceError, internal_error
from segsvc.log import get_logger

FULL_PAUSE_S: Final = 0.002
FULL_PAUSE_MAX_S: Final = 0.1
"""Pauses between attempts to send to a client without room, growing: the front cannot say when there is room."""
STALLED_S: Final = 60.0
"""A reader that takes nothing for this long is refused: another call needs its place."""

Metadata = Sequence[tuple[str, str | bytes]]
Handler = Any
"""A grpc.RpcMethodHandler of a method that streams its answer."""

_log = get_logger(__name__)


@dataclass(frozen=True, slots=True)
class _CallDetails(grpc.HandlerCallDetails):
    method: str
    invocation_metadata: Any = ()


class StreamContext:
    """The part of ``aio.ServicerContext`` that interceptors and servicers use."""

    def __init__(self, front: NativeGrpcFront, call_id: int, metadata: Metadata, peer: str, left_s: float | None):
        self._front = front
        self._call_id = call_id
        self._metadata = metadata
        self._peer = peer
        self._deadline = None if left_s is None else time.monotonic() + left_s
        self._code: grpc.StatusCode | None = None

    def time_remaining(self) -> float | None:
        return None if self._deadline is None else max(0.0, self._deadline - time.monotonic())

    def invocation_metadata(self) -> Metadata:
        return self._metadata

    def peer(self) -> str:
        return self._peer

    def code(self) -> grpc.StatusCode | None:
        return self._code

    async def send_initial_metadata(self, metadata: Metadata) -> None:
        self._front.stream_send_initial_metadata(self._call_id, list(metadata))

    async def abort(self, code: grpc.StatusCode, details: str = "", trailing_metadata: Metadata = ()) -> None:
        """End the call with an error. Raises aio.AbortError, always."""
        self._code = code
        self._front.fail(self._call_id, code.value[0], details, list(trailing_metadata))
        raise aio.AbortError


async def with_interceptors(handler: Handler, method: str, interceptors: Iterable[aio.ServerInterceptor]) -> Handler:
    """A method's handler inside interceptors, the first one outermost, as in grpcio's server."""

    async def innermost(_: grpc.HandlerCallDetails) -> Handler:
        return handler

    continuation: Any = innermost
    for interceptor in reversed(list(interceptors)):
        continuation = functools.partial(interceptor.intercept_service, continuation)
    return await continuation(_CallDetails(method))


class NativeStreams:
    """Serves the calls of the native front's streams on the event loop.

    Args:
        handlers: of the methods in ``hot.calls.STREAMS``, from ``with_interceptors``.
    """

    def __init__(self, front: NativeGrpcFront, handlers: Sequence[Handler]) -> None:
        self._front = front
        self._handlers = handlers
        self._loop = asyncio.get_running_loop()
        self._tasks: dict[int, asyncio.Task[None]] = {}
        # The thread that brings the calls adds a call here before the call's task exists.
        self._open: set[int] = set()

    def begin(
        self, call_id: int, method: int, payload: bytes, metadata: Metadata, peer: str, left_s: float | None
    ) -> None:
        """Serve a call; from the thread that takes the front's events."""
        context = StreamContext(self._front, call_id, metadata, peer, left_s)
        self._open.add(call_id)
        self._loop.call_soon_threadsafe(self._start, call_id, method, payload, context)

    def end(self, call_id: int) -> None:
        """The client has gone, or its deadline has passed; from the thread that takes the front's events. Most of these
        calls are no streams; they are ignored."""
        if call_id in self._open:
            self._loop.call_soon_threadsafe(self._cancel, call_id)

    async def close(self, grace_s: float) -> None:
        """Let calls end by themselves for a time, then cancel them; their clients notice when the front closes."""
        tasks = list(self._tasks.values())
        if tasks:
            _, late = await asyncio.wait(tasks, timeout=grace_s)
            for task in late:
                task.cancel()

    def _start(self, call_id: int, method: int, payload: bytes, context: StreamContext) -> None:
        # The task has its own context: another call must not see what is bound for this one.
        self._tasks[call_id] = self._loop.create_task(self._serve(call_id, self._handlers[method], payload, context))

    def _cancel(self, call_id: int) -> None:
        task = self._tasks.get(call_id)
        if task is not None:
            task.cancel()

    async def _serve(self, call_id: int, handler: Handler, payload: bytes, context: StreamContext) -> None:
        try:
            async with aclosing(handler.unary_stream(payload, context)) as messages:
                async for message in messages:
                    if not await self._send(call_id, handler.response_serializer(message)):
                        return
            self._front.stream_end(call_id)
        except aio.AbortError:
            pass  # the client has the answer already
        except ServiceError as error:
            self._fail(call_id, error)
        except Exception:  # noqa: BLE001  # the interceptors map all errors but those of sending
            _log.exception("stream_failed")
            self._fail(call_id, internal_error())
        finally:
            del self._tasks[call_id]
            self._open.discard(call_id)

    def _fail(self, call_id: int, error: ServiceError) -> None:
        """End a call whose error came outside of the interceptors, while a message was sent."""
        status = status_of(error)
        _log.warning("stream_ended", reason=error.reason.text, message=error.message)
        self._front.fail(call_id, status.code, status.message, list(trailing_metadata(status)))

    async def _send(self, call_id: int, message: bytes) -> bool:
        """Send a message when the client has room for it. False: the client has gone.

        Raises:
            ServiceError: OVERLOADED: the client takes nothing.
        """
        pause_s = FULL_PAUSE_S
        give_up = time.monotonic() + STALLED_S
        while (sent := self._front.stream_try_send(call_id, message)) == STREAM_FULL:
            if time.monotonic() > give_up:
                raise ServiceError(
                    Reason.OVERLOADED, f"nothing of the stream was read for {STALLED_S:.0f} s", retry_after_s=1.0
                )
            await asyncio.sleep(pause_s)
            pause_s = min(2 * pause_s, FULL_PAUSE_MAX_S)
        return bool(sent == STREAM_SENT)
