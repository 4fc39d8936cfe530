"""How long things take lately, so that what cannot be done in time is refused while its caller can still use that."""

from __future__ import annotations

from typing import Final

from segsvc.domain.errors import Reason, ServiceError

_WEIGHT: Final = 0.1
"""Of the newest measurement. Some twenty are remembered."""

WAIT_MAX_S: Final = 10.0
"""Longest wait that a caller without a deadline is let in for."""
_RETRY_MIN_S, _RETRY_MAX_S = 0.5, 5.0


class Pace:
    """Seconds that one unit of a kind of work has usually taken lately. For several threads that may lose a value."""

    __slots__ = ("usual_s",)

    def __init__(self) -> None:
        self.usual_s = 0.0
        """0: nothing has been measured."""

    def took(self, seconds: float) -> None:
        """One more was done."""
        self.usual_s += (seconds - self.usual_s) * (_WEIGHT if self.usual_s else 1.0)


def fits(wait_s: float, usual_s: float, left_s: float | None) -> bool:
    """Whether work whose turn comes after ``wait_s`` ends in time. Whatever has its turn at once does: it is tried.

    Args:
        left_s: what its caller has left; None: no deadline.
    """
    return wait_s <= 0 or wait_s + usual_s <= (WAIT_MAX_S if left_s is None else min(left_s, WAIT_MAX_S))


def overloaded(message: str, wait_s: float, **metadata: str) -> ServiceError:
    """An OVERLOADED that tells when to come back: when those who wait now have been served."""
    retry_after_s = min(max(wait_s, _RETRY_MIN_S), _RETRY_MAX_S)
    return ServiceError(Reason.OVERLOADED, message, metadata, retry_after_s=retry_after_s)
