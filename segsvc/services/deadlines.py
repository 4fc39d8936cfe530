"""Enforces the deadlines of operations in the fronts too: the queue goes on even if no worker does."""

from __future__ import annotations

import threading
from typing import Protocol

from segsvc.domain.errors import LockTimeout, ServiceError
from segsvc.log import get_logger

log = get_logger(__name__)


class LateOperations(Protocol):
    def abort_late_ones(self) -> None:
        """Abort operations that are PREPARING past their deadline, and start the next. Raises ServiceError,
        LockTimeout."""


class DeadlineKeeper:
    """A thread that aborts operations at their deadlines. It runs from the moment this is made.

    Recovery does the same, but another process runs it, which may be down or hang. Callers wait at a front, and a front
    needs only the catalog for this; so every operation that they wait for has an end as long as a front lives.

    Args:
        interval_s: pause between two checks.
    """

    def __init__(self, operations: LateOperations, *, interval_s: float) -> None:
        self._operations = operations
        self._interval_s = interval_s
        self._closed = threading.Event()
        self._thread = threading.Thread(target=self._run, name="deadlines", daemon=True)
        self._thread.start()

    def close(self) -> None:
        """Stop; returns when a check that is under way has ended."""
        self._closed.set()
        self._thread.join()

    def _run(self) -> None:
        while not self._closed.wait(self._interval_s):
            try:
                self._operations.abort_late_ones()
            except (ServiceError, LockTimeout) as error:
                # Without the catalog nothing can be decided, and the next check comes soon. Other alarms report the
                # catalog's outage.
                log.debug("deadlines_not_looked_at", reason=str(error))
            except Exception:  # without this thread the queue would stop while all workers hang
                log.exception("looking_at_deadlines_failed")
