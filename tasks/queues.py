"""The queues. Each has workers of its own, so that events waiting for a shard's lock never keep a finalizer from
running."""

from __future__ import annotations

from typing import Final

OPERATIONS_QUEUE: Final = "operations"
EVENTS_QUEUE: Final = "events"
WARMING_QUEUE: Final = "warming"
QUEUES: Final = (OPERATIONS_QUEUE, EVENTS_QUEUE, WARMING_QUEUE)
