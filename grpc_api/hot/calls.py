"""The two ways in which calls reach the hot lane: from the native front, and from grpcio; see ``lane``."""

from __future__ import annotations

import itertools
import queue
import secrets
import time
from collections.abc import Sequence
from concurrent.futures import Future
from typing import Final, Protocol

from pygrpc_native import EVENT_CALL, NativeGrpcFront

from grpc_api import connections
from grpc_api.access import Gate
from grpc_api.call_scope import REQUEST_ID_CHARACTERS_MAX, REQUEST_ID_KEY
from grpc_api.errors import status_of, trailing_metadata
from grpc_api.token_sender import AUTHORIZATION_KEY
from segsvc.domain.errors import Reason, ServiceError
from segsvc.log import get_logger

log = get_logger(__name__)

GET_USER_SEGMENTS: Final = "/segmentation.v1.MembershipService/GetUserSegments"
BATCH_GET_USER_SEGMENTS: Final = "/segmentation.v1.MembershipService/BatchGetUserSegments"
METHODS: Final = (GET_USER_SEGMENTS, BATCH_GET_USER_SEGMENTS)
"""The methods of the lane. The native front numbers them in this order."""
_BATCH: Final = METHODS.index(BATCH_GET_USER_SEGMENTS)

EXPORT_SEGMENT_USERS: Final = "/segmentation.v1.SegmentService/ExportSegmentUsers"
WATCH_OPERATION: Final = "/segmentation.v1.OperationService/WatchOperation"
STREAMS: Final = (EXPORT_SEGMENT_USERS, WATCH_OPERATION)
"""Methods that the native front takes and the lane does not; numbered after METHODS."""

ENCODING_KEY: Final = "grpc-encoding"
CONTENT_TYPE_KEY: Final = "content-type"
_GRPC: Final = b"application/grpc"
MESSAGE_BYTES_MAX: Final = 4 << 20
"""Larger requests are refused (RESOURCE_EXHAUSTED, by gRPC itself); no request of this service is near it. A connection
that sends one to a hot method is cut: the native front has received it whole, and would receive the next one, too."""


PASSES_S: Final = 1.0
"""How long a token that was let in is let in again without being looked at; so a second longer than its file says."""
PASSES_MAX: Final = 1024
"""Most such tokens; with more callers, the rest of their tokens are looked at each time."""


class Call(Protocol):
    """One call. It is answered or refused once; a second answer, or an answer to a call that is gone, is dropped."""

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
        """By ``time.monotonic()``'s clock; None: the call has no deadline."""

    @property
    def gone(self) -> bool:
        """Whether its client has left or its deadline has passed: further work for it is wasted."""

    def watch(self) -> None:
        """Make ``gone`` become true when the client leaves. Batches, which may have to wait, are watched from the
        start."""

    def answer(self, payload: bytes) -> None:
        """Answer it; from any thread."""

    def fail(self, error: ServiceError) -> None:
        """Refuse it; from any thread."""


class Calls(Protocol):
    """A source of calls."""

    def take(self, calls_max: int, *, wait: bool) -> Sequence[Call] | None:
        """The calls that wait. If there are none, wait for some or return none. None: there will be no more."""

    def close(self) -> None:
        """Make ``take`` return None once it has returned the calls that have come."""


# -- NativeGrpcFront ------------------------------------------------------------------------------------------------


def native_front(target: str, *, reuse_port: bool, checked_header: str = ENCODING_KEY) -> NativeGrpcFront:
    """A front that passes calls of the lane's methods on, with all that the lane needs to know of a call.

    The caller sets the front's fallback, then starts the front.

    Args:
        checked_header: ENCODING_KEY or CONTENT_TYPE_KEY, the same as for ``NativeCalls``.

    Raises:
        OSError: it cannot listen on the address.
    """
    return NativeGrpcFront(
        target,
        [*((method, False) for method in METHODS), *((method, True) for method in STREAMS)],
        # gRPC hides its own headers from us; this is the one of them that it lets us see.
        client_key_metadata=checked_header,
        call_details=True,  # deadlines and metadata, which holds request ids
        delay_stream_headers=True,  # the headers carry the request id
        metrics=True,
        reuse_port=reuse_port,
    )


class NativeCall:
    """A call of NativeGrpcFront. The front itself ends a call whose deadline passes or whose client cancels.

    Args:
        watched: calls, by their number, that must learn of their end.
    """

    __slots__ = ("_front", "_id", "_watched", "batch", "deadline", "gone", "payload", "request_id")

    def __init__(
        self,
        front: NativeGrpcFront,
        call_id: int,
        batch: bool,
        payload: bytes,
        request_id: str,
        deadline: float | None,
        watched: dict[int, NativeCall],
    ) -> None:
        self._front = front
        self._id = call_id
        self._watched = watched
        self.gone = False
        self.batch = batch
        self.payload = payload
        self.request_id = request_id
        self.deadline = deadline

    def watch(self) -> None:
        self._watched[self._id] = self

    def answer(self, payload: bytes) -> None:
        self._watched.pop(self._id, None)
        self._front.respond(self._id, payload, ((REQUEST_ID_KEY, self.request_id),))

    def fail(self, error: ServiceError) -> None:
        self._watched.pop(self._id, None)
        status = status_of(error)
        # A call that fails sends no message, so it has only one set of metadata, the trailing one.
        metadata: list[tuple[str, str | bytes]] = [(REQUEST_ID_KEY, self.request_id), *trailing_metadata(status)]
        self._front.fail(self._id, status.code, status.message, metadata)


class Streams(Protocol):
    """Serves the calls of STREAMS. The thread that takes the calls calls both methods."""

    def begin(
        self,
        call_id: int,
        method: int,
        payload: bytes,
        metadata: Sequence[tuple[str, str | bytes]],
        peer: str,
        left_s: float | None,
    ) -> None:
        """Serve a call; ``method`` is an index into STREAMS."""

    def end(self, call_id: int) -> None:
        """A call was ended by its client or its deadline. Most of these calls are no streams."""


class NativeCalls:
    """Calls of a NativeGrpcFront from ``native_front``.

    Args:
        gate: lets the lane's calls in; the streams have their own check.
        streams: serves the calls of STREAMS; None: they are refused.
        checked_header: the one that ``front`` shows of each call: ENCODING_KEY, and compressed calls are refused, or
            CONTENT_TYPE_KEY, and calls of another type than gRPC's are.
    """

    def __init__(
        self, front: NativeGrpcFront, gate: Gate, streams: Streams | None = None, checked_header: str = ENCODING_KEY
    ) -> None:
        self._checks_type = checked_header == CONTENT_TYPE_KEY
        self._front = front
        self._gate = gate
        self._streams = streams
        self._port = front.bound_port
        # Drawn here and not at import: processes that fork after the import would share it.
        self._ids = secrets.token_hex(8)
        # Always sixteen digits: formatting these takes half the time of padding a number with zeros.
        self._made = itertools.count(10**15)
        self._watched: dict[int, NativeCall] = {}
        # By method: what was let in, as it came, until PASSES_S after the first of them.
        self._passes: tuple[set[str], ...] = tuple(set() for _ in METHODS)
        self._passes_end = 0.0

    def take(self, calls_max: int, *, wait: bool) -> list[Call] | None:
        front, ids, made, checks_type = self._front, self._ids, self._made, self._checks_type
        guarded = not self._gate.open
        events = front.recv_batch_details(calls_max, None if wait else 0)
        if events is None:
            return None

        now = time.monotonic()
        if guarded and now >= self._passes_end:
            self._forget_passes(now)
        calls: list[Call] = []
        for kind, call_id, method, payload, header, details in events:
            if kind != EVENT_CALL or payload is None or details is None:
                self._ended(call_id)
                continue

            metadata, peer, remaining_s = details
            if remaining_s is not None and remaining_s <= 0:
                continue  # the front has ended the call
            request_id, authorization = _told_by(metadata) if metadata else (None, None)
            request_id = request_id or f"{ids}{next(made)}"
            deadline = None if remaining_s is None else now + remaining_s
            call = NativeCall(front, call_id, method == _BATCH, payload, request_id, deadline, self._watched)

            # If this is a text, it is the peer's address: the call has no such header.
            suspect = header != _GRPC if checks_type else header.__class__ is bytes
            if (suspect or len(payload) > MESSAGE_BYTES_MAX) and self._refuse(call, header, peer):
                continue

            if method <= _BATCH:
                if guarded and authorization not in self._passes[method] and not self._admitted(call, authorization):
                    continue
                if call.batch:
                    call.watch()
                calls.append(call)
            elif self._streams is not None:
                self._streams.begin(call_id, method - len(METHODS), payload, metadata, peer, remaining_s)
            else:
                call.fail(ServiceError(Reason.NOT_IMPLEMENTED, "there is no such method"))
        return calls

    def _ended(self, call_id: int) -> None:
        """A call was cancelled, or its deadline has passed. A call that is not watched gets its answer all the same:
        that wastes little."""
        ended = self._watched.pop(call_id, None)
        if ended is not None:
            ended.gone = True
        if self._streams is not None:
            self._streams.end(call_id)

    def _admitted(self, call: NativeCall, authorization: str | None) -> bool:
        """Whether the caller may make this call. If not, the call is refused."""
        clock = time.time()
        try:
            expires = self._gate.admit_token(METHODS[call.batch], authorization, clock)
        except ServiceError as error:
            call.fail(error)
            return False

        # Hashing a token costs a microsecond, so what was let in is let in again for a moment. One that ends within
        # this moment is looked at each time.
        passes = self._passes[call.batch]
        if authorization is not None and expires > clock + PASSES_S and len(passes) < PASSES_MAX:
            passes.add(authorization)
        return True

    def _forget_passes(self, now: float) -> None:
        """Look at all tokens again: their file may have changed."""
        for passes in self._passes:
            passes.clear()
        self._passes_end = now + PASSES_S

    def _refuse(self, call: NativeCall, header: bytes | str | None, peer: str) -> bool:
        """Refuse a call that is far too large, compressed or of another type than gRPC's. False: it is nothing of that,
        as far as its header shows, and is not refused."""
        if len(call.payload) > MESSAGE_BYTES_MAX:
            # Refusing the call is not enough: the front would go on inflating what else the connection has sent.
            cut = connections.cut(self._port, peer)
            log.error("connection_cut", peer=peer, why="its message was too large", bytes=len(call.payload), found=cut)
        elif self._checks_type:
            if isinstance(header, bytes) and _is_grpc(header):
                return False
            call.fail(ServiceError(Reason.FIELD_INVALID, "the content-type of a request must be application/grpc"))
            return True
        elif not isinstance(header, bytes) or header == b"identity":
            return False
        call.fail(ServiceError(Reason.NOT_IMPLEMENTED, "a request must not be compressed"))
        return True

    def close(self) -> None:
        self._front.close()


def _is_grpc(content_type: bytes) -> bool:
    """Whether a content type is gRPC's, with or without a format (``+proto``) or a parameter."""
    kind, format_ = content_type[: len(_GRPC)], content_type[len(_GRPC) :]
    return kind.lower() == _GRPC and format_[:1] in (b"", b"+", b";")


def _told_by(metadata: Sequence[tuple[str, str | bytes]]) -> tuple[str | None, str | None]:
    """The client's request id, if it sent one that is fit for logs, and its ``authorization``, as
    ``access.authorization_of`` has it. One walk for both: it is done for each call."""
    request_id: str | None = None
    authorization: str | None = None
    for key, value in metadata:
        if key == AUTHORIZATION_KEY:
            authorization = "" if authorization is not None or isinstance(value, bytes) else value
        elif key == REQUEST_ID_KEY and request_id is None and isinstance(value, str):
            fit = 0 < len(value) <= REQUEST_ID_CHARACTERS_MAX and value.isascii() and value.isprintable()
            request_id = value if fit else ""
    return request_id, authorization


# -- grpcio ---------------------------------------------------------------------------------------------------------


class QueuedCall:
    """A call of a grpcio servicer. The servicer waits for ``future``."""

    __slots__ = ("_answered", "batch", "deadline", "future", "payload", "request_id")

    def __init__(self, *, batch: bool, payload: bytes, request_id: str, deadline: float | None) -> None:
        self.request_id = request_id
        self.batch = batch
        self.payload = payload
        self.deadline = deadline
        self.future: Future[bytes] = Future()
        self._answered = False

    @property
    def gone(self) -> bool:
        return self.future.cancelled()

    def watch(self) -> None:
        """Nothing to do: when the servicer stops waiting, it cancels the future, and ``gone`` is true."""

    def answer(self, payload: bytes) -> None:
        if self._first():
            self.future.set_result(payload)

    def fail(self, error: ServiceError) -> None:
        if self._first():
            # Without its traceback: the frames in it hold this call, which holds the future, which holds the error.
            # This cycle would keep a storm of large requests in memory until the next full collection.
            self.future.set_exception(error.with_traceback(None))

    def _first(self) -> bool:
        """Whether the servicer still waits and has no answer yet."""
        if self._answered:
            return False
        self._answered = True
        return self.future.set_running_or_notify_cancel()


class QueuedCalls:
    """Calls that grpcio's servicers submit, from any thread."""

    def __init__(self) -> None:
        self._queue: queue.SimpleQueue[QueuedCall | None] = queue.SimpleQueue()

    def submit(self, method: str, payload: bytes, request_id: str, deadline: float | None) -> Future[bytes]:
        """A future of the serialized answer to a call of one of ``METHODS``; its exception is a ServiceError."""
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
                self._queue.put(None)  # for the next call of take
                return calls or None
            if not call.gone:
                calls.append(call)
        return calls

    def close(self) -> None:
        self._queue.put(None)
