"""Signs of life of this process, which show whether it still does its work.

A port that answers proves nothing: a worker whose consumer has stopped still serves its metrics. So each process notes
here what it has just done; ``/health`` (beside its metrics), ``segsvc doctor`` and the watchdog read these notes.
"""

from __future__ import annotations

import threading
import time
from collections.abc import Callable
from typing import Final

ROUND_MAX_S: Final = 20.0
"""A loop that has made no round for this long stands still: each round takes a second or two, and the timeouts of its
servers bound how long a round can block."""
ANSWER_MAX_S: Final = 20.0
"""The broker answers a consumer that waits for messages every second, with a message or without."""


class Pulse:
    """What a process did last. Safe for any number of threads: each value is written by one thread.

    Args:
        round_max_s: a loop that has made no round for this long stands still; None: ``ROUND_MAX_S``.
        ended_max_s: how long a worker whose processes are all busy may go without ending a task.
        takes_messages: whether the process takes messages from the broker.
        clock: seconds, monotonic.
    """

    def __init__(
        self,
        *,
        round_max_s: float | None = None,
        ended_max_s: float = 0.0,
        takes_messages: bool = False,
        clock: Callable[[], float] = time.monotonic,
    ) -> None:
        self._clock = clock
        self._round_max_s = round_max_s
        self._ended_max_s = ended_max_s
        self._takes_messages = takes_messages
        self._lock = threading.Lock()
        self._waits_for: str | None = "it is starting"
        self._round_at = self._answered_at = self._ended_at = clock()
        self._has_room = True
        self.has_gone_round = False

    def begins(self) -> None:
        """The loop runs from now on."""
        with self._lock:
            self._waits_for = None
            self._round_at = self._answered_at = self._ended_at = self._clock()

    def waits(self, what: str) -> None:
        """The loop does not run, for a reason that is known: ``the broker cannot be reached``."""
        self._waits_for = what

    def went_round(self, *, has_room: bool = True) -> None:
        """The loop has made one more round.

        Args:
            has_room: whether it takes messages now; a worker whose processes are all busy does not.
        """
        now = self._clock()
        if not has_room or not self._has_room:
            # A worker without room does not ask the broker, so no answer is due until it has asked again.
            self._answered_at = now
        if has_room:
            self._ended_at = now
        self._has_room = has_room
        self._round_at = now
        self.has_gone_round = True

    def answered(self) -> None:
        """The broker has answered the consumer, with a message or without."""
        self._answered_at = self._clock()

    def ended(self) -> None:
        """A task has ended and its message was acknowledged."""
        self._ended_at = self._clock()

    def complaint(self) -> str | None:
        """What is wrong, in words; None: the process does its work."""
        return self._waits_for or self.failure()

    def failure(self) -> str | None:
        """What does not pass by itself: the loop should run and does not, or takes no messages. None: no such thing."""
        if self._waits_for is not None:
            return None

        now = self._clock()
        if now - self._round_at > (self._round_max_s or ROUND_MAX_S):
            return f"its loop has stood still for {now - self._round_at:.0f} s"
        if not self._takes_messages:
            return None

        if self._has_room and now - self._answered_at > ANSWER_MAX_S:
            return f"it has taken no message, and heard nothing from the broker, for {now - self._answered_at:.0f} s"
        if not self._has_room and now - self._ended_at > self._ended_max_s:
            return f"its processes are all busy, and none has ended a task for {now - self._ended_at:.0f} s"
        return None
