"""How long calls have taken recently, and which calls are let in."""

from __future__ import annotations

import pytest

from segsvc.domain.errors import Reason
from segsvc.domain.pace import WAIT_MAX_S, Pace, fits, overloaded


def test_the_pace_follows_what_was_measured() -> None:
    pace = Pace()
    pace.took(2.0)
    assert pace.usual_s == 2.0
    pace.took(1.0)
    assert 1.8 < pace.usual_s < 2.0
    for _ in range(100):
        pace.took(0.5)
    assert pace.usual_s == pytest.approx(0.5, rel=0.01)


@pytest.mark.parametrize(
    ("wait_s", "usual_s", "left_s", "let_in"),
    [
        (0.0, 5.0, 0.1, True),  # its turn is now: it is tried
        (1.0, 0.5, 1.6, True),
        (1.0, 0.5, 1.4, False),
        (WAIT_MAX_S - 1, 0.5, None, True),
        (WAIT_MAX_S + 1, 0.5, None, False),
        (WAIT_MAX_S + 1, 0.5, 3600.0, False),
    ],
)
def test_which_work_is_let_in(wait_s: float, usual_s: float, left_s: float | None, let_in: bool) -> None:
    assert fits(wait_s, usual_s, left_s) is let_in


def test_a_refusal_says_when_to_come_back() -> None:
    assert overloaded("x", 0.0).retry_after_s == 0.5
    assert overloaded("x", 1.5, shard="2").retry_after_s == 1.5
    assert overloaded("x", 60.0).retry_after_s == 5.0
    assert overloaded("x", 1.5, shard="2").metadata == {"shard": "2"}
    assert overloaded("x", 1.5).reason is Reason.OVERLOADED
