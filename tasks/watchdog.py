"""Ends a process that does not finish ending, stands still, or takes no messages: a supervisor cannot see any of it.

Celery stops its parts in order, and some parts wait for other parts without a bound: after an unrecoverable error a
worker's main process can wait for a child for ever, while the child waits for a reader of its full pipe. The supervisor
still sees a live process. So a separate thread watches: a process that begins to end has ``END_WITHIN_S``, and a loop
that stands still, or takes no messages though it is connected, has ``STILL_MAX_S``; after that the thread kills the
children and ends the process at once. Their unfinished work is done again: a message is acknowledged only when its
effects are stored.
"""

from __future__ import annotations

import os
import signal
import threading
import time
from collections.abc import Callable, Iterable
from typing import Final

from tasks.pulse import Pulse

END_WITHIN_S: Final = 50.0
"""Shorter than supervisors wait before they kill, and long enough for two statements of an operation."""
STILL_MAX_S: Final = 120.0
"""Longer than anything that may block a loop, such as a few attempts with its servers' timeouts."""
EXIT_CODE: Final = 70
"""EX_SOFTWARE. Not 0, so that a supervisor that restarts only failed processes restarts it."""
_LOOK_EVERY_S: Final = 1.0


class Watchdog(threading.Thread):
    """Ends this process if it does not end itself, or no longer does its work.

    Args:
        pulses: of the loops that must do their work.
        children: process ids of what this process has forked.
        end_within_s: from the moment when the process begins to end.
        still_max_s: how long a loop may fail to do it.
        leave: ends the process at once, without running its exit handlers.
    """

    def __init__(
        self,
        *pulses: Pulse,
        children: Callable[[], Iterable[int]] = tuple,
        end_within_s: float,
        still_max_s: float,
        look_every_s: float = _LOOK_EVERY_S,
        leave: Callable[[int], object] = os._exit,
    ) -> None:
        super().__init__(name="watchdog", daemon=True)
        self._pulses = pulses
        self._children = children
        self._end_within_s = end_within_s
        self._still_max_s = still_max_s
        self._look_every_s = look_every_s
        self._leave = leave
        # A plain flag and no lock: a signal handler sets it, and may have interrupted the thread that holds the lock.
        self._ends = False

    def process_ends(self) -> None:
        """The process begins to end: its time starts. Safe to call again, and from a signal handler."""
        self._ends = True

    def run(self) -> None:
        """Thread body."""
        # Both times are counted in this thread's checks, not by the clock: when the process was stopped as a whole or
        # the machine slept, this thread did not check either, and the loop can make a round before the next check.
        still_s = ending_s = 0.0
        failures: list[str] = []
        while still_s < self._still_max_s and ending_s < self._end_within_s:
            time.sleep(self._look_every_s)
            ending_s = ending_s + self._look_every_s if self._ends else 0.0
            failures = [failure for pulse in self._pulses if (failure := pulse.failure()) is not None]
            still_s = still_s + self._look_every_s if failures else 0.0
        self._end(f"it has not ended within {ending_s:.0f} s" if self._ends else failures[0])

    def _end(self, why: str) -> None:
        # Straight to standard error: the loop that stands still may hold the log's lock.
        os.write(2, f'{{"event": "killed_by_its_watchdog", "level": "critical", "why": "{why}"}}\n'.encode())
        for pid in self._children():
            try:
                os.kill(pid, signal.SIGKILL)
            except ProcessLookupError:
                continue
        self._leave(EXIT_CODE)
