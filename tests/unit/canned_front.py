"""A front with canned answers, for commands that talk to one."""

from __future__ import annotations

import gc
from collections.abc import Callable, Iterator
from concurrent import futures
from contextlib import contextmanager
from typing import Any

import grpc
from google.protobuf.message import Message
from google.rpc import error_details_pb2, status_pb2
from segmentation.v1 import segments_pb2
from typer.testing import CliRunner, Result

from segsvc.cli.app import app

Answer = Callable[[Any, grpc.ServicerContext], Any]


class CannedFront:
    """A gRPC server that records requests and gives the answers set for them, by full method name."""

    def __init__(self) -> None:
        self.answers: dict[str, tuple[Any, Answer, bool]] = {}
        self.requests: list[Any] = []

    def on(self, method: str, request_type: type[Message], answer: Answer, *, stream: bool = False) -> None:
        self.answers[method] = (request_type, answer, stream)

    def service(self, call: grpc.HandlerCallDetails) -> grpc.RpcMethodHandler[Any, Any] | None:
        if call.method not in self.answers:
            return None
        request_type, answer, stream = self.answers[call.method]

        def handle(request: Any, context: grpc.ServicerContext) -> Any:
            self.requests.append(request)
            return answer(request, context)

        make = grpc.unary_stream_rpc_method_handler if stream else grpc.unary_unary_rpc_method_handler
        return make(
            handle,
            request_deserializer=request_type.FromString,
            response_serializer=lambda message: message.SerializeToString(),
        )


class Handler(grpc.GenericRpcHandler):
    def __init__(self, front: CannedFront) -> None:
        self._front = front

    def service(self, handler_call_details: grpc.HandlerCallDetails) -> grpc.RpcMethodHandler[Any, Any] | None:
        return self._front.service(handler_call_details)


@contextmanager
def serving(front: CannedFront, credentials: grpc.ServerCredentials | None = None) -> Iterator[str]:
    """Serve it; yields host:port. ``credentials`` None: without TLS."""
    server = grpc.server(futures.ThreadPoolExecutor(4))
    server.add_generic_rpc_handlers((Handler(front),))
    if credentials is None:
        port = server.add_insecure_port("127.0.0.1:0")
    else:
        port = server.add_secure_port("127.0.0.1:0", credentials)
    # grpc closes a channel that is garbage in the thread that collects it, and waits for the channel's lock. In the
    # server's own thread, which holds the server's lock, both would wait for ever: so nothing is collected there.
    gc.collect()
    gc.disable()
    server.start()

    try:
        yield f"127.0.0.1:{port}"
    finally:
        server.stop(0).wait()
        gc.enable()


def run(*arguments: str) -> Result:
    return CliRunner().invoke(app, list(arguments))


def refuse(code: grpc.StatusCode, reason: str, message: str) -> Answer:
    def answer(_request: Any, context: grpc.ServicerContext) -> Any:
        status = status_pb2.Status(code=code.value[0], message=message)
        status.details.add().Pack(error_details_pb2.ErrorInfo(domain="segsvc", reason=reason))
        context.set_trailing_metadata((("grpc-status-details-bin", status.SerializeToString()),))
        context.abort(code, message)

    return answer


def give_statistics(front: CannedFront) -> None:
    front.on(
        "/segmentation.v1.SegmentService/GetSegmentStatistics",
        segments_pb2.GetSegmentStatisticsRequest,
        lambda request, _: segments_pb2.SegmentStatistics(
            member_count=1234, user_count=10_000, member_share=0.1234,
            shards=[segments_pb2.ShardCounts(shard=3, member_count=1234)],
        ),
    )  # fmt: skip
