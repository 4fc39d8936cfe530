"""Waiting for operations to end: one thread reads the ledger for all that wait in this process."""

from __future__ import annotations

import threading
from collections.abc import Sequence
from concurrent.futures import Future
from contextlib import AbstractContextManager
from typing import Protocol
from uuid import UUID

from segsvc.domain.errors import ServiceError
from segsvc.domain.operation import Operation
from segsvc.log import get_logger

log = get_logger(__name__)


class EndListener(Protocol):
    """Listens for ends of operations. Both methods raise errors that the block turns into CATALOG_UNAVAILABLE."""

    def final_among(self, operation_ids: Sequence[UUID]) -> Sequence[Operation]:
        """Those of these operations that are DONE or ABORTED. Made to be called often."""

    def await_end(self, seconds: float) -> None:
        """Wait until an operation may have ended since the last read, at most this many seconds."""


class FinalOperations(Protocol):
    def listening(self) -> AbstractContextManager[EndListener]:
        """A listener for the block. Raises CATALOG_UNAVAILABLE, in the block too."""


class OperationEndWatcher:
    """Futures of operations' ends. One statement a round, however many calls wait; none while no call waits.

    A rollout takes a tenth of a second, and frequent reads would take processor time from it. So the ledger notifies
    the watcher when it is time to read.

    While the catalog is out of reach the waiters go on waiting, each until its own time is up.
    """

    _POLL_S = 0.05
    """Pause between two reads without a notification: for an operation that ended before its waiter came, and for
    notifications that are lost."""
    _OUTAGE_POLL_S = 0.5

    def __init__(self, store: FinalOperations) -> None:
        self._store = store
        self._waiting: dict[UUID, list[Future[Operation]]] = {}
        self._changed = threading.Condition()
        self._closed = False
        self._thread = threading.Thread(target=self._run, name="operation-ends", daemon=True)
        self._thread.start()

    def watch(self, operation_id: UUID) -> Future[Operation]:
        """A future that gets the operation once it is final; it is cancelled if the watcher is closed before."""
        future: Future[Operation] = Future()
        with self._changed:
            if self._closed:
                future.cancel()
                return future
            self._waiting.setdefault(operation_id, []).append(future)
            self._changed.notify()
        return future

    def close(self) -> None:
        """Stop; the futures of operations that have not ended are cancelled."""
        with self._changed:
            self._closed = True
            self._changed.notify()

        self._thread.join()
        for futures in self._waiting.values():
            for future in futures:
                future.cancel()

    def _run(self) -> None:
        while self._wanted(wait=True):
            try:
                with self._store.listening() as listener:
                    while wanted := self._wanted(wait=False):
                        self._hand_over(listener.final_among(wanted))
                        listener.await_end(self._POLL_S)
            except ServiceError as error:
                log.warning("watching_paused", reason=error.reason.text)
                self._pause(self._OUTAGE_POLL_S)
            except Exception:  # without this thread every waiting call would wait until its deadline
                log.exception("watching_failed")
                self._pause(self._OUTAGE_POLL_S)

    def _hand_over(self, ended: Sequence[Operation]) -> None:
        for operation in ended:
            with self._changed:
                futures = self._waiting.pop(operation.id, [])
            for future in futures:
                # False: the waiter has cancelled it.
                if future.set_running_or_notify_cancel():
                    future.set_result(operation)

    def _pause(self, seconds: float) -> None:
        with self._changed:
            self._changed.wait_for(lambda: self._closed, timeout=seconds)

    def _wanted(self, *, wait: bool) -> list[UUID]:
        """Operations that calls wait for; ``wait``: block until there are any. Empty: closed, or no call waits."""
        with self._changed:
            while not self._closed:
                for operation_id, futures in list(self._waiting.items()):
                    futures[:] = [future for future in futures if not future.cancelled()]
                    if not futures:
                        del self._waiting[operation_id]
                if self._waiting or not wait:
                    return list(self._waiting)
                self._changed.wait()
            return []
