"""Operations as their callers see them: looked up, listed, described, watched. ``acceptance`` makes them."""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from concurrent.futures import Future
from typing import Protocol
from uuid import UUID

from segsvc.domain.errors import operation_not_found
from segsvc.domain.operation import (
    Operation,
    OperationDetails,
    OperationFilter,
    OperationResult,
    OperationState,
    ShardProgress,
    ShardState,
)


class OperationStore(Protocol):
    """The ledger, as far as viewing needs it. All raise CATALOG_UNAVAILABLE in an outage."""

    def get(self, operation_id: UUID) -> Operation | None: ...

    def get_many(self, operation_ids: Sequence[UUID]) -> Sequence[Operation]: ...

    def list(self, wanted: OperationFilter, *, page_size: int, before_seq: int | None) -> Sequence[Operation]: ...

    def result(self, operation_id: UUID) -> OperationResult | None: ...

    def details(self, operation_ids: Sequence[UUID]) -> Mapping[UUID, OperationDetails]: ...


class EndWatcher(Protocol):
    def watch(self, operation_id: UUID) -> Future[Operation]:
        """A future that gets the operation once it is final. Cancel it when nothing waits for it any more."""


class OperationService:
    """Views of operations. It changes none: ``Acceptance`` and ``Creations`` do."""

    def __init__(self, *, store: OperationStore, watcher: EndWatcher, shards: Sequence[int]) -> None:
        self._store = store
        self._watcher = watcher
        self._shards = shards

    def get(self, operation_id: UUID) -> Operation:
        """The operation as it is now. Raises OPERATION_NOT_FOUND, CATALOG_UNAVAILABLE."""
        operation = self._store.get(operation_id)
        if operation is None:
            raise operation_not_found(f"operations/{operation_id}")
        return operation

    def list(self, wanted: OperationFilter, *, page_size: int, before_seq: int | None) -> Sequence[Operation]:
        """Operations that match, newest first; ``before_seq``: only older ones than this."""
        return self._store.list(wanted, page_size=page_size, before_seq=before_seq)

    def watch_end(self, operation_id: UUID) -> Future[Operation]:
        """A future of the operation in its final state. Cancel it when nothing waits for it any more."""
        return self._watcher.watch(operation_id)

    def result(self, operation: Operation) -> OperationResult:
        """The result of a DONE operation."""
        result = self._store.result(operation.id)
        if result is None:
            raise ValueError(f"{operation.name} is not committed")
        return result

    def progress_of(self, operation_ids: Sequence[UUID]) -> Mapping[UUID, tuple[Operation, Sequence[ShardProgress]]]:
        """Those of these operations that exist, and how far each shard is, in the order of the shards."""
        operations = self._store.get_many(operation_ids)
        described = self.describe(operations)
        return {operation.id: (operation, shards) for operation, (shards, _) in zip(operations, described, strict=True)}

    def describe(
        self, operations: Sequence[Operation]
    ) -> Sequence[tuple[Sequence[ShardProgress], OperationResult | None]]:
        """For each of these operations: how far each shard is, and its result if it is DONE, else None."""
        details = self._store.details([operation.id for operation in operations])

        described: list[tuple[Sequence[ShardProgress], OperationResult | None]] = []
        for operation in operations:
            detail = details[operation.id]
            hints = {progress.shard: progress for progress in detail.progress}
            shards = [self._shard_progress(operation, shard, hints.get(shard)) for shard in self._shards]
            done = operation.state is OperationState.DONE
            described.append((shards, OperationResult(detail.segment, operation.votes) if done else None))
        return described

    def _shard_progress(self, operation: Operation, shard: int, hint: ShardProgress | None) -> ShardProgress:
        """What is certain (votes, the operation's state) takes precedence over what a shard last reported of itself."""
        hint = hint or ShardProgress(shard, ShardState.WAITING)
        vote = next((counts for counts in operation.votes if counts.shard == shard), None)

        if operation.state is OperationState.ABORTED:
            return ShardProgress(shard, ShardState.ROLLED_BACK, hint.blocks_done, hint.blocks_total)
        if vote is None:
            return hint
        state = ShardState.FINISHED if operation.state is OperationState.DONE else ShardState.PREPARED
        return ShardProgress(shard, state, hint.blocks_total, hint.blocks_total, vote.added, vote.removed)
