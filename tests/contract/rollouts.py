"""Rollouts, deletions and their operations, as the tests ask for them."""

from __future__ import annotations

from collections.abc import Callable, Iterator
from contextlib import contextmanager
from typing import Any
from uuid import UUID

from google.longrunning import operations_pb2 as lro
from segmentation.v1 import operations_pb2
from segmentation.v1 import segments_pb2 as pb

from tests.contract.conftest import FrontUnderTest
from tests.eventually import eventually

State = operations_pb2.OperationMetadata.State
NOBODY = f"operations/{UUID(int=0)}"


def roll_out(front: FrontUnderTest, slug: str, percent: float, timeout: float = 20, **fields: Any) -> lro.Operation:
    request = pb.RollOutSegmentRequest(slug=slug, rule={"percent": percent}, **fields)
    return front.segments.RollOutSegment(request, timeout=timeout)


def delete(front: FrontUnderTest, slug: str, **fields: Any) -> lro.Operation:
    return front.segments.DeleteSegment(pb.DeleteSegmentRequest(slug=slug, **fields), timeout=20)


def metadata(operation: lro.Operation) -> operations_pb2.OperationMetadata:
    found = operations_pb2.OperationMetadata()
    assert operation.metadata.Unpack(found)
    return found


def wait(front: FrontUnderTest, name: str, timeout: float = 20) -> lro.Operation:
    return front.operations.WaitOperation(lro.WaitOperationRequest(name=name), timeout=timeout)


def get_operation(front: FrontUnderTest, name: str) -> lro.Operation:
    return front.operations.GetOperation(lro.GetOperationRequest(name=name), timeout=10)


@contextmanager
def held(front: FrontUnderTest, point: str = "prepared-not-voted", operation: str = "") -> Iterator[Callable[[], None]]:
    """Operations (or only the one of this name) wait at a point of the commit protocol until the block ends or the
    yielded function is called."""
    file = front.failpoints / point
    file.write_text(f"hold operation={operation.removeprefix('operations/')}" if operation else "hold")
    try:
        yield lambda: file.unlink(missing_ok=True)
    finally:
        file.unlink(missing_ok=True)


def operations_of(front: FrontUnderTest, slug: str) -> list[lro.Operation]:
    request = lro.ListOperationsRequest(name="operations", filter=f"slug = {slug}")
    return list(front.operations.ListOperations(request, timeout=10).operations)


def running_operation(front: FrontUnderTest, slug: str) -> str:
    """The name of the newest operation of a slug, once there is one that has not ended."""
    found: list[str] = []

    def look() -> bool:
        found[:] = [operation.name for operation in operations_of(front, slug)[:1] if not operation.done]
        return bool(found)

    eventually(look)
    return found[0]
