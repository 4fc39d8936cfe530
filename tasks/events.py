"""Batches of user events: the task that applies one, and the bridge's way to send them and learn how they ended."""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from typing import Any, Final

from celery import states
from celery.result import denied_join_result
from kombu.exceptions import OperationalError
from redis.exceptions import RedisError

from segsvc.domain.errors import Category, LockTimeout, Reason, ServiceError, broker_unavailable
from segsvc.domain.events import from_wire
from segsvc.services.ingestion import BatchReport
from tasks.app import EVENTS_QUEUE, app, runtime
from tasks.event_lanes import Outcome, TryAgain

LOCK_TIMEOUT: Final = "LOCK_TIMEOUT"
"""Why a batch must come again: an operation held the shard for longer than ``lock_timeout_s``."""

_TRANSIENT: Final = (Category.UNAVAILABLE, Category.RESOURCE_EXHAUSTED, Category.DEADLINE_EXCEEDED)


@app.task(name="segsvc.apply_events")
def apply_events(*, shard: int, events: Sequence[Sequence[Any]]) -> dict[str, Any]:
    """Apply a batch of events of one shard.

    An outage is an answer, not an exception: the bridge holds the batch back and sends it again, and no worker
    is kept waiting meanwhile.

    Returns:
        ``{"applied", "ignored", "dead": [[index, reason], …]}``, or ``{"retry": reason}``: some of it may be done, all
        of it must come again.
    """
    try:
        report = runtime().ingestion.apply_batch(shard, [from_wire(row) for row in events])
    except LockTimeout:
        return {"retry": LOCK_TIMEOUT}
    except ServiceError as error:
        if error.reason.category in _TRANSIENT:
            return {"retry": error.reason.text}
        raise
    return {"applied": report.applied, "ignored": report.ignored, "dead": report.dead}


class CeleryBatches:
    """Sends batches as tasks and polls for their results. Implements ``event_lanes.Batches``."""

    def send(self, topic: str, shard: int, rows: Sequence[Sequence[Any]], expire_s: float) -> str:
        """See ``event_lanes.Batches.send``."""
        options: dict[str, Any] = {
            "queue": EVENTS_QUEUE,
            "expires": expire_s,
            # What Flower and the logs show. The arguments themselves are personal data.
            "kwargsrepr": f"{{shard {shard}: {len(rows)} × {topic}}}",
        }
        task = apply_events.signature(kwargs={"shard": shard, "events": rows}, **options)
        try:
            # Without a subscription: nobody reads a channel here, and results are polled, many in one round trip.
            with denied_join_result():
                result = task.apply_async()
        except (OperationalError, RedisError, OSError) as error:
            raise broker_unavailable() from error
        return str(result.id)

    def collect(self, batch_ids: Sequence[str]) -> Mapping[str, Outcome]:
        """See ``event_lanes.Batches.collect``."""
        backend: Any = app.backend
        keys = [backend.get_key_for_task(batch_id) for batch_id in batch_ids]
        outcomes: dict[str, Outcome] = {}
        try:
            for batch_id, payload in zip(batch_ids, backend.mget(keys), strict=True):
                meta = backend.decode_result(payload) if payload else None
                if meta and meta["status"] in states.READY_STATES:
                    outcomes[batch_id] = _outcome(meta)
            if outcomes:
                # If this is lost, the results expire.
                backend.client.delete(*(backend.get_key_for_task(batch_id) for batch_id in outcomes))
        except (RedisError, OSError) as error:
            raise broker_unavailable() from error
        return outcomes


def _outcome(meta: Mapping[str, Any]) -> Outcome:
    result = meta["result"]
    if meta["status"] != states.SUCCESS or not isinstance(result, dict):
        # A fault of ours, or a copy that expired in the queue: the worker's log has it. The events are not to blame.
        return TryAgain(Reason.INTERNAL.text)
    if "retry" in result:
        return TryAgain(result["retry"])
    return BatchReport(result["applied"], result["ignored"], tuple((index, reason) for index, reason in result["dead"]))
