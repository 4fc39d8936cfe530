"""Several front processes behind one port, and the parent that only starts and stops them.

An event loop and its GIL use one core: using more cores takes more processes, which share the port with SO_REUSEPORT.
They are forked before any gRPC object, connection or thread exists, because none of these survives a fork.
"""

from __future__ import annotations

import contextlib
import os
import signal
import sys
import time
from collections.abc import Callable
from types import FrameType
from typing import NoReturn

from grpc_api import memory_watch
from segsvc.log import get_logger

STOP_BOUND_S = 20
"""A child that has not ended this long after SIGTERM is killed; longer than its own draining takes."""
YOUNG_S = 5.0
"""A child that fails sooner than this has wrong settings or no port: starting it again would not help."""
RESTART_PAUSE_S = 1.0
_STOP_SIGNALS = (signal.SIGTERM, signal.SIGINT)

_log = get_logger(__name__)


class PreforkParent:
    """Starts children, restarts those that die, and ends with them.

    Args:
        count: children to keep running.
        run: what a child does, given its number (0 … count - 1) and a file descriptor that becomes readable when the
            parent is gone; its result is the child's exit code.
    """

    def __init__(self, count: int, run: Callable[[int, int], int]) -> None:
        self._count = count
        # Nothing is ever written to the pipe: its end is the message, and it comes however the parent ends.
        self._parent_gone, self._parent_lives = os.pipe()
        self._run = run
        self._children: dict[int, tuple[int, float]] = {}
        self._stopping = False
        self._exit_code = 0

    def run(self) -> int:
        """Run the children until all have ended.

        Returns:
            The exit code: 0 after SIGTERM or SIGINT; after a child that failed within ``YOUNG_S``, that child's code.
        """
        for number in _STOP_SIGNALS:
            signal.signal(number, self._on_stop)
        signal.signal(signal.SIGALRM, self._on_bound)

        for index in range(self._count):
            self._start(index)

        while self._children:
            pid, status = os.wait()
            self._ended(pid, os.waitstatus_to_exitcode(status))

        signal.alarm(0)
        return self._exit_code

    def _start(self, index: int) -> None:
        # Signals are held back until both sides are ready: otherwise the child would run the parent's handlers, and a
        # signal that comes before the parent has noted the child would not be passed on to it.
        signal.pthread_sigmask(signal.SIG_BLOCK, _STOP_SIGNALS)
        try:
            if self._stopping:
                return
            pid = os.fork()
            if pid == 0:
                self._be_child(index)
            self._children[pid] = (index, time.monotonic())
        finally:
            signal.pthread_sigmask(signal.SIG_UNBLOCK, _STOP_SIGNALS)

    def _be_child(self, index: int) -> NoReturn:
        code = 1
        try:
            for number in (*_STOP_SIGNALS, signal.SIGALRM):
                signal.signal(number, signal.SIG_DFL)
            signal.pthread_sigmask(signal.SIG_UNBLOCK, _STOP_SIGNALS)
            os.close(self._parent_lives)
            code = self._run(index, self._parent_gone)
        except BaseException:  # noqa: BLE001  # the last act of this process is to log why
            _log.exception("front_process_failed", index=index)
        finally:
            sys.stdout.flush()
            sys.stderr.flush()
            # Not sys.exit: the child must not run the parent's frames and exit handlers.
            os._exit(code)

    def _ended(self, pid: int, code: int) -> None:
        index, begun = self._children.pop(pid)
        if self._stopping:
            return

        _log.error("front_process_ended", index=index, pid=pid, exit_code=code)
        if code != memory_watch.EXIT_CODE and time.monotonic() - begun < YOUNG_S:
            self._exit_code = code if code > 0 else 1
            self._stop()
            return

        time.sleep(RESTART_PAUSE_S)
        self._start(index)

    def _on_stop(self, number: int, frame: FrameType | None) -> None:
        self._stop()

    def _stop(self) -> None:
        self._stopping = True
        for pid in list(self._children):
            _signal(pid, signal.SIGTERM)
        signal.alarm(STOP_BOUND_S)

    def _on_bound(self, number: int, frame: FrameType | None) -> None:
        for pid in list(self._children):
            _signal(pid, signal.SIGKILL)


def _signal(pid: int, number: signal.Signals) -> None:
    with contextlib.suppress(ProcessLookupError):
        os.kill(pid, number)
