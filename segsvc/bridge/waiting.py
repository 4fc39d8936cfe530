"""Outages in the log: a line when one begins or its reason changes, a line when it ends, none for each attempt."""

from __future__ import annotations

import logging
import time
from collections.abc import Callable

from segsvc.domain.event_records import Wait
from segsvc.log import get_logger

log = get_logger(__name__)


class Waits:
    """What this process is waiting for now. Used by one thread; any other thread may call ``now``."""

    def __init__(self, clock: Callable[[], float] = time.monotonic) -> None:
        self._clock = clock
        self._since: dict[Wait, tuple[str, float]] = {}

    def begins(self, what: Wait, reason: str) -> None:
        """Something cannot be done now."""
        known = self._since.get(what)
        if known is None or known[0] != reason:
            log.warning("waiting", what=str(what), reason=reason)
            self._since[what] = (reason, known[1] if known else self._clock())

    def ends(self, what: Wait) -> None:
        """The wait is over, if there was one."""
        known = self._since.pop(what, None)
        if known is not None:
            log.info("going_on", what=str(what), after_s=round(self._clock() - known[1], 1))

    def now(self) -> dict[Wait, str]:
        """What cannot be done now, and why."""
        return {what: reason for what, (reason, _) in self._since.copy().items()}


class Backoff:
    """When to try again: after growing delays, from ``first_s`` to ``most_s``."""

    def __init__(self, first_s: float, most_s: float) -> None:
        self._first_s = first_s
        self._most_s = most_s
        self._delay_s = first_s
        self.ready_at = 0.0
        self.failing = False

    def failed(self, now: float) -> None:
        self.failing = True
        self.ready_at = now + self._delay_s
        self._delay_s = min(self._delay_s * 2, self._most_s)

    def succeeded(self) -> None:
        self.failing = False
        self.ready_at = 0.0
        self._delay_s = self._first_s


class Sparse(logging.Handler):
    """Passes a library's log lines on, each kind at most once a minute: clients log every attempt to reconnect.

    A kind is a message before its arguments are filled in. Attach it to the library's logger, with propagation off.
    """

    _EVERY_S = 60.0

    def __init__(self, target: logging.Logger, level: int = logging.WARNING) -> None:
        super().__init__(level)
        self._target = target
        self._next: dict[str, float] = {}

    def emit(self, record: logging.LogRecord) -> None:
        """Pass the line on unless a line of its kind came within the last minute."""
        now = time.monotonic()
        kind = f"{record.name} {record.msg}"
        if now >= self._next.get(kind, 0.0):
            self._next[kind] = now + self._EVERY_S
            self._target.handle(record)
