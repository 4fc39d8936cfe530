"""Operations as their watchers see them: one read of the ledger serves all watchers of a process."""

from __future__ import annotations

import asyncio
import time
from collections.abc import AsyncGenerator, Mapping, Sequence
from concurrent.futures import Future
from dataclasses import dataclass, field
from typing import Final, Protocol
from uuid import UUID

import structlog

from grpc_api import call_scope
from grpc_api.call_scope import BlockingCalls
from segsvc.domain.errors import ServiceError, internal_error
from segsvc.domain.operation import Operation, ShardProgress
from segsvc.log import get_logger

INTERVAL_S: Final = 0.1
"""Shortest time between two messages of a watch, and between two reads of the ledger."""
PAUSE_MAX_S: Final = 0.4
"""Longest time between two reads while nothing changes; an operation's end is noticed at once."""
WATCHER_S: Final = 0.001
"""Time added to each pause for each watcher: a message to two thousand watchers takes a tenth of a second and more, and
must not keep the event loop from its other work."""
_METHOD: Final = "watching"

_log = get_logger(__name__)

View = tuple[Operation, Sequence[ShardProgress]]


class WatchedOperations(Protocol):
    def progress_of(self, operation_ids: Sequence[UUID]) -> Mapping[UUID, View]:
        """Those of these operations that exist, and how far each shard is. Raises CATALOG_UNAVAILABLE."""

    def watch_end(self, operation_id: UUID) -> Future[Operation]: ...


@dataclass(slots=True, eq=False)
class _Watched:
    """An operation that has watchers.

    Attributes:
        view: what was read last; None: nothing yet, or, if ``looked``, there is no such operation.
        failure: why the last read failed; None: it did not fail.
        changed: set when there is something new, and then replaced.
    """

    end: Future[Operation]
    watchers: int = 0
    view: View | None = None
    looked: bool = False
    failure: ServiceError | None = None
    changed: asyncio.Event = field(default_factory=asyncio.Event)

    def notify(self) -> None:
        """Wake all watchers that wait now."""
        self.changed.set()
        self.changed = asyncio.Event()


class OperationWatch:
    """Shares reads of operations among watchers. Used on the event loop alone."""

    def __init__(self, operations: WatchedOperations, blocking: BlockingCalls) -> None:
        self._operations = operations
        self._blocking = blocking
        self._watched: dict[UUID, _Watched] = {}
        self._looking: asyncio.Task[None] | None = None
        self._wake = asyncio.Event()

    async def follow(self, operation_id: UUID) -> AsyncGenerator[View | None]:
        """The operation as it is now, and again after each change, until it has ended; changes that follow each other
        too fast are combined. None: there is no such operation; nothing follows.

        Raises:
            ServiceError: CATALOG_UNAVAILABLE, OVERLOADED.
        """
        watched = self._enter(operation_id)
        shown: View | None = None

        try:
            while True:
                if watched.failure is not None:
                    raise watched.failure
                if watched.looked and (watched.view is None or watched.view != shown):
                    shown = watched.view
                    yield shown
                    if shown is None or shown[0].state.final:
                        return
                    continue  # it may have changed while the client took it
                await watched.changed.wait()
        finally:
            self._leave(operation_id, watched)

    def _enter(self, operation_id: UUID) -> _Watched:
        watched = self._watched.get(operation_id)
        if watched is None:
            watched = self._watched[operation_id] = _Watched(self._operations.watch_end(operation_id))
            loop = asyncio.get_running_loop()
            watched.end.add_done_callback(lambda _: loop.call_soon_threadsafe(self._wake.set))
            self._wake.set()
        watched.watchers += 1
        if self._looking is None:
            self._looking = asyncio.create_task(self._poll())
        return watched

    def _leave(self, operation_id: UUID, watched: _Watched) -> None:
        watched.watchers -= 1
        if not watched.watchers:
            self._watched.pop(operation_id, None)
            watched.end.cancel()

    async def _poll(self) -> None:
        """Read the ledger as long as there are watchers."""
        # This task serves no call: it has no deadline, and no client's request id.
        structlog.contextvars.clear_contextvars()

        pause_s = INTERVAL_S
        try:
            while self._watched:
                began = time.monotonic()
                self._wake.clear()
                call_scope.enter(call_scope.CallScope(_METHOD, "", began, None))
                changed = await self._look()
                pause_s = INTERVAL_S if changed else min(2 * pause_s, PAUSE_MAX_S)
                crowd_s = WATCHER_S * sum(watched.watchers for watched in self._watched.values())

                # An operation's end, or a new watcher, interrupts a long pause, but never makes reads follow too fast.
                await self._pause(pause_s + crowd_s)
                await asyncio.sleep(max(0.0, began + INTERVAL_S + crowd_s - time.monotonic()))
        finally:
            self._looking = None

    async def _look(self) -> bool:
        """Read all watched operations once. Returns whether anything has changed."""
        watched = dict(self._watched)

        try:
            views = await self._blocking.run(lambda _: self._operations.progress_of(list(watched)))
        except Exception as error:  # noqa: BLE001  # whatever the error is, watchers must not wait for ever
            if not isinstance(error, ServiceError):
                _log.exception("watching_failed")
            for one in watched.values():
                one.failure = error if isinstance(error, ServiceError) else internal_error()
                one.notify()
            return False

        changed = False
        for operation_id, one in watched.items():
            view = views.get(operation_id)
            if not one.looked or view != one.view or one.failure is not None:
                one.view, one.looked, one.failure = view, True, None
                one.notify()
                changed = True
        return changed

    async def _pause(self, seconds: float) -> None:
        try:
            async with asyncio.timeout(seconds):
                await self._wake.wait()
        except TimeoutError:
            pass
