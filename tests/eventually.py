"""Waiting for a condition that comes true by itself."""

from __future__ import annotations

import time
from collections.abc import Callable


def eventually(condition: Callable[[], object], within_s: float = 30.0) -> None:
    """Return as soon as the condition holds; fail unless it does within the time."""
    end = time.monotonic() + within_s
    while not condition():
        assert time.monotonic() < end, f"did not come true within {within_s:g} s"
        time.sleep(0.02)
