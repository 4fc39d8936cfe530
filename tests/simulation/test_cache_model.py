"""The model of the cache protocol holds, each of its rules is needed, and the simulated code behaves as the model."""

from __future__ import annotations

from dataclasses import fields, replace

import pytest

from tests.simulation import cache_model
from tests.simulation.cache_model import Bounds, Rules, Sight, explore, stuck
from tests.simulation.cache_world import CacheWorld, known_sights

KEEPS_IT_ALIVE = {"lease_replaces_stale", "leases_end"}
"""Without one of these rules no answer is too old, but a user may never be a hit again."""
SCHEDULES = 600


def test_the_protocol_holds() -> None:
    verdict = explore(Rules(), Bounds(loads=1, operations=1))
    assert verdict.trace == ()
    assert verdict.states > 50_000
    assert verdict.sights == known_sights()
    assert stuck(Rules(), Bounds(loads=1, versions=1, operations=1)) is None


@pytest.mark.long
def test_the_protocol_holds_with_two_loads_at_once() -> None:
    verdict = explore(Rules())
    assert verdict.trace == ()
    assert verdict.sights == known_sights()


@pytest.mark.parametrize("rule", [field.name for field in fields(Rules)])
def test_each_rule_is_needed(rule: str) -> None:
    weakened = replace(Rules(), **{rule: False})
    if rule in KEEPS_IT_ALIVE:
        assert stuck(weakened, Bounds(loads=1, versions=1, operations=1)) is not None
    else:
        trace = explore(weakened, Bounds(versions=1)).trace
        assert trace[-1].stale
        assert not any(state.stale for state in trace[:-1])


def test_the_simulation_sees_all_that_the_model_knows(monkeypatch: pytest.MonkeyPatch) -> None:
    seen: set[Sight] = set()
    known = known_sights()
    real = cache_model.sight

    def noted(**what: object) -> Sight:
        made = real(**what)  # type: ignore[arg-type]
        seen.add(made)
        return made

    monkeypatch.setattr(cache_model, "sight", noted)

    for seed in range(SCHEDULES):
        CacheWorld(seed).run()
        if seen == known:
            return

    assert seen == known
