"""Batches of user events: the task that applies one, and the bridge's way to send them and learn how they ended."""

from __future__ import annotations

import math
from collections.abc import Mapping, Sequence
from typing import Any, Final

from celery import states
from celery.result import denied_join_result
from celery.utils import uuid
from kombu.exceptions import OperationalError
from redis.exceptions import RedisError

from segsvc.config import load_settings
from segsvc.domain.errors import Category, LockTimeout, Reason, ServiceError, broker_unavailable
from segsvc.domain.events import UserEvent, from_wire, to_wire
from segsvc.services.ingestion import BatchReport
from tasks.app import app, installation, runtime
from tasks.outcomes import BATCH_LOST, Outcome, TryAgain
from tasks.queues import Queue

LOCK_TIMEOUT: Final = "LOCK_TIMEOUT"
"""Why a batch must come again: an operation held the shard for longer than ``lock_timeout_s``."""

EVENTS_MARGIN_S: Final = 60
"""How much longer the broker keeps a batch's events than its task: a worker that takes the task last finds them."""

_TRANSIENT: Final = (Category.UNAVAILABLE, Category.RESOURCE_EXHAUSTED, Category.DEADLINE_EXCEEDED)


# Not shown in Flower: some a second, they would bury the rollouts there.
@app.task(name="segsvc.apply_events", send_events=False)
def apply_events(*, shard: int, batch: str) -> dict[str, Any]:
    """Apply a batch of events of one shard.

    An outage is an answer, not an exception: the bridge holds the batch back and sends it again, and no worker
    is kept waiting meanwhile.

    Args:
        batch: the id under which ``CeleryBatches`` has put the events.

    Returns:
        ``{"applied", "ignored", "dead": [[index, reason], …]}``, or ``{"retry": reason}``: some of it may be done, all
        of it must come again.
    """
    try:
        payload = _broker().get(_events_key(batch))
    except RedisError:
        return {"retry": Reason.BROKER_UNAVAILABLE.text}
    if payload is None:
        return {"retry": BATCH_LOST}
    try:
        report = runtime().ingestion.apply_batch(shard, from_wire(payload))
    except LockTimeout:
        return {"retry": LOCK_TIMEOUT}
    except ServiceError as error:
        if error.reason.category in _TRANSIENT:
            return {"retry": error.reason.text}
        raise
    return {"applied": report.applied, "ignored": report.ignored, "dead": report.dead}


def _broker() -> Any:
    """The broker's client: that of the result backend, whose server is the same."""
    backend: Any = app.backend
    return backend.client


def _events_key(batch_id: str) -> str:
    return f"{installation(load_settings()).broker_prefix}events:{batch_id}"


class CeleryBatches:
    """Sends batches as tasks and polls for their results. Implements ``segsvc.bridge.flows.Batches``.

    The events themselves lie beside the task, under a key of the broker. Celery takes a message apart and writes it
    anew some six times on its way: for thousands of events that cost more than to apply them.
    """

    def send(self, topic: str, shard: int, events: Sequence[UserEvent], expire_s: float) -> str:
        """See ``segsvc.bridge.flows.Batches.send``."""
        batch_id = uuid()
        options: dict[str, Any] = {
            "task_id": batch_id,
            "queue": Queue.EVENTS.value,
            "expires": expire_s,
            # What the logs show.
            "kwargsrepr": f"{{shard {shard}: {len(events)} × {topic}}}",
        }
        task = apply_events.signature(kwargs={"shard": shard, "batch": batch_id}, **options)
        try:
            # Before the task, which would not find them. They go with the result, or by themselves when nobody comes.
            _broker().set(_events_key(batch_id), to_wire(events), ex=math.ceil(expire_s) + EVENTS_MARGIN_S)
            # Without a subscription: nobody reads a channel here, and results are polled, many in one round trip.
            with denied_join_result():
                task.apply_async()
        except (OperationalError, RedisError, OSError) as error:
            raise broker_unavailable() from error
        return batch_id

    def collect(self, batch_ids: Sequence[str]) -> Mapping[str, Outcome]:
        """See ``segsvc.bridge.flows.Batches.collect``."""
        backend: Any = app.backend
        keys = [backend.get_key_for_task(batch_id) for batch_id in batch_ids]
        outcomes: dict[str, Outcome] = {}
        try:
            for batch_id, payload in zip(batch_ids, backend.mget(keys), strict=True):
                meta = backend.decode_result(payload) if payload else None
                if meta and meta["status"] in states.READY_STATES:
                    outcomes[batch_id] = _outcome(meta)
            if outcomes:
                # If this is lost, all of it expires.
                backend.client.delete(
                    *(backend.get_key_for_task(batch_id) for batch_id in outcomes),
                    *(_events_key(batch_id) for batch_id in outcomes),
                )
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
