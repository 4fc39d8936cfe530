"""PostgreSQL servers die, or have no room, at the moments at which an operation depends on them."""

from __future__ import annotations

import pytest

from segsvc.cli.doctor.doubt import in_doubt
from tests.eventually import eventually
from tests.infrastructure.system import ALONE, SHARDS, System

EVERYWHERE = set(range(SHARDS))


def test_a_shards_server_dies_while_it_is_prepared(system: System, slug: str) -> None:
    system.new_segment(slug, 20)

    with system.armed("prepared-not-voted", f"hold shard={ALONE}") as point:
        name = system.client.start_roll_out(slug, 60)
        point.await_fired()
        eventually(lambda: system.votes(name) == EVERYWHERE - {ALONE})
        system.alone.kill()
        point.kill()  # the task dies with its server: no process is left that knows that this shard is prepared
        assert system.state(name) == "PREPARING"
        system.alone.start()

    # The prepared transaction has survived; recovery finds it and votes for it. No work is done again.
    eventually(lambda: system.state(name) == "DONE")
    system.expect_well(slug, 60)


@pytest.mark.infrastructure
def test_the_server_of_two_shards_dies_while_all_are_prepared_and_comes_back_late(system: System, slug: str) -> None:
    system.new_segment(slug, 20)

    with system.armed("before-decision") as point:
        name = system.client.start_roll_out(slug, 60)
        point.await_fired()
        assert system.prepared_on(name) == EVERYWHERE
        seen = system.log_ends()
        system.together.kill()

    # All votes are in: the operation is decided without the shards, and then waits for them.
    eventually(lambda: system.state(name) == "COMMITTED")
    eventually(lambda: system.fenced_on(name, [ALONE]) == {ALONE})
    eventually(lambda: "recovery_incomplete" in system.logged(seen))
    assert system.state(name) == "COMMITTED"

    system.together.start()
    eventually(lambda: system.state(name) == "DONE")
    system.expect_well(slug, 60)


@pytest.mark.infrastructure
def test_a_shard_that_stays_away_costs_the_operation_and_nothing_else(system: System, slug: str) -> None:
    system.new_segment(slug, 20)

    system.alone.kill()
    name = system.client.start_roll_out(slug, 60)
    eventually(lambda: system.votes(name) == EVERYWHERE - {ALONE})

    # The deadline passes while the shard is still away.
    system.execute_catalog("UPDATE operations SET deadline = now() WHERE state = 'PREPARING'")
    eventually(lambda: system.state(name) == "ABORTED")

    others = [shard for shard in EVERYWHERE if shard != ALONE]
    eventually(lambda: not any(system.installation.prepared(shard) for shard in others))

    system.alone.start()
    system.expect_well(slug, 20)


def told(system: System) -> list[str]:
    """The findings of ``segsvc doctor`` about transactions in doubt."""
    return [item.text for item in in_doubt(system.settings)]


@pytest.mark.parametrize("dies", [ALONE, pytest.param(0, marks=pytest.mark.infrastructure)])
def test_a_shards_server_dies_when_some_are_committed(system: System, slug: str, dies: int) -> None:
    system.new_segment(slug, 20)

    with system.armed("before-commit-prepared", f"hold shard={dies}") as point:
        name = system.client.start_roll_out(slug, 60)
        point.await_fired()
        eventually(lambda: system.fenced_on(name) == EVERYWHERE - {dies})
        system.server_of(dies).kill()

    # The operation is decided, visible on the other shards, and cannot be undone: it waits for the dead shard.
    left = [shard for shard in EVERYWHERE if system.server_of(shard) is not system.server_of(dies)]
    assert system.fenced_on(name, left) == set(left)
    assert system.state(name) == "COMMITTED"

    gone = sorted(EVERYWHERE - set(left))
    shards = f"{'shards' if gone[1:] else 'shard'} {', '.join(f'{shard} (out of reach)' for shard in gone)}"
    assert any(f"not known to be committed on {shards}; recovery" in text for text in told(system))

    system.server_of(dies).start()
    eventually(lambda: system.state(name) == "DONE")
    system.expect_well(slug, 60)


@pytest.mark.parametrize(
    ("point", "before", "decided"),
    [
        ("prepared-not-voted", "PREPARING", False),
        pytest.param("before-decision", "PREPARING", False, marks=pytest.mark.infrastructure),
        pytest.param("invalidated-not-done", "COMMITTED", True, marks=pytest.mark.infrastructure),
    ],
)
def test_the_catalog_dies(system: System, slug: str, point: str, before: str, decided: bool) -> None:
    in_doubt_on = set() if decided else EVERYWHERE
    system.new_segment(slug, 20)

    with system.armed(point) as held:
        name = system.client.start_roll_out(slug, 60)
        held.await_fired()
        # The point fires on the first shard that reaches it; the other shards may not be there yet.
        eventually(lambda: system.prepared_on(name) == in_doubt_on)
        assert system.state(name) == before
        seen = system.log_ends()
        system.catalog.kill()

    # Prepared transactions stay while the catalog cannot be asked, however often recovery runs; reads go on.
    eventually(lambda: "CATALOG_UNAVAILABLE" in system.logged(seen))
    looked = system.log_ends()
    eventually(lambda: system.logged(looked).count("recovery_incomplete") > 1)
    assert system.prepared_on(name) == in_doubt_on

    undecided = [text for text in told(system) if "the catalog, which alone decides, cannot be read" in text]
    assert len(undecided) == len(in_doubt_on)
    assert system.read(slug) == system.members(slug, 60 if decided else 20, asked=0)

    system.catalog.start()
    eventually(lambda: system.state(name) == "DONE")
    system.expect_well(slug, 60)


def test_no_slot_is_free_for_another_prepared_transaction(system: System, slug: str) -> None:
    system.new_segment(slug, 20)
    taken = [f"taken-{n}" for n in range(int(system.alone.psql("SHOW max_prepared_transactions")))]
    system.alone.psql("".join(f"BEGIN; SELECT txid_current(); PREPARE TRANSACTION '{gid}';\n" for gid in taken))

    try:
        seen = system.log_ends()
        name = system.client.start_roll_out(slug, 60)
        eventually(lambda: system.votes(name) == EVERYWHERE - {ALONE})
        eventually(lambda: "SHARD_UNAVAILABLE" in system.logged(seen))
        assert system.state(name) == "PREPARING"
        assert system.prepared_on(name) == EVERYWHERE - {ALONE}
    finally:
        system.alone.psql("".join(f"ROLLBACK PREPARED '{gid}';\n" for gid in taken))

    eventually(lambda: system.state(name) == "DONE")
    system.expect_well(slug, 60)
