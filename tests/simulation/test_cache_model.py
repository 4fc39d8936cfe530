"""The model of a single entry's steps holds, and each of its rules is needed."""

from __future__ import annotations

from dataclasses import fields, replace

import pytest

from tests.simulation.cache_model import Bounds, Rules, explore, stuck

KEEPS_IT_ALIVE = {"lease_replaces_stale", "leases_end"}
"""Without one of these rules no answer is too old, but a user may never be a hit again."""


def test_the_protocol_holds() -> None:
    verdict = explore(Rules(), Bounds(loads=1, operations=1))
    assert verdict.trace == ()
    assert verdict.states > 50_000
    assert stuck(Rules(), Bounds(loads=1, versions=1, operations=1)) is None


@pytest.mark.long
def test_the_protocol_holds_with_two_loads_at_once() -> None:
    verdict = explore(Rules())
    assert verdict.trace == ()


@pytest.mark.parametrize("rule", [field.name for field in fields(Rules)])
def test_each_rule_is_needed(rule: str) -> None:
    weakened = replace(Rules(), **{rule: False})
    if rule in KEEPS_IT_ALIVE:
        assert stuck(weakened, Bounds(loads=1, versions=1, operations=1)) is not None
    else:
        trace = explore(weakened, Bounds(versions=1)).trace
        assert trace[-1].stale
        assert not any(state.stale for state in trace[:-1])
