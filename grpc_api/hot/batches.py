"""Batches that wait for their turn on the lane's thread.

A batch is accepted only if its turn will come in time, judged by the sizes of the batches before it and by the present
speed of such batches. Without this, an overload would make the lane compute every batch after its deadline: more work
than ever, for clients that no longer wait.
"""

from __future__ import annotations

import time
from collections import deque

from grpc_api.call_scope import answer_by, deadline_exceeded
from grpc_api.hot.calls import Call
from segsvc.domain.pace import Pace, fits, overloaded


class WaitingBatches:
    """A queue of calls, for the lane's thread alone. A batch's cost is estimated by the bytes of its request."""

    def __init__(self) -> None:
        self._calls: deque[Call] = deque()
        self._bytes = 0
        self._pace = Pace()  # of one byte
        self._waited_since = 0.0
        """Since when the waiting batches wait, at least: the end of the last round; 0: none waited then."""

    def __bool__(self) -> bool:
        return bool(self._calls)

    def put(self, call: Call) -> None:
        """Queue a batch, or refuse it as OVERLOADED."""
        if call.gone:
            return

        size = len(call.payload)
        wait_s = self._bytes * self._pace.usual_s
        now = time.monotonic()
        left_s = None if call.deadline is None else answer_by(now, call.deadline) - now
        if not fits(wait_s, size * self._pace.usual_s, left_s):
            call.fail(overloaded("too many batches wait; this one would not have its turn in time", wait_s))
            return

        self._calls.append(call)
        self._bytes += size

    def pop(self) -> Call | None:
        """The next batch whose client still waits; None: there is none."""
        now = time.monotonic()
        while self._calls:
            call = self._calls.popleft()
            self._bytes -= len(call.payload)
            if call.gone:
                continue
            if call.deadline is None or call.deadline > now:
                return call
            call.fail(deadline_exceeded())
        return None

    def took(self, served: int, begun: float) -> None:
        """Note the end of a round of the lane.

        If batches waited since the round before, the work between the two rounds counts as well: the batches had to
        wait for both.

        Args:
            served: bytes of all requests in this round.
            begun: when the round began.
        """
        now = time.monotonic()
        if served:
            self._pace.took((now - (self._waited_since or begun)) / served)
        self._waited_since = now if self._calls else 0.0
