"""Some thousand schedules of both protocols, and the proof that they would find a fault."""

from __future__ import annotations

import pytest

from tests.simulation.cache_world import CacheWorld
from tests.simulation.commit_world import World
from tests.simulation.run import MUTANTS, PROTOCOLS, simulate
from tests.simulation.scheduler import Violation

SCHEDULES = {"commit": 1200, "cache": 800}
# The first seed for a mutant: from it on, a schedule soon catches the mutant. Any first seed works, but later.
FIRST_SEED = {
    "rollback before the abort is recorded": 366,
    "a vote without the command tag": 150,
    "the ledger read before what is prepared": 200,
    "the lock under REPEATABLE READ": 400,
    "fill by any lease": 500,
    "who changed read before the bits": 900,
    "a late patch is appended": 180,
}
SEEDS_MAX = 2500


@pytest.mark.parametrize("protocol", sorted(PROTOCOLS))
def test_no_schedule_breaks_a_promise(protocol: str) -> None:
    tally = simulate(protocol, range(1_000_000, 1_000_000 + SCHEDULES[protocol]))
    assert tally.failures == []
    assert len(tally.fingerprints) > 0.9 * SCHEDULES[protocol], "they are different schedules"


def test_a_refused_decision_may_be_made_by_another_one() -> None:
    """It may come between an integrity error at the commit point and its abort: both outcomes occur and are right."""
    ended = set()
    for seed in range(300):
        world = World(seed)
        world.run()
        decided = world.catalog.decided_after_refusal
        ended |= {world.catalog.rows[one].state.name for one in decided}
        ended |= {world.catalog.rows[one].state.name for one in world.catalog.refused - decided}
    assert ended == {"DONE", "ABORTED"}


@pytest.mark.parametrize(("protocol", "mutant"), [(one, name) for one in sorted(MUTANTS) for name in MUTANTS[one]])
def test_a_mutant_is_caught(protocol: str, mutant: str) -> None:
    first = FIRST_SEED.get(mutant, 0)
    tally = simulate(protocol, range(first, first + SEEDS_MAX), mutant, stop=True)
    assert tally.failures, f"{mutant} survived {SEEDS_MAX} schedules"


@pytest.mark.parametrize("world", [World, CacheWorld])
def test_the_same_seed_gives_the_same_schedule(world: type[World | CacheWorld]) -> None:
    def fingerprint(seed: int) -> bytes:
        made = world(seed)
        made.run()
        return made.scheduler.fingerprint

    assert fingerprint(7) == fingerprint(7)
    assert fingerprint(7) != fingerprint(8)


def test_runs_without_faults_read_and_hit() -> None:
    world = CacheWorld(3)
    world.scheduler.faults = False
    world.run()
    assert world.hits.total() > 10
    assert world.reads > world.hits.total()


def test_a_violation_names_what_happened() -> None:
    world = World(1)
    world.catalog.rules[1] = 100  # the shards do not have this rule
    with pytest.raises(Violation, match=r"has the rules|does not come to rest"):
        world.run()
