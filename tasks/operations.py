"""The tasks of an operation's chord: one header task for each shard, then the finalizer."""

from __future__ import annotations

import time
from collections.abc import Sequence
from typing import Any
from uuid import UUID

from celery import Task
from kombu.exceptions import OperationalError
from redis.exceptions import RedisError

from segsvc.domain.errors import LockTimeout, Reason, ServiceError
from segsvc.domain.operation import ShardProgress, ShardState
from segsvc.log import get_logger
from tasks.app import app, runtime
from tasks.dispatcher import FINALIZE, PREPARE_SHARD

log = get_logger(__name__)

HEADER_RESULT = "prepared or left to recovery"
"""What every header task returns: if a task that is delivered twice gave two results, the chord could fire early."""

_RETRIES_MAX = 5
_BACKOFF_S = (0.1, 0.2, 0.5, 1.0, 2.0)


@app.task(name=PREPARE_SHARD, bind=True, max_retries=_RETRIES_MAX)
def prepare_shard(self: Task[Any, Any], *, operation_id: str, shard: int, title: str) -> str:
    """Prepare one shard of an operation and vote for it.

    After an outage or a busy lock the task is tried again a few times, then left to recovery, which sends a new chord.
    After a statement that took too long it is left to recovery at once: another try here would hold the shard's lock
    and this process for as long again, and recovery, which knows the deadline, would find no process to run in.
    """
    reporter = ProgressReporter(self, UUID(operation_id), title)
    reporter(ShardProgress(shard, ShardState.WORKING))

    if shard >= runtime().shard_count:
        # Sent by a process that knows of a doubling of the shards; this one soon will. Recovery sends a new chord.
        log.warning("shard_left_to_recovery", operation=operation_id, shard=shard, reason="OTHER_SHARDS")
        return HEADER_RESULT
    try:
        runtime().coordinator.prepare_shard(UUID(operation_id), shard, reporter)
    except (ServiceError, LockTimeout) as error:
        retries = self.request.retries
        took_too_long = isinstance(error, ServiceError) and error.reason is Reason.DEADLINE_EXCEEDED
        if retries < _RETRIES_MAX and not took_too_long:
            raise self.retry(countdown=_BACKOFF_S[retries], exc=error) from error
        log.warning("shard_left_to_recovery", operation=operation_id, shard=shard, reason=str(error))
    return HEADER_RESULT


@app.task(name=FINALIZE, bind=True, max_retries=_RETRIES_MAX)
def finalize(self: Task[Any, Any], _headers: Sequence[str] = (), *, operation_id: str, title: str) -> str:
    """Decide an operation if all votes are in, and carry it to its end."""
    try:
        final = runtime().coordinator.finalize(UUID(operation_id))
    except ServiceError as error:
        retries = self.request.retries
        if retries < _RETRIES_MAX:
            raise self.retry(countdown=_BACKOFF_S[retries], exc=error) from error
        log.warning("operation_left_to_recovery", operation=operation_id, reason=str(error))
        return "left to recovery"
    return f"{title}: ended" if final else f"{title}: votes are missing"


class ProgressReporter:
    """Reports a shard's progress: to Flower by an event, and to WatchOperation in the ledger's progress table.

    It reports at most ten times a second, but always the number of blocks and the end of the work, since the last
    report stays visible. It never raises, since nothing depends on it.
    """

    _INTERVAL_S = 0.1

    def __init__(self, task: Task[Any, Any], operation_id: UUID, title: str) -> None:
        self._task = task
        self._operation_id = operation_id
        self._title = title
        self._next = 0.0
        self._blocks_total = 0

    def __call__(self, progress: ShardProgress) -> None:
        now = time.monotonic()
        ended = progress.blocks_done == progress.blocks_total
        if now < self._next and not ended and progress.blocks_total == self._blocks_total:
            return

        self._next, self._blocks_total = now + self._INTERVAL_S, progress.blocks_total
        done = f"{progress.blocks_done}/{progress.blocks_total} blocks" if progress.blocks_total else "at work"
        text = f"shard {progress.shard}: {done}"
        try:
            # The only form of progress that Flower shows: PROGRESS, with this text.
            self._task.send_event("task-progress", result=text, kwargs=f"{{{self._title}, shard {progress.shard}}}")
            runtime().ledger.put_progress(self._operation_id, progress)
        except (ServiceError, OperationalError, RedisError, OSError) as error:
            log.debug("progress_not_shown", operation=str(self._operation_id), reason=type(error).__name__)
