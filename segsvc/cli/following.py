"""Follow an operation to its end, with a progress bar, and say how it ended."""

from __future__ import annotations

from collections.abc import Sequence

import grpc
from google.longrunning import operations_pb2
from google.protobuf.duration_pb2 import Duration
from segmentation.v1 import operations_pb2 as watch_pb2
from segmentation.v1 import segments_pb2

from segsvc.cli.base import bar, complain, plain
from segsvc.cli.front import Front, describe

Metadata = watch_pb2.OperationMetadata

_WAIT_S = 20


def metadata_of(operation: operations_pb2.Operation) -> Metadata:
    """What the operation does, and how far it has come."""
    metadata = Metadata()
    operation.metadata.Unpack(metadata)
    return metadata


def title_of(metadata: Metadata) -> str:
    """What the operation does, in words: ``roll out checkout``."""
    return f"{Metadata.Kind.Name(metadata.kind).lower().replace('_', ' ')} {metadata.slug}"


def follow(front: Front, operation: operations_pb2.Operation, *, quiet: bool) -> operations_pb2.Operation:
    """Wait until an operation has ended; returns its final state.

    Args:
        quiet: without a progress bar.

    Raises:
        grpc.RpcError: the front went away. The operation goes on, and the command that follows it has been printed.
    """
    if operation.done:
        return operation
    try:
        if quiet:
            return wait(front, operation.name)
        _watch(front, operation)
        return get(front, operation.name)
    except (KeyboardInterrupt, grpc.RpcError):
        complain(f"it goes on without you; to see how it ends: segsvc operations watch {operation.name}")
        raise


def _watch(front: Front, operation: operations_pb2.Operation) -> None:
    with bar(title_of(metadata_of(operation))) as shown:
        for update in front.watching.WatchOperation(watch_pb2.WatchOperationRequest(name=operation.name)):
            metadata = update.metadata
            state = Metadata.State.Name(metadata.state).lower()
            done = sum(shard.blocks_done for shard in metadata.shards)
            total = sum(shard.blocks_total for shard in metadata.shards)
            shown.to(done, total or None, f"{title_of(metadata)}: {state}, blocks")


def get(front: Front, name: str) -> operations_pb2.Operation:
    """The operation as it is now."""
    request = operations_pb2.GetOperationRequest(name=name)
    operation: operations_pb2.Operation = front.operations.GetOperation(request, timeout=front.timeout_s)
    return operation


def wait(front: Front, name: str) -> operations_pb2.Operation:
    """Wait until an operation has ended, without showing anything."""
    request = operations_pb2.WaitOperationRequest(name=name, timeout=Duration(seconds=_WAIT_S))
    while True:
        operation: operations_pb2.Operation = front.operations.WaitOperation(request, timeout=_WAIT_S + front.timeout_s)
        if operation.done:
            return operation


def _unknown_attributes(names: Sequence[str]) -> str:
    """One more line, about attributes that the condition names and no user has."""
    return f"\nno user has {', '.join(f'user.{plain(name)}' for name in names)}" if names else ""


def outcome(operation: operations_pb2.Operation) -> tuple[str, str]:
    """(error, text): why the operation was aborted, or what it did; both are empty until it has ended."""
    if operation.HasField("error"):
        return describe(operation.error), ""
    if not operation.done:
        return "", ""

    title = title_of(metadata_of(operation))
    rolled_out, deleted = segments_pb2.RollOutSegmentResponse(), segments_pb2.DeleteSegmentResponse()
    if operation.response.Unpack(rolled_out):
        return "", (
            f"{title}: done; {rolled_out.added_count:,} added, {rolled_out.removed_count:,} removed, "
            f"{rolled_out.member_count:,} members" + _unknown_attributes(rolled_out.unknown_attributes)
        )
    if operation.response.Unpack(deleted):
        return "", f"{title}: done; it had {deleted.removed_count:,} members"
    return "", f"{title}: done"
