"""The outcome of a task that applies a batch of user events, as the bridge reads it."""

from __future__ import annotations

import json
from dataclasses import dataclass
from typing import Any, Final

from celery import states

from segsvc.domain.errors import Reason
from segsvc.services.ingestion import BatchReport

BATCH_LOST: Final = "BATCH_LOST"
"""Why a batch must be sent again: its task or its events were lost on the broker, or its task took too long."""
WORKER_ENDED: Final = "WORKER_ENDED"
"""Why a batch must be sent again: a worker process began it and ended with it. That may be the fault of an event: it
makes the process exceed its memory, or crash."""
OUT_OF_MEMORY: Final = "OUT_OF_MEMORY"
"""Why a batch must be sent again: its worker process got no memory for it."""
RESULT_REFUSED: Final = "RESULT_REFUSED"
"""Why a batch must be sent again: the value under the key of its result is not a result of ours."""
OUTAGE: Final = "OUTAGE"
"""Why a batch must be sent again: a server that its worker needs, or the machine, failed in a way that has no reason of
its own. The worker's log has it."""

RESULT_BYTES_MAX: Final = 4 << 20
"""A larger result is refused without reading it. The largest possible batch, every event of it refused by the database,
has about 2.5 MB."""
_COUNT_MAX: Final = 1_000_000
"""More events than any batch has."""
_TEXT_MAX: Final = 4096
"""Longer than any reason of a report. A longer one would not fit into the headers of a dead letter."""
_WORKER_LOST: Final = ("WorkerLostError", "Terminated")
"""Exceptions of Celery itself: the process was killed."""
_TOO_LATE: Final = ("TimeLimitExceeded", "SoftTimeLimitExceeded")
"""Exceptions of Celery itself: the task exceeded its time limit. Servers that are down cause this, so it does not count
against the events of the batch."""


@dataclass(frozen=True, slots=True)
class TryAgain:
    """A batch could not be finished now, for a reason that is not the fault of its events."""

    reason: str


Outcome = BatchReport | TryAgain


class BadResult(ValueError):
    """The value under the key of a result is not a result of ours."""


def read_result(payload: bytes) -> Outcome | None:
    """The outcome in a stored result, once every part of it has been checked.

    Celery's own decoder is not used: the content decides what it raises, and it builds exceptions by name.

    Returns:
        None: the task has not ended yet.

    Raises:
        BadResult: it is not a result of ours.
    """
    if len(payload) > RESULT_BYTES_MAX:
        raise BadResult(f"it has more than {RESULT_BYTES_MAX} bytes")

    try:
        stored = json.loads(payload)
    except (ValueError, RecursionError) as error:
        raise BadResult("it is not JSON") from error

    status = stored.get("status") if isinstance(stored, dict) else None
    if not isinstance(status, str) or status not in states.ALL_STATES:
        raise BadResult("it has no status of a task")
    if status not in states.READY_STATES:
        return None

    result = stored.get("result")
    if status == states.SUCCESS:
        return _outcome(result)
    if status == states.FAILURE:
        exception = result.get("exc_type") if isinstance(result, dict) else None
        if exception in _WORKER_LOST:
            return TryAgain(WORKER_ENDED)
        return TryAgain(BATCH_LOST if exception in _TOO_LATE else Reason.INTERNAL.text)
    # The task was revoked or rejected, most often because it expired in the queue: it was never run.
    return TryAgain(BATCH_LOST)


def _outcome(result: Any) -> Outcome:
    """What the task returned. Raises BadResult."""
    if not isinstance(result, dict):
        raise BadResult("its result is not an object")
    if "retry" in result:
        if not _is_text(result["retry"]):
            raise BadResult("its field retry is not a reason")
        return TryAgain(result["retry"])

    if not (_is_count(result.get("applied")) and _is_count(result.get("ignored"))):
        raise BadResult("its numbers of events are not numbers of events")
    dead = result.get("dead")
    if not isinstance(dead, list) or not all(_is_dead(item) for item in dead):
        raise BadResult("its field dead is not a list of indexes and reasons")
    return BatchReport(result["applied"], result["ignored"], tuple((index, reason) for index, reason in dead))


def _is_text(value: object) -> bool:
    return isinstance(value, str) and 0 < len(value) <= _TEXT_MAX


def _is_count(value: object) -> bool:
    return type(value) is int and 0 <= value <= _COUNT_MAX


def _is_dead(item: object) -> bool:
    return isinstance(item, list) and len(item) == 2 and _is_count(item[0]) and _is_text(item[1])
