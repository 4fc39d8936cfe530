"""Operations as their callers see them: read from the ledger, and waited for without a thread for each."""

from __future__ import annotations

import asyncio
from collections.abc import Sequence
from uuid import UUID

from grpc_api.call_scope import BlockingCalls
from grpc_api.convert import OperationView
from segsvc.domain.errors import Reason, ServiceError
from segsvc.domain.operation import Operation, OperationState
from segsvc.services.operations import OperationService


class OperationViews:
    def __init__(self, operations: OperationService, blocking: BlockingCalls) -> None:
        self._operations = operations
        self._blocking = blocking

    async def describe(self, operation_id: UUID) -> OperationView:
        """The operation as it is now. Raises ServiceError OPERATION_NOT_FOUND, CATALOG_UNAVAILABLE."""
        return await self._blocking.run(lambda _: self._views([self._operations.get(operation_id)])[0])

    async def describe_all(self, operations: Sequence[Operation]) -> list[OperationView]:
        """These operations, in their order. Raises ServiceError CATALOG_UNAVAILABLE."""
        return await self._blocking.run(lambda _: self._views(operations))

    async def wait(self, operation: Operation, patience_s: float | None) -> None:
        """Return when the operation has ended or the time is up.

        Args:
            patience_s: how long to wait; None: to the end.
        """
        if operation.state.final:
            return
        end = asyncio.wrap_future(self._operations.watch_end(operation.id))
        try:
            # Not wait_for: when the service shuts down, the watcher cancels the future. That must look like the end of
            # the time, not like a cancelled call.
            await asyncio.wait([end], timeout=patience_s)
        finally:
            end.cancel()

    async def answer(self, accepted: Operation, patience_s: float | None) -> OperationView:
        """The answer to a call whose operation is accepted: at its end, or unfinished when the time is up.

        Args:
            patience_s: how long to wait; 0: not at all; None: to the end.
        """
        if patience_s != 0:
            await self.wait(accepted, patience_s)
        try:
            return await self.describe(accepted.id)
        except ServiceError as error:
            if error.reason not in (Reason.CATALOG_UNAVAILABLE, Reason.OVERLOADED, Reason.DEADLINE_EXCEEDED):
                raise
            if accepted.state is OperationState.DONE:
                raise
            # The operation is accepted and goes on: an error would make the client believe that it is not. So the
            # answer is its state at the acceptance.
            return OperationView(accepted, (), None)

    def _views(self, operations: Sequence[Operation]) -> list[OperationView]:
        described = self._operations.describe(operations)
        return [
            OperationView(operation, shards, result)
            for operation, (shards, result) in zip(operations, described, strict=True)
        ]
