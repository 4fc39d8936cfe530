"""Places for long calls: exports and watches. A number for all callers together, fewer for each caller."""

from __future__ import annotations

from collections import Counter
from collections.abc import Iterator
from contextlib import contextmanager
from typing import Final

from segsvc.domain.errors import Reason, ServiceError

RETRY_AFTER_S: Final = 2.0


class Places:
    """Bounds how many calls of a kind are open at once. Used on the event loop alone.

    Args:
        what: the calls, for the refusal.
        total: of all callers.
        per_caller: of one address; None: all places. Methods that the native front passes on to grpcio come from one
            address, the socket.
    """

    def __init__(self, what: str, *, total: int, per_caller: int | None = None) -> None:
        self._what = what
        self._total = total
        self._per_caller = per_caller if per_caller is not None else total
        self._taken: Counter[str] = Counter()

    @contextmanager
    def taken(self, peer: str) -> Iterator[None]:
        """Take a place for the duration of a ``with`` block.

        Args:
            peer: as gRPC names it, ``ipv4:10.0.0.1:5000``; the port differs for each connection.

        Raises:
            ServiceError: OVERLOADED: there is no free place.
        """
        caller = peer.rpartition(":")[0]
        if self._taken[caller] >= self._per_caller:
            raise self._refusal(f"{self._per_caller} {self._what} from one address")
        if self._taken.total() >= self._total:
            raise self._refusal(f"{self._total} {self._what}")

        self._taken[caller] += 1
        try:
            yield
        finally:
            self._taken[caller] -= 1
            if not self._taken[caller]:
                del self._taken[caller]

    @staticmethod
    def _refusal(bound: str) -> ServiceError:
        return ServiceError(
            Reason.OVERLOADED, f"{bound} are open in this process, which is the most", retry_after_s=RETRY_AFTER_S
        )
