"""Deadlines of operations, kept by the fronts too: the queue goes on even if no worker does."""

from __future__ import annotations

import threading
from typing import Protocol

from segsvc.domain.errors import LockTimeout, ServiceError
from segsvc.log import get_logger

log = get_logger(__name__)


class LateOperations(Protocol):
    def abort_late_ones(self) -> None:
        """Abort what is PREPARING past its deadline, and start the next. Raises ServiceError, LockTimeout."""


class DeadlineKeeper:
    """A thread that aborts operations at their deadlines, from the moment it is made.

    Recovery does the same. But recovery is a message to a worker, and all workers may hang, or the broker. Callers wait
    at a front, and a front needs the catalog alone for this; so what they wait for has an end while a front lives.

    Args:
        interval_s: how often to look.
    """

    def __init__(self, operations: LateOperations, *, interval_s: float) -> None:
        self._operations = operations
        self._interval_s = interval_s
        self._closed = threading.Event()
        self._thread = threading.Thread(target=self._run, name="deadlines", daemon=True)
        self._thread.start()

    def close(self) -> None:
        """Stop; returns when a look that is under way has ended."""
        self._closed.set()
        self._thread.join()

    def _run(self) -> None:
        while not self._closed.wait(self._interval_s):
            try:
                self._operations.abort_late_ones()
            except (ServiceError, LockTimeout) as error:
                # Without the catalog nothing can be decided, and the next look is near. Its outage has alarms enough.
                log.debug("deadlines_not_looked_at", reason=str(error))
            except Exception:  # the queue would stand still without this thread, when all workers hang
                log.exception("looking_at_deadlines_failed")
