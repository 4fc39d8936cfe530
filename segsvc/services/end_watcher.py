"""Waiting for operations to end: one thread polls the ledger for all who wait in this process."""

from __future__ import annotations

import threading
from collections.abc import Sequence
from concurrent.futures import Future
from typing import Protocol
from uuid import UUID

from segsvc.domain.errors import ServiceError
from segsvc.domain.operation import Operation
from segsvc.log import get_logger

log = get_logger(__name__)


class FinalOperations(Protocol):
    def final_among(self, operation_ids: Sequence[UUID]) -> Sequence[Operation]:
        """Those of these that are DONE or ABORTED. Raises CATALOG_UNAVAILABLE."""


class OperationEndWatcher:
    """Futures of operations' ends. One statement a round, however many wait; none when nobody does.

    While the catalog is out of reach the waiters go on waiting, each as long as it wants to.
    """

    _POLL_S = 0.01
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
        """Stop; whoever still waits is cancelled."""
        with self._changed:
            self._closed = True
            self._changed.notify()
        self._thread.join()
        for futures in self._waiting.values():
            for future in futures:
                future.cancel()

    def _run(self) -> None:
        while (wanted := self._wanted()) is not None:
            pause_s = self._POLL_S
            try:
                ended = self._store.final_among(wanted)
            except ServiceError as error:
                log.warning("watching_paused", reason=error.reason.text)
                pause_s, ended = self._OUTAGE_POLL_S, []
            for operation in ended:
                with self._changed:
                    futures = self._waiting.pop(operation.id, [])
                for future in futures:
                    # False: the waiter has given up.
                    if future.set_running_or_notify_cancel():
                        future.set_result(operation)
            with self._changed:
                self._changed.wait_for(lambda: self._closed, timeout=pause_s)

    def _wanted(self) -> list[UUID] | None:
        """Operations that somebody waits for, as soon as there are any; None: closed."""
        with self._changed:
            while not self._closed:
                for operation_id, futures in list(self._waiting.items()):
                    futures[:] = [future for future in futures if not future.cancelled()]
                    if not futures:
                        del self._waiting[operation_id]
                if self._waiting:
                    return list(self._waiting)
                self._changed.wait()
            return None
