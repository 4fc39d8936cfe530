"""The part of PostgreSQL that the commit protocol relies on: transactions, locks that wait, and lost connections."""

from __future__ import annotations

from collections.abc import Callable, Iterator
from contextlib import contextmanager
from typing import TypeVar

from segsvc.domain.errors import LockTimeout, ServiceError
from tests.simulation.scheduler import Scheduler

T = TypeVar("T")
LOCK_TIMEOUT_S = 0.4


class Lock:
    """A lock that transactions hold, shared or exclusively, until they end."""

    def __init__(self) -> None:
        self.holders: dict[Transaction, bool] = {}

    def free_for(self, transaction: Transaction, exclusive: bool) -> bool:
        return not any(
            (exclusive or held_exclusively) for holder, held_exclusively in self.holders.items()
            if holder is not transaction
        )  # fmt: skip


class Transaction:
    """Its writes appear at its commit, and it holds locks until then. A prepared one outlives its session."""

    def __init__(self, server: Server) -> None:
        self._server = server
        self._locks: list[Lock] = []
        self._writes: list[Callable[[], None]] = []
        self.detached = False
        """Its session does not end it: it is prepared, or the server still executes its last statement."""
        self.ended = False

    def lock(self, lock: Lock, *, exclusive: bool = True, timeout_s: float = LOCK_TIMEOUT_S) -> None:
        """Wait for a lock. Raises LockTimeout."""
        if not self._server.scheduler.wait(lambda: lock.free_for(self, exclusive), timeout_s, "wait for a lock"):
            raise LockTimeout
        lock.holders[self] = lock.holders.get(self, False) or exclusive
        self._locks.append(lock)

    def write(self, effect: Callable[[], None]) -> None:
        self._writes.append(effect)

    def apply(self) -> None:
        for effect in self._writes:
            effect()
        self.end()

    def end(self) -> None:
        self.ended = True
        for lock in self._locks:
            lock.holders.pop(self, None)


class Server:
    """A server, to which statements are sent.

    Args:
        outage: makes the error that a client gets if its connection is lost.
    """

    def __init__(self, scheduler: Scheduler, name: str, outage: Callable[[], ServiceError]) -> None:
        self.scheduler = scheduler
        self.name = name
        self._outage = outage

    def ask(self, what: str, read: Callable[[], T]) -> T:
        """Execute a statement that changes nothing."""
        self.scheduler.pause(f"{self.name} {what}")
        if self.scheduler.chance(self.scheduler.rates.lost_request):
            raise self._outage()
        return read()

    def order(self, what: str, effect: Callable[[], T], transaction: Transaction | None = None) -> T:
        """Execute a statement with a permanent effect. It or its reply may be lost, or its effect may come late."""
        scheduler, rates = self.scheduler, self.scheduler.rates
        scheduler.pause(f"{self.name} {what}")
        if scheduler.chance(rates.lost_request):
            raise self._outage()

        if scheduler.chance(rates.late):
            scheduler.note(f"{self.name} {what} takes its time, and its client has gone")
            if transaction is not None:
                transaction.detached = True
            delay_s = scheduler.random.choice((0.05, 1.0, 7.0))
            scheduler.spawn(f"{self.name} server", lambda: (scheduler.sleep(delay_s), effect()), server=True)
            raise self._outage()

        result = effect()
        scheduler.pause(f"{self.name} {what} answered")
        if scheduler.chance(rates.lost_reply):
            raise self._outage()
        return result

    @contextmanager
    def transaction(self) -> Iterator[Transaction]:
        """Commit at the end of the block, unless the transaction is ended or prepared there."""
        made = Transaction(self)
        try:
            yield made
            if not made.ended and not made.detached:
                self.order("COMMIT", made.apply, made)
        finally:
            # Also when the process is killed: the server sees its connection close.
            if not made.ended and not made.detached:
                made.end()
