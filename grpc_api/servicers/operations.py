"""segmentation.v1.OperationService and google.longrunning.Operations: two views of the same ledger."""

from __future__ import annotations

import json
from collections.abc import AsyncIterator
from contextlib import aclosing

from google.longrunning import operations_pb2, operations_pb2_grpc
from google.longrunning.operations_pb2 import Operation as OperationMessage
from google.protobuf.empty_pb2 import Empty
from segmentation.v1 import operations_pb2 as watch_pb2
from segmentation.v1 import operations_pb2_grpc as watch_pb2_grpc

from grpc_api import call_scope, convert
from grpc_api.call_scope import BlockingCalls
from grpc_api.interceptors import Context
from grpc_api.places import Places
from grpc_api.servicers.views import OperationViews
from grpc_api.watching import OperationWatch, View
from segsvc.domain.errors import Reason, ServiceError, invalid_field, operation_not_found
from segsvc.domain.operation import OperationFilter
from segsvc.domain.paging import decode_token, encode_token, page_size_of
from segsvc.services.acceptance import Acceptance
from segsvc.services.operations import OperationService

COLLECTION = "operations"
PAGE_BYTES_MAX = 2 << 20
"""A page is cut once it is larger: responses hold segments, and clients refuse messages over 4 MiB by default."""


class OperationsServicer(operations_pb2_grpc.OperationsServicer):
    """google.longrunning.Operations."""

    def __init__(
        self,
        operations: OperationService,
        acceptance: Acceptance,
        reading: BlockingCalls,
        changes: BlockingCalls,
    ) -> None:
        self._operations = operations
        self._acceptance = acceptance
        self._views = OperationViews(operations, reading)
        self._reading = reading
        self._changes = changes

    async def GetOperation(self, request: operations_pb2.GetOperationRequest, context: Context) -> OperationMessage:
        return convert.operation_message(await self._views.describe(convert.operation_id_of(request.name)))

    async def ListOperations(
        self, request: operations_pb2.ListOperationsRequest, context: Context
    ) -> operations_pb2.ListOperationsResponse:
        if request.name not in ("", COLLECTION):
            raise invalid_field("name", f"must be {COLLECTION!r}, is {request.name[:80]!r}")
        wanted, page_size = convert.filter_of(request.filter), page_size_of(request.page_size)
        before = decode_token(_scope(wanted), request.page_token, "page_token")[0] if request.page_token else None
        # One more than the page holds shows whether another page follows.
        found = await self._reading.run(
            lambda _: self._operations.list(wanted, page_size=page_size + 1, before_seq=before)
        )

        messages: list[OperationMessage] = []
        size = 0
        for view in await self._views.describe_all(found[:page_size]):
            message = convert.operation_message(view)
            size += message.ByteSize()
            if messages and size > PAGE_BYTES_MAX:
                break
            messages.append(message)

        more = len(messages) < len(found)
        token = encode_token(_scope(wanted), [found[len(messages) - 1].seq]) if more else ""
        return operations_pb2.ListOperationsResponse(operations=messages, next_page_token=token)

    async def WaitOperation(self, request: operations_pb2.WaitOperationRequest, context: Context) -> OperationMessage:
        operation_id = convert.operation_id_of(request.name)
        patience_s = call_scope.current().patience_s()
        if request.HasField("timeout"):
            timeout_s = request.timeout.ToNanoseconds() / 1e9
            if timeout_s < 0:
                raise invalid_field("timeout", "must not be negative")
            patience_s = timeout_s if patience_s is None else min(timeout_s, patience_s)
        operation = await self._reading.run(lambda _: self._operations.get(operation_id))
        await self._views.wait(operation, patience_s)
        return convert.operation_message(await self._views.describe(operation_id))

    async def CancelOperation(self, request: operations_pb2.CancelOperationRequest, context: Context) -> Empty:
        operation_id = convert.operation_id_of(request.name)
        actor = call_scope.current().actor
        await self._changes.run(lambda _: self._acceptance.cancel(operation_id, actor=actor))
        return Empty()

    async def DeleteOperation(self, request: operations_pb2.DeleteOperationRequest, context: Context) -> Empty:
        raise ServiceError(Reason.NOT_IMPLEMENTED, "operations are the history: they are not deleted")


class WatchServicer(watch_pb2_grpc.OperationServiceServicer):
    """segmentation.v1.OperationService.

    Args:
        places: for watches; when all are taken, more watches are refused.
    """

    def __init__(self, watch: OperationWatch, places: Places) -> None:
        self._watch = watch
        self._places = places
        # A message is built once for all watchers of its operation.
        self._built: tuple[View, watch_pb2.WatchOperationResponse] | None = None

    async def WatchOperation(
        self, request: watch_pb2.WatchOperationRequest, context: Context
    ) -> AsyncIterator[watch_pb2.WatchOperationResponse]:
        operation_id = convert.operation_id_of(request.name)
        with self._places.taken(context.peer()):
            async with aclosing(self._watch.follow(operation_id)) as views:
                async for view in views:
                    if view is None:
                        raise operation_not_found(f"operations/{operation_id}")
                    yield self._message(view)

    def _message(self, view: View) -> watch_pb2.WatchOperationResponse:
        if self._built is None or self._built[0] is not view:
            operation, shards = view
            message = watch_pb2.WatchOperationResponse(
                name=operation.name, metadata=convert.metadata_message(operation, shards)
            )
            self._built = view, message
        return self._built[1]


def _scope(wanted: OperationFilter) -> str:
    """What must not change from page to page; the size of the page may."""
    return json.dumps(["operations", wanted.slug, wanted.kind and wanted.kind.name, wanted.state and wanted.state.name])
