"""Visits several shards at once, so that a shard out of reach delays only its own visit."""

from __future__ import annotations

from collections.abc import Callable, Sequence
from concurrent.futures import ThreadPoolExecutor
from typing import Final, TypeVar

T = TypeVar("T")
R = TypeVar("R")

SERVERS_AT_ONCE: Final = 16
"""The most threads that wait for servers which may be out of reach, where nothing else bounds their number."""


class ThreadFanOut:
    """Runs visits on threads of its own. Made after the last fork of a process.

    Args:
        threads: visits at once; more wait for their turn.
    """

    def __init__(self, threads: int) -> None:
        self._pool = ThreadPoolExecutor(max_workers=threads, thread_name_prefix="fan-out")

    def __call__(self, visit: Callable[[T], R], targets: Sequence[T], /) -> list[R]:
        """Results in the order of the targets. Raises the first error, after every visit has ended."""
        futures = [self._pool.submit(visit, target) for target in targets]
        errors = [error for future in futures if (error := future.exception()) is not None]
        if errors:
            raise errors[0]
        return [future.result() for future in futures]

    def close(self) -> None:
        self._pool.shutdown(wait=True)
