"""Watches the memory and the open files of a front process, and ends the connections that fill them.

The native front receives each message of a hot method whole, and inflates it, before its size can be checked
(docs/adr/0021-what-a-request-may-cost-in-memory.md). So the memory itself is checked often: a connection that sends
without end is cut, and a process that cannot be saved ends before its machine runs out of memory.
"""

from __future__ import annotations

import ctypes
import gc
import os
import resource
import threading
import time
from typing import Final

from grpc_api import connections
from segsvc.log import get_logger

LOOK_S: Final = 0.05
"""Time between two checks; the loopback device carries about 50 MB in it."""
LEAP_BYTES: Final = 32 << 20
"""If memory grows by more than this between two checks, messages are the cause: the busiest senders are searched."""
SENT_BYTES_MAX: Final = 4 << 20
"""While memory is short or leaps, a connection that sent more than this since the check before, or in a second, is cut:
500 times what the busiest gateway's connection sends in single reads."""
SECOND_S: Final = 1.0
LAST_RESORT: Final = 2
"""The process ends itself when it uses this multiple of the bound."""
TRIM_EVERY_S: Final = 10.0
SPARE_FILES: Final = 16
SPARE_PAUSE_S: Final = 0.001
CROWD_SHARE: Final = 0.25
"""When no more files can be opened, this share of the connections of the address with the most connections is cut.
Without free files no client's connection is accepted, and no new connection to PostgreSQL or the cache can be made."""
EXIT_CODE: Final = 75
"""Exit code of a process that ended itself because of its memory (EX_TEMPFAIL): start it again."""

_log = get_logger(__name__)
_PAGE_BYTES: Final = os.sysconf("SC_PAGE_SIZE")


class _OwnMemory:
    """Resident memory of this process. The file stays open, because later it may be impossible to open one."""

    def __init__(self) -> None:
        self._file = os.open("/proc/self/statm", os.O_RDONLY | os.O_CLOEXEC)

    def resident_bytes(self) -> int:
        return int(os.pread(self._file, 200, 0).split()[1]) * _PAGE_BYTES

    def close(self) -> None:
        os.close(self._file)


class _SpareFiles:
    """A few descriptors kept in reserve: with them the connections can be examined when no more files can be opened."""

    def __init__(self) -> None:
        self._kept: list[int] = []
        self.fill()

    def fill(self) -> bool:
        """Fill the reserve. Returns whether it is full and at least one more descriptor is free."""
        try:
            while len(self._kept) < SPARE_FILES:
                self._kept.append(os.open(os.devnull, os.O_RDONLY | os.O_CLOEXEC))
            os.close(os.dup(self._kept[0]))
        except OSError:
            return False
        return True

    def release(self) -> None:
        while self._kept:
            os.close(self._kept.pop())


def give_back() -> None:
    """Return free memory from the allocator to the machine: after a storm the allocator would keep it for ever."""
    gc.collect()  # refusals and their tracebacks hold each other, and the requests
    trim = getattr(ctypes.CDLL(None), "malloc_trim", None)
    if trim is not None:  # glibc's own
        trim(0)


class MemoryWatch:
    """A thread that checks this process's memory.

    Args:
        port: that clients connect to.
        bytes_max: beyond this, connections that send much are cut; at LAST_RESORT times this the process ends.
    """

    def __init__(self, port: int, bytes_max: int) -> None:
        self._port = port
        self._bytes_max = bytes_max
        self._closing = threading.Event()
        self._memory, self._spare = _OwnMemory(), _SpareFiles()
        self._before = self._trimmed_at = self._memory.resident_bytes()
        self._trim_again = self._collect_again = 0.0
        self._received: dict[tuple[str, int], int] | None = None
        self._received_at = 0.0
        self._thread = threading.Thread(target=self._run, name="memory-watch", daemon=True)

    def start(self) -> None:
        self._thread.start()

    def close(self) -> None:
        self._closing.set()
        self._thread.join()
        self._spare.release()
        self._memory.close()

    def _run(self) -> None:
        while not self._closing.wait(LOOK_S):
            try:
                self._look()
            except Exception:  # noqa: BLE001  # the watch must go on
                _log.exception("memory_watch_failed")

    def _look(self) -> None:
        if not self._spare.fill():
            self._make_room()

        resident, now = self._memory.resident_bytes(), time.monotonic()
        leap, self._before = resident - self._before, resident
        if resident > self._bytes_max and now >= self._collect_again:
            # First free what is no longer needed: no connection or process should end because of it.
            self._collect_again = now + SECOND_S
            give_back()
            self._before = resident = self._memory.resident_bytes()

        if resident > LAST_RESORT * self._bytes_max:
            # Nothing can stop a message that is being inflated, not even the end of its connection.
            _log.critical("memory_exhausted", resident_bytes=resident, bytes_max=self._bytes_max)
            os._exit(EXIT_CODE)

        if resident > self._bytes_max or leap > LEAP_BYTES:
            self._find_senders(resident, now)
        else:
            self._received = None

        self._give_back(resident, now)

    def _make_room(self) -> None:
        """Open files are at their limit: cut a share of the connections of the address that has the most."""
        self._spare.release()
        host, ended = connections.cut_crowd(self._port, CROWD_SHARE)

        # Fill the reserve again at once: the front accepts again within hundredths of a second, and would take all.
        end = time.monotonic() + LOOK_S
        while not self._spare.fill() and time.monotonic() < end:
            time.sleep(SPARE_PAUSE_S)
        limit = resource.getrlimit(resource.RLIMIT_NOFILE)[0]
        _log.error("connections_cut", address=host, connections=ended, why="no more files can be opened", limit=limit)

    def _find_senders(self, resident: int, now: float) -> None:
        """Cut connections by what they have sent since the first check of the last second that found memory short or
        leaping."""
        if self._received is None:
            self._received, self._received_at = connections.received(self._port), now
            return
        for peer in connections.cut_above(self._port, SENT_BYTES_MAX, self._received):
            _log.error("connection_cut", peer=peer, why="it sent too much", resident_bytes=resident)
        if now - self._received_at >= SECOND_S:
            self._received, self._received_at = connections.received(self._port), now

    def _give_back(self, resident: int, now: float) -> None:
        """Give memory back if it has grown since the last time, at most every ``TRIM_EVERY_S``."""
        if now < self._trim_again or resident - self._trimmed_at < LEAP_BYTES:
            return
        self._trim_again = now + TRIM_EVERY_S
        give_back()
        self._trimmed_at = self._before = self._memory.resident_bytes()
