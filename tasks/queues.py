"""The queues. Each has workers of its own, so that events waiting for a shard's lock never keep a finalizer from
running."""

from __future__ import annotations

from enum import StrEnum
from typing import Final


class Queue(StrEnum):
    """The queues by name. A worker works on one of them (``segsvc worker --queue``)."""

    OPERATIONS = "operations"
    EVENTS = "events"
    WARMING = "warming"


QUEUES: Final = tuple(queue.value for queue in Queue)
"""Their names as Celery takes them."""
