"""Shell completion beyond commands and options: segments and operations, as the running front knows them.

Imports heavy packages only when a name is to be completed. Prints nothing, not even an error: it would appear in the
middle of the line that is being typed.
"""

from __future__ import annotations

from collections.abc import Callable
from typing import TYPE_CHECKING, Final, TypeVar

if TYPE_CHECKING:
    from segsvc.cli.front import Front

_TIMEOUT_S: Final = 1.0
_OPERATIONS: Final = 20

Answer = TypeVar("Answer")


def segment_slugs(incomplete: str) -> list[str]:
    """Slugs of segments with this beginning."""
    return [slug for slug in _ask_front(_slugs) if slug.startswith(incomplete)]


def operation_names(incomplete: str) -> list[tuple[str, str]]:
    """The newest operations with this beginning, and what each of them does."""
    prefix = "operations/" if incomplete.startswith("operations/") else ""
    found = ((prefix + name, title) for name, title in _ask_front(_operations))
    return [(name, title) for name, title in found if name.startswith(incomplete)]


def _ask_front(question: Callable[[Front], list[Answer]]) -> list[Answer]:
    from segsvc.cli.front import connected  # noqa: PLC0415
    from segsvc.config import load_settings  # noqa: PLC0415

    try:
        with connected(load_settings()) as front:
            return question(front)
    except Exception:  # noqa: BLE001  # the command itself reports it, when it is run
        return []


def _slugs(front: Front) -> list[str]:
    from segmentation.v1 import segments_pb2  # noqa: PLC0415

    request = segments_pb2.ListSegmentsRequest(page_size=1000)
    return [segment.slug for segment in front.segments.ListSegments(request, timeout=_TIMEOUT_S).segments]


def _operations(front: Front) -> list[tuple[str, str]]:
    from google.longrunning import operations_pb2  # noqa: PLC0415

    from segsvc.cli.following import Metadata, metadata_of, title_of  # noqa: PLC0415

    request = operations_pb2.ListOperationsRequest(name="operations", page_size=_OPERATIONS)
    found: list[tuple[str, str]] = []
    for operation in front.operations.ListOperations(request, timeout=_TIMEOUT_S).operations:
        metadata = metadata_of(operation)
        title = f"{title_of(metadata)}, {Metadata.State.Name(metadata.state)}"
        found.append((operation.name.removeprefix("operations/"), title))
    return found
