"""How long work has taken lately, so that work which cannot end in time is refused while the caller can still react."""

from __future__ import annotations

from typing import Final

from segsvc.domain.errors import Reason, ServiceError

_WEIGHT: Final = 0.1
"""Weight of the newest measurement. About the last twenty have an influence."""

WAIT_MAX_S: Final = 10.0
"""Longest expected wait with which a call is still accepted."""
_RETRY_MIN_S, _RETRY_MAX_S = 0.5, 5.0


class Pace:
    """Seconds that one unit of a kind of work has usually taken lately. Threads may share it: they may lose a value."""

    __slots__ = ("usual_s",)

    def __init__(self) -> None:
        self.usual_s = 0.0
        """0: nothing was measured yet."""

    def took(self, seconds: float) -> None:
        """Record that one more unit was done."""
        self.usual_s += (seconds - self.usual_s) * (_WEIGHT if self.usual_s else 1.0)


def fits(wait_s: float, usual_s: float, left_s: float | None) -> bool:
    """Whether work whose turn comes after ``wait_s`` ends in time. Work that need not wait always fits: it is tried.

    Args:
        left_s: time until the caller's deadline; None: no deadline.
    """
    return wait_s <= 0 or wait_s + usual_s <= (WAIT_MAX_S if left_s is None else min(left_s, WAIT_MAX_S))


def overloaded(message: str, wait_s: float, **metadata: str) -> ServiceError:
    """An OVERLOADED error with a time to retry: when the calls that wait now have been served."""
    retry_after_s = min(max(wait_s, _RETRY_MIN_S), _RETRY_MAX_S)
    return ServiceError(Reason.OVERLOADED, message, metadata, retry_after_s=retry_after_s)
