"""A call's deadline and request id, and the threads on which blocking services run."""

from __future__ import annotations

import asyncio
import contextvars
import threading
import time
from collections.abc import Callable
from concurrent.futures import ThreadPoolExecutor
from contextvars import ContextVar
from dataclasses import dataclass
from typing import Final, TypeVar

from segsvc.domain.errors import Reason, ServiceError
from segsvc.domain.pace import Pace, fits, overloaded

T = TypeVar("T")

REQUEST_ID_KEY: Final = "x-request-id"
"""Metadata key of a call's id, in the request and in the answer."""
REQUEST_ID_CHARACTERS_MAX: Final = 128
"""A longer id is replaced, because every line of the log contains it."""

ANSWER_SHARE = 0.1
ANSWER_MIN_S = 0.2
"""A call that waits stops when the time left is less than the larger of this and a tenth of its deadline: its answer
must still reach the client. A call that works may go on until the time left is less than the smaller of the two."""


@dataclass(frozen=True, slots=True)
class CallScope:
    """One call while it is served.

    Attributes:
        method: full name, ``/package.Service/Method``.
        request_id: of ``x-request-id``, for logs and the client.
        start: ``time.monotonic()`` when it arrived.
        deadline: ``time.monotonic()`` when its client gives up; None: never.
        actor: name of the principal that makes it; empty: nobody has a name.
    """

    method: str
    request_id: str
    start: float
    deadline: float | None
    actor: str = ""

    def remaining_s(self) -> float | None:
        """Time left, possibly negative; None: no deadline."""
        return None if self.deadline is None else self.deadline - time.monotonic()

    def work_s(self) -> float | None:
        """Time left for work. It ends before the deadline, so that even a refusal reaches the client with its reason: a
        client whose deadline has passed learns nothing. Possibly negative; None: no deadline."""
        return None if self.deadline is None else answer_by(self.start, self.deadline) - time.monotonic()

    def patience_s(self) -> float | None:
        """Time left for waiting if the answer must still arrive in time; at least 0. None: no deadline."""
        if self.deadline is None:
            return None
        reserve_s = max(ANSWER_SHARE * (self.deadline - self.start), ANSWER_MIN_S)
        return max(0.0, self.deadline - reserve_s - time.monotonic())


def answer_by(start: float, deadline: float) -> float:
    """When the answer to a call that came at ``start`` must be sent; all by ``time.monotonic()``'s clock."""
    return deadline - min(ANSWER_SHARE * max(0.0, deadline - start), ANSWER_MIN_S)


_current: ContextVar[CallScope] = ContextVar("call")


def enter(call: CallScope) -> None:
    """Make a call the current one of this task, for as long as the task lives: a task serves one call."""
    _current.set(call)


def current() -> CallScope:
    """The call that this task serves."""
    return _current.get()


def deadline_exceeded() -> ServiceError:
    return ServiceError(Reason.DEADLINE_EXCEEDED, "there was no answer within the call's deadline")


class BlockingCalls:
    """Runs blocking service calls of one kind on threads of its own, so that the event loop never waits, and calls of
    another kind do not wait for these.

    A call gets a place only if its turn will come in time, judged by the number of waiting calls and the usual time of
    such calls. Otherwise the deadlines of accepted calls would pass before their turn, and all calls would be late
    because of work for clients that no longer wait.

    Args:
        name: of the threads.
        threads: most calls that run at once.
        waiting_max: most calls that wait for a thread, whatever their deadlines.
        bound_s: the sessions' own bound of a statement; a longer deadline does not raise it.
    """

    def __init__(self, name: str, *, threads: int, waiting_max: int, bound_s: float) -> None:
        self._pool = ThreadPoolExecutor(max_workers=threads, thread_name_prefix=name)
        self._bound_s = bound_s
        self._threads = threads
        self._places = threads + waiting_max
        self._taken = 0
        self._lock = threading.Lock()
        self._pace = Pace()

    async def run(self, work: Callable[[float | None], T]) -> T:
        """Run ``work(time left)`` for the current call and return its result. The time left is None if the call has no
        deadline, or one later than the sessions' own bound.

        If the call is cancelled or its time is up while it waits for a thread, the work never begins. Work that has
        begun ends by itself, within the bounds of its statements, and its result is dropped.

        Raises:
            ServiceError: OVERLOADED, at once; DEADLINE_EXCEEDED if there is no result in time, because no thread was
                free or because a server hangs; and all errors of the work.
        """
        self._take_place(current())

        try:
            future = self._pool.submit(contextvars.copy_context().run, self._begin, current(), work)
        except BaseException:
            # No future gives the place back: the pool is closed, or no thread could be started.
            self._leave(None)
            raise
        # Also called if the future is cancelled before its work begins.
        future.add_done_callback(self._leave)

        time_up = asyncio.timeout(self._end_s(current()))
        try:
            async with time_up:
                return await asyncio.wrap_future(future)
        except TimeoutError:
            if not time_up.expired():  # the work itself raised it
                raise
            raise deadline_exceeded() from None

    @staticmethod
    def _end_s(call: CallScope) -> float | None:
        """Half way between the end of the work's time and the deadline: the work's own error says more than
        DEADLINE_EXCEEDED does, and comes just after the work's time."""
        work_s, remaining_s = call.work_s(), call.remaining_s()
        return None if work_s is None or remaining_s is None else (work_s + remaining_s) / 2

    def close(self) -> None:
        """Release the threads; calls that have begun still run to their end."""
        self._pool.shutdown(wait=False, cancel_futures=True)

    def _take_place(self, call: CallScope) -> None:
        """Raises ServiceError OVERLOADED, DEADLINE_EXCEEDED."""
        left_s = call.work_s()
        if left_s is not None and left_s <= 0:
            raise deadline_exceeded()
        with self._lock:
            usual_s = self._pace.usual_s
            wait_s = max(0, self._taken - self._threads + 1) * usual_s / self._threads
            if self._taken < self._places and fits(wait_s, usual_s, left_s):
                self._taken += 1
                return
        raise overloaded("too many calls wait; this one would not have its turn in time", wait_s)

    def _leave(self, _: object) -> None:
        with self._lock:
            self._taken -= 1

    def _begin(self, call: CallScope, work: Callable[[float | None], T]) -> T:
        left_s = call.work_s()
        if left_s is not None and left_s <= 0:
            raise deadline_exceeded()
        begun = time.monotonic()
        try:
            return work(None if left_s is None or left_s > self._bound_s else left_s)
        finally:
            self._pace.took(time.monotonic() - begun)
