"""The model of the cache's patches holds, each of its rules is needed, and the simulated code behaves as the model."""

from __future__ import annotations

from dataclasses import fields, replace

import pytest

from tests.simulation import patch_model
from tests.simulation.cache_world import CacheWorld, known_sights
from tests.simulation.patch_model import Bounds, Rules, Sight, explore, stuck, wrong

KEEPS_IT_ALIVE = "lease_replaces_useless"
"""Without this rule no answer is wrong, but a user may never be a hit again."""
SCHEDULES = 1200
SHOWN_WITHIN = {
    "fresh_tokens": Bounds(operations=3, versions=0, publishers=2, reader=True),
    "list_has_an_end": Bounds(operations=3, patches=1),
    "ends_in_patch": Bounds(ending=1),
}
"""Where the smallest bounds do not show what a rule is for."""


@pytest.mark.parametrize(
    ("bounds", "states"),
    [
        (Bounds(operations=1), 2_000),
        (Bounds(versions=0, ending=1), 10_000),
        (Bounds(operations=1, versions=0, reader=True), 300),
    ],
    ids=["a change beside an operation", "an import that ends", "a reader that gets the patches late"],
)
def test_the_protocol_holds(bounds: Bounds, states: int) -> None:
    verdict = explore(Rules(), bounds)
    assert verdict.trace == ()
    assert verdict.states > states


@pytest.mark.long
@pytest.mark.parametrize(
    "bounds",
    [
        Bounds(calls=True),
        Bounds(ending=1),
        Bounds(ending=2),
        Bounds(publishers=2),
        Bounds(versions=2, loads=2),
        Bounds(operations=3, ending=1, patches=3),
        Bounds(operations=1, reader=True),
        Bounds(reader=True),
        Bounds(operations=3, versions=0, patches=1, reader=True),
    ],
    ids=str,
)
def test_the_protocol_holds_within_wider_bounds(bounds: Bounds) -> None:
    assert explore(Rules(), bounds).trace == ()


@pytest.mark.parametrize("rule", [field.name for field in fields(Rules)])
def test_each_rule_is_needed(rule: str) -> None:
    weakened = replace(Rules(), **{rule: False})
    bounds = SHOWN_WITHIN.get(rule, Bounds())
    if rule == KEEPS_IT_ALIVE:
        assert stuck(weakened, Bounds(versions=0)) is not None
        assert stuck(Rules(), Bounds(versions=0)) is None
        return

    trace = explore(weakened, bounds).trace
    assert wrong(trace[-1], weakened, bounds)
    assert not any(wrong(state, weakened, bounds) for state in trace[:-1])


def test_the_simulation_sees_all_that_the_model_knows(monkeypatch: pytest.MonkeyPatch) -> None:
    seen: set[Sight] = set()
    known = known_sights()
    real = patch_model.sight

    def noted(**what: object) -> Sight:
        made = real(**what)  # type: ignore[arg-type]
        seen.add(made)
        return made

    monkeypatch.setattr(patch_model, "sight", noted)

    for seed in range(SCHEDULES):
        CacheWorld(seed).run()
        if seen == known:
            return

    assert seen == known
