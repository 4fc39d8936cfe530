"""Batches of user events: the task that applies a batch, and how the bridge sends batches and collects results."""

from __future__ import annotations

import itertools
import math
from collections.abc import Collection, Mapping, Sequence
from typing import Any, Final

from celery.result import denied_join_result
from celery.utils import uuid
from kombu.exceptions import OperationalError as PublishError
from redis.exceptions import RedisError, ResponseError

from segsvc.config import load_settings
from segsvc.domain.errors import LockTimeout, Reason, ServiceError, broker_unavailable
from segsvc.domain.events import UserEvent, from_wire, to_wire
from segsvc.log import get_logger
from segsvc.services.ingestion import OtherShards
from tasks.app import app, installation, runtime
from tasks.broker import refused
from tasks.outcomes import (
    BATCH_LOST,
    OUT_OF_MEMORY,
    OUTAGE,
    RESULT_BYTES_MAX,
    RESULT_REFUSED,
    WORKER_ENDED,
    BadResult,
    Outcome,
    TryAgain,
    read_result,
)
from tasks.queues import Queue

LOCK_TIMEOUT: Final = "LOCK_TIMEOUT"
"""Why a batch must come again: an operation held the shard for longer than ``lock_timeout_s``."""

OTHER_SHARDS: Final = "OTHER_SHARDS"
"""Why a batch must come again: its sender and this worker do not know the same number of shards. While shards are
doubled, one of them learns of it some moments before the other."""

EVENTS_MARGIN_S: Final = 60
"""How much longer the broker keeps a batch's events than its task: a worker that takes the task in its last moment
still finds them."""


RUNS_TTL_S: Final = 1800
"""How long the broker keeps the number of a batch's runs: longer than the bridge waits for any result."""

_SETUP_SQLSTATES: Final = ("25", "28", "3D", "42", "53", "57", "58", "F0", "XX")
"""SQLSTATE classes that say something about the database and nothing about the data: it is read-only after a failover,
refuses the login, lacks a table or a permission, or is damaged."""

log = get_logger(__name__)


# Not shown in Flower: several come each second, and would hide the rollouts there.
@app.task(name="segsvc.apply_events", send_events=False)
def apply_events(*, shard: int, batch: str) -> dict[str, Any]:
    """Apply a batch of events of one shard.

    An outage is reported in the result, not raised: the bridge holds the batch back and sends it again, and no worker
    waits meanwhile.

    Args:
        batch: the id under which ``CeleryBatches`` has put the events.

    Returns:
        ``{"applied", "ignored", "dead": [[index, reason], …]}``, or ``{"retry": reason}``: some events may be applied,
        and the whole batch must come again.
    """
    try:
        payload, runs = _begin(batch)
    except RedisError:
        return {"retry": Reason.BROKER_UNAVAILABLE.text}
    if runs > 1:
        # Celery has put the message back because the process that had begun it has ended. If an event is the cause, it
        # would end this process too, and the next: the bridge looks for it.
        return {"retry": WORKER_ENDED}
    if payload is None:
        return {"retry": BATCH_LOST}

    try:
        events = from_wire(payload)
    except ValueError:
        refused("unreadable", "the events of a batch", "they are not events", batch=batch, size=len(payload))
        return {"retry": BATCH_LOST}

    try:
        report = runtime().ingestion.apply_batch(shard, events)
    except LockTimeout:
        return {"retry": LOCK_TIMEOUT}
    except OtherShards as error:
        log.info("batch_of_other_shards", shard=shard, reason=str(error))
        return {"retry": OTHER_SHARDS}
    except ServiceError as error:
        # The bridge gives up an event that fails often enough with INTERNAL, so no other failure may become INTERNAL.
        if error.reason is Reason.INTERNAL:
            raise
        return {"retry": error.reason.text}
    except MemoryError:
        log.exception("batch_not_applied", shard=shard)
        return {"retry": OUT_OF_MEMORY}
    except Exception as error:
        if not _is_outage(error):
            raise
        log.exception("batch_not_applied", shard=shard)
        return {"retry": OUTAGE}
    return {"applied": report.applied, "ignored": report.ignored, "dead": report.dead}


def _is_outage(error: Exception) -> bool:
    """Whether a server, its set-up or the machine failed, so that no event can be the cause."""
    if isinstance(error, (RedisError, OSError)):
        return True
    # SQLAlchemy's errors contain the driver's error, which contains the code.
    code = getattr(getattr(error, "orig", error), "pgcode", None)
    return isinstance(code, str) and code.startswith(_SETUP_SQLSTATES)


def _broker() -> Any:
    """The client of the result backend, which uses the same server as the broker."""
    backend: Any = app.backend
    return backend.client


def _events_key(batch_id: str) -> str:
    return f"{installation(load_settings()).broker_prefix}events:{batch_id}"


def _runs_key(batch_id: str) -> str:
    """The key of the number of times that a worker process has begun a batch. A run that ends does not lower it: its
    result shows that it has ended."""
    return f"{installation(load_settings()).broker_prefix}runs:{batch_id}"


def _begin(batch_id: str) -> tuple[bytes | None, int]:
    """A batch's events (None: they are not there), and how often the batch has been begun, this time included."""
    runs_key = _runs_key(batch_id)
    with _broker().pipeline(transaction=False) as pipe:
        pipe.get(_events_key(batch_id))
        pipe.incr(runs_key)
        pipe.expire(runs_key, RUNS_TTL_S)
        payload, runs, _ = pipe.execute()
    return payload, runs


class CeleryBatches:
    """Sends batches as tasks and polls for their results. Implements ``segsvc.bridge.flows.Batches``.

    The events are not in the task's message, but under a key of their own on the broker. Celery decodes and encodes a
    message about six times on its way: for thousands of events that cost more than applying them.
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
            # Stored before the task is sent: it would not find them otherwise. They are deleted with the result, or
            # expire.
            _broker().set(_events_key(batch_id), to_wire(events), ex=math.ceil(expire_s) + EVENTS_MARGIN_S)
            # Without a subscription: this process reads no channel; it polls results, many in one round trip.
            with denied_join_result():
                task.apply_async()
        except (PublishError, RedisError, OSError) as error:
            raise broker_unavailable() from error
        return batch_id

    def collect(self, batch_ids: Sequence[str]) -> Mapping[str, Outcome]:
        """See ``segsvc.bridge.flows.Batches.collect``.

        Any client of the broker can write under these keys. A value that is not a result of ours is refused and
        deleted, and its batch is sent again.
        """
        backend: Any = app.backend
        outcomes: dict[str, Outcome] = {}
        try:
            keys = {batch_id: backend.get_key_for_task(batch_id) for batch_id in batch_ids}
            for batch_id, stored in zip(batch_ids, _stored(backend.client, list(keys.values())), strict=True):
                try:
                    outcome = _read(stored)
                except BadResult as error:
                    refused("unreadable", "the result of a batch", str(error), batch=batch_id)
                    outcome = TryAgain(RESULT_REFUSED)
                if outcome is not None:
                    outcomes[batch_id] = outcome
            if outcomes:
                # If this is lost, all of it expires.
                done = ((keys[batch_id], _events_key(batch_id), _runs_key(batch_id)) for batch_id in outcomes)
                backend.client.unlink(*itertools.chain.from_iterable(done))
        except (RedisError, OSError) as error:
            raise broker_unavailable() from error
        return outcomes

    def begun(self, batch_ids: Sequence[str]) -> Collection[str]:
        """See ``segsvc.bridge.flows.Batches.begun``."""
        try:
            with _broker().pipeline(transaction=False) as pipe:
                for batch_id in batch_ids:
                    pipe.exists(_runs_key(batch_id))
                found = pipe.execute()
        except (RedisError, OSError) as error:
            raise broker_unavailable() from error
        return {batch_id for batch_id, exists in zip(batch_ids, found, strict=True) if exists}


def _stored(client: Any, keys: Sequence[bytes]) -> list[bytes | ResponseError | None]:
    """The values under these keys, each cut to a bounded length; None: there is none.

    If a value is not a text, the server's error takes its place.
    """
    # In one transaction, so that the number of keys that exist belongs to these values.
    with client.pipeline(transaction=True) as pipe:
        for key in keys:
            pipe.getrange(key, 0, RESULT_BYTES_MAX)
        pipe.exists(*keys)
        *values, count = pipe.execute(raise_on_error=False)

    if isinstance(count, ResponseError):
        raise count
    # Only this number shows whether a key has an empty value or does not exist.
    empty = count > sum(value != b"" for value in values)
    return [
        value if value != b"" or (empty and client.exists(key)) else None
        for key, value in zip(keys, values, strict=True)
    ]


def _read(stored: bytes | ResponseError | None) -> Outcome | None:
    """The outcome in a key's value. Raises BadResult."""
    if stored is None:
        return None
    if isinstance(stored, ResponseError):
        if "WRONGTYPE" in str(stored):
            raise BadResult("its key holds no text")
        raise stored
    return read_result(stored)
