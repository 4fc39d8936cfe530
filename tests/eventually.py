"""Waiting for a condition that comes true by itself, and bounds of time that a busy machine does not break."""

from __future__ import annotations

import time
from collections.abc import Callable
from typing import Any


def eventually(condition: Callable[[], object], within_s: float = 30.0) -> None:
    """Return as soon as the condition holds; fail unless it does within the time."""
    end = time.monotonic() + within_s
    while not condition():
        assert time.monotonic() < end, f"did not come true within {within_s:g} s"
        time.sleep(0.02)


def seconds_of(call: Callable[[], Any]) -> float:
    """How long the call takes."""
    begun = time.monotonic()
    call()
    return time.monotonic() - begun


def quick(call: Callable[[], Any], within_s: float, attempts: int = 10) -> None:
    """Make the call until it takes less than the time; fail if no attempt does.

    A machine that has other work delays some attempts. Code that waits too long delays all of them.
    """
    took: list[float] = []
    while len(took) < attempts:
        took.append(seconds_of(call))
        if took[-1] < within_s:
            return
    raise AssertionError(f"no attempt took less than {within_s:g} s: {[round(each_s, 3) for each_s in took]}")
