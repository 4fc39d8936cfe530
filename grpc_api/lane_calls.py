"""The two ways in which calls reach the hot lane; see ``lane``."""

from __future__ import annotations

import itertools
import queue
import secrets
import time
from collections.abc import Sequence
from concurrent.futures import Future
from typing import Final, Protocol

from pygrpc_native import EVENT_CALL, NativeGrpcFront

from grpc_api.call_scope import REQUEST_ID_CHARACTERS_MAX, REQUEST_ID_KEY
from grpc_api.errors import status_of, trailing_metadata
from segsvc.domain.errors import ServiceError

GET_USER_SEGMENTS: Final = "/segmentation.v1.MembershipService/GetUserSegments"
BATCH_GET_USER_SEGMENTS: Final = "/segmentation.v1.MembershipService/BatchGetUserSegments"
METHODS: Final = (GET_USER_SEGMENTS, BATCH_GET_USER_SEGMENTS)
"""The methods of the lane. Their order gives the native front's numbers."""
_BATCH: Final = METHODS.index(BATCH_GET_USER_SEGMENTS)


class Call(Protocol):
    """One call, to be answered or refused once; a second answer, or one to a call that is gone, is dropped."""

    @property
    def batch(self) -> bool:
        """Whether it is BatchGetUserSegments."""

    @property
    def payload(self) -> bytes:
        """The request, serialized."""

    @property
    def request_id(self) -> str: ...

    @property
    def deadline(self) -> float | None:
        """On ``time.monotonic()``'s clock; None: there is none."""

    def answer(self, payload: bytes) -> None:
        """From any thread."""

    def fail(self, error: ServiceError) -> None:
        """From any thread."""


class Calls(Protocol):
    """Where calls come from."""

    def take(self, calls_max: int, *, wait: bool) -> Sequence[Call] | None:
        """Take the calls that wait; if there are none, wait for some, or take none. None: there will be no more."""

    def close(self) -> None:
        """Let ``take`` give None, after the calls that have come."""


# -- NativeGrpcFront ------------------------------------------------------------------------------------------------


def native_front(target: str, *, reuse_port: bool) -> NativeGrpcFront:
    """A front that hands the lane's methods over, with what the lane needs to know of each call.

    The caller sets its fallback and starts it.

    Raises:
        OSError: the address cannot be listened on.
    """
    return NativeGrpcFront(
        target,
        [(method, False) for method in METHODS],
        client_key_metadata=REQUEST_ID_KEY,
        call_details=True,  # the deadlines
        metrics=True,
        reuse_port=reuse_port,
    )


class NativeCall:
    """A call of NativeGrpcFront. The front itself ends a call whose deadline passes or whose client cancels."""

    __slots__ = ("_front", "_id", "batch", "deadline", "payload", "request_id")

    def __init__(
        self, front: NativeGrpcFront, call_id: int, batch: bool, payload: bytes, request_id: str, deadline: float | None
    ) -> None:
        self._front = front
        self._id = call_id
        self.batch = batch
        self.payload = payload
        self.request_id = request_id
        self.deadline = deadline

    def answer(self, payload: bytes) -> None:
        self._front.respond(self._id, payload, ((REQUEST_ID_KEY, self.request_id),))

    def fail(self, error: ServiceError) -> None:
        status = status_of(error)
        # A call that fails has no message, and so only one set of metadata: the trailing one.
        metadata: list[tuple[str, str | bytes]] = [(REQUEST_ID_KEY, self.request_id), *trailing_metadata(status)]
        self._front.fail(self._id, status.code, status.message, metadata)


class NativeCalls:
    """Calls of a NativeGrpcFront that ``native_front`` made."""

    def __init__(self, front: NativeGrpcFront) -> None:
        self._front = front
        # Drawn here, not at import: processes forked later would share it.
        self._ids = secrets.token_hex(8)
        # Sixteen digits, for ever: written in half the time of a number padded with zeros.
        self._made = itertools.count(10**15)

    def take(self, calls_max: int, *, wait: bool) -> list[Call] | None:
        front, ids, made = self._front, self._ids, self._made
        events = front.recv_batch_details(calls_max, None if wait else 0)
        if events is None:
            return None
        now = time.monotonic()
        calls: list[Call] = []
        for kind, call_id, method, payload, key, details in events:
            # A call that is cancelled while its user is read is answered in vain: there is nothing to stop.
            if kind != EVENT_CALL or payload is None:
                continue
            # Text is the peer's address: the call came without an id.
            sent = _fit_request_id(key) if isinstance(key, bytes) else None
            remaining_s = details[2] if details else None
            calls.append(
                NativeCall(
                    front,
                    call_id,
                    method == _BATCH,
                    payload,
                    sent or f"{ids}{next(made)}",
                    None if remaining_s is None else now + remaining_s,
                )
            )
        return calls

    def close(self) -> None:
        self._front.close()


def _fit_request_id(key: bytes) -> str | None:
    """A client's request id if it is fit for logs."""
    if 0 < len(key) <= REQUEST_ID_CHARACTERS_MAX and key.isascii():
        text = key.decode("ascii")
        if text.isprintable():
            return text
    return None


# -- grpcio ---------------------------------------------------------------------------------------------------------


class QueuedCall:
    """A call of a grpcio servicer, which waits for ``future``."""

    __slots__ = ("_answered", "batch", "deadline", "future", "payload", "request_id")

    def __init__(self, *, batch: bool, payload: bytes, request_id: str, deadline: float | None) -> None:
        self.request_id = request_id
        self.batch = batch
        self.payload = payload
        self.deadline = deadline
        self.future: Future[bytes] = Future()
        self._answered = False

    def answer(self, payload: bytes) -> None:
        if self._first():
            self.future.set_result(payload)

    def fail(self, error: ServiceError) -> None:
        if self._first():
            self.future.set_exception(error)

    def _first(self) -> bool:
        """Whether the servicer still waits and has no answer yet."""
        if self._answered:
            return False
        self._answered = True
        return self.future.set_running_or_notify_cancel()


class QueuedCalls:
    """Calls that grpcio's servicers put in, from any thread."""

    def __init__(self) -> None:
        self._queue: queue.SimpleQueue[QueuedCall | None] = queue.SimpleQueue()

    def submit(self, method: str, payload: bytes, request_id: str, deadline: float | None) -> Future[bytes]:
        """The serialized answer of one of ``METHODS``; its exception is a ServiceError."""
        if method not in METHODS:
            raise ValueError(f"{method} is not a method of the hot lane")
        batch = method == BATCH_GET_USER_SEGMENTS
        call = QueuedCall(batch=batch, payload=payload, request_id=request_id, deadline=deadline)
        self._queue.put(call)
        return call.future

    def take(self, calls_max: int, *, wait: bool) -> list[Call] | None:
        calls: list[Call] = []
        while len(calls) < calls_max:
            try:
                call = self._queue.get(block=wait and not calls)
            except queue.Empty:
                break
            if call is None:
                self._queue.put(None)  # for the next time
                return calls or None
            calls.append(call)
        return calls

    def close(self) -> None:
        self._queue.put(None)
