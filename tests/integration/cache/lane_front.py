"""The hot lane behind each of its two entries, as a test's client sees it."""

from __future__ import annotations

import time
from collections.abc import Callable, Sequence
from concurrent.futures import TimeoutError as FutureTimeout
from dataclasses import dataclass
from typing import Protocol

import grpc
from google.rpc.error_details_pb2 import BadRequest, ErrorInfo, RetryInfo
from google.rpc.status_pb2 import Status
from prometheus_client import REGISTRY
from segmentation.v1 import membership_pb2 as pb

from grpc_api.access import Gate
from grpc_api.call_scope import REQUEST_ID_KEY
from grpc_api.errors import DETAILS_KEY, status_of
from grpc_api.hot.calls import BATCH_GET_USER_SEGMENTS, GET_USER_SEGMENTS, native_front
from grpc_api.hot.lane import HotLane
from grpc_api.hot.wire import encode_slug
from segsvc.bootstrap import HotReads
from segsvc.config import Settings
from segsvc.domain.errors import ServiceError


class RefusedError(Exception):
    """A call that was refused, with its details unpacked."""

    def __init__(self, status: Status) -> None:
        super().__init__(f"{status.code} {status.message}")
        self.code = status.code
        self.message = status.message
        self.reason = ""
        self.fields: list[str] = []
        self.retry_s: float | None = None

        for detail in status.details:
            info, request, retry = ErrorInfo(), BadRequest(), RetryInfo()
            if detail.Unpack(info):
                self.reason = info.reason
                assert info.domain == "segsvc"
            elif detail.Unpack(request):
                self.fields = [violation.field for violation in request.field_violations]
            elif detail.Unpack(retry):
                self.retry_s = retry.retry_delay.ToTimedelta().total_seconds()


def refusal_in_time(call: Callable[[], object]) -> RefusedError:
    """The refusal of a call with a short deadline, with its reason: if the client gave up first, call again."""
    for _ in range(10):
        try:
            answer = call()
        except RefusedError as error:
            if error.reason:
                return error
        else:
            raise AssertionError(f"the call was not refused: {answer}")
    raise AssertionError("the client gave up first, 10 times")


class Answer(Protocol):
    """The outcome of a call that was sent."""

    def result(self, timeout: float) -> bytes: ...

    def cancel(self) -> bool: ...


class Send(Protocol):
    def __call__(self, method: str, payload: bytes, timeout_s: float) -> Answer:
        """Send the call, and do not wait for its answer."""


class Ask(Protocol):
    def __call__(self, method: str, payload: bytes, timeout_s: float | None) -> bytes:
        """Make the call. Returns the answer's bytes. Raises RefusedError."""


@dataclass
class Lane:
    """A running lane and its client."""

    lane: HotLane
    reads: HotReads
    ask: Ask
    send: Send
    channel: grpc.Channel | None = None

    def segments(self, user_id: int, timeout_s: float | None = 5.0) -> list[str]:
        return list(self.answer(user_id, timeout_s).slugs)

    def answer(self, user_id: int, timeout_s: float | None = 5.0) -> pb.UserSegments:
        request = pb.GetUserSegmentsRequest(user_id=user_id)
        return pb.UserSegments.FromString(self.ask(GET_USER_SEGMENTS, request.SerializeToString(), timeout_s))

    def batch(self, user_ids: Sequence[int], timeout_s: float | None = 5.0) -> pb.BatchGetUserSegmentsResponse:
        request = pb.BatchGetUserSegmentsRequest(user_ids=user_ids)
        payload = self.ask(BATCH_GET_USER_SEGMENTS, request.SerializeToString(), timeout_s)
        return pb.BatchGetUserSegmentsResponse.FromString(payload)

    def close(self) -> None:
        if self.channel is not None:
            self.channel.close()
        self.lane.close(5.0)
        self.reads.close(5.0)


def _make_lane(settings: Settings, *, front: object) -> tuple[HotLane, HotReads]:
    reads = HotReads(settings, encode=encode_slug)
    lane = HotLane(
        front=front,  # type: ignore[arg-type]
        gate=Gate(None, ()),
        entries=reads.entries,
        counts=reads.counts,
        cold=reads.cold,
        slugs=reads.slugs,
        shard_count=settings.shard_count,
    )

    lane.start()
    return lane, reads


def native_lane(settings: Settings) -> Lane:
    """A lane whose calls come through NativeGrpcFront from a grpc client."""
    front = native_front("127.0.0.1:0", reuse_port=False)
    lane, reads = _make_lane(settings, front=front)
    front.start()
    channel = grpc.insecure_channel(f"127.0.0.1:{front.bound_port}")

    def ask(method: str, payload: bytes, timeout_s: float | None) -> bytes:
        try:
            answer, call = channel.unary_unary(method).with_call(
                payload, timeout=timeout_s, metadata=[(REQUEST_ID_KEY, "a test")]
            )
        except grpc.RpcError as error:
            metadata = dict(error.trailing_metadata() or ())
            if DETAILS_KEY not in metadata:  # the client's own deadline or the front's has passed
                raise RefusedError(Status(code=error.code().value[0], message=error.details())) from error
            status = Status.FromString(metadata[DETAILS_KEY])
            said = metadata[REQUEST_ID_KEY], error.code().value[0], error.details()
            if said != ("a test", status.code, status.message):
                raise AssertionError(f"the call's end says {said}, its details {status}") from error
            raise RefusedError(status) from error
        assert dict(call.initial_metadata())[REQUEST_ID_KEY] == "a test"
        return bytes(answer)

    def send(method: str, payload: bytes, timeout_s: float) -> Answer:
        future: Answer = channel.unary_unary(method).future(payload, timeout=timeout_s)
        return future

    return Lane(lane, reads, ask, send, channel)


def queued_lane(settings: Settings) -> Lane:
    """A lane whose calls come by ``submit``, as from grpcio's servicers."""
    lane, reads = _make_lane(settings, front=None)

    def ask(method: str, payload: bytes, timeout_s: float | None) -> bytes:
        deadline = None if timeout_s is None else time.monotonic() + timeout_s
        future = lane.submit(method, payload, "a test", deadline)
        try:
            return future.result(timeout_s)
        except ServiceError as error:
            raise RefusedError(status_of(error)) from error
        except FutureTimeout as error:
            future.cancel()
            raise RefusedError(Status(code=grpc.StatusCode.DEADLINE_EXCEEDED.value[0])) from error

    def send(method: str, payload: bytes, timeout_s: float) -> Answer:
        return lane.submit(method, payload, "a test", time.monotonic() + timeout_s)

    return Lane(lane, reads, ask, send)


LANES = {"native": native_lane, "queued": queued_lane}

Start = Callable[..., Lane]
"""Starts a lane for a world, with changed settings if given."""


def reads(source: str) -> float:
    """Number of reads of this process so far whose answer came from ``source``."""
    return REGISTRY.get_sample_value("segsvc_reads_total", {"source": source}) or 0.0
