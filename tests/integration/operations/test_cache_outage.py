"""The cache must be invalidated before an operation is DONE; these tests show what happens while it is away."""

from __future__ import annotations

from collections.abc import Callable

import pytest

from segsvc.domain.errors import Reason, ServiceError, cache_unavailable
from segsvc.domain.operation import Operation, OperationState
from tests.integration.operations.conftest import SHARDS, Rig, roll_out


def test_the_cache_is_dropped_before_done_and_done_waits_for_it(rig: Rig) -> None:
    rig.create()
    rig.cache.dropped.clear()

    operation = roll_out(rig, 10_000)
    rig.cache.error = cache_unavailable()

    with pytest.raises(ServiceError):
        rig.deliver()
    assert rig.state(operation) is OperationState.COMMITTED

    rig.cache.error = None
    rig.settle()
    assert rig.state(operation) is OperationState.DONE
    assert rig.cache.dropped == list(range(SHARDS))


def test_one_cache_server_that_is_away_keeps_no_other_shards_entries_cold(rig: Rig) -> None:
    """Recovery comes again and again: each time it drops only what is not dropped yet."""
    rig.create()
    rig.cache.dropped.clear()
    operation = roll_out(rig, 10_000)
    rig.cache.error, rig.cache.down = cache_unavailable(), frozenset({0})

    for attempt in (rig.deliver, rig.coordinator.recover, rig.coordinator.recover):
        with pytest.raises(ServiceError):
            attempt()
        assert rig.state(operation) is OperationState.COMMITTED
        assert rig.cache.dropped == list(range(1, SHARDS))

    rig.cache.error = None
    rig.settle()
    assert rig.state(operation) is OperationState.DONE
    assert sorted(rig.cache.dropped) == list(range(SHARDS))

    rig.cache.dropped.clear()
    roll_out(rig, 20_000)
    rig.settle()
    assert rig.cache.dropped == list(range(SHARDS))


def test_a_creation_changes_no_list_and_needs_no_cache(rig: Rig) -> None:
    rig.cache.error = cache_unavailable()
    rig.create()
    assert rig.ledger.segment("checkout") is not None
    rig.cache.error = None
    assert rig.cache.dropped == []


def test_without_a_cache_an_operation_is_done_when_no_old_entry_can_be_left(rig: Rig) -> None:
    rig.create()
    operation = roll_out(rig, 10_000)
    following = roll_out(rig, 20_000)
    rig.cache.error = cache_unavailable()

    with pytest.raises(ServiceError):
        rig.deliver()
    # The operation was decided long ago, but the commits of the shards have been known only for a short time.
    backdate(rig, operation, "commit_time", 10 * rig.cache.entries_gone_after_s)
    for waited_s in (0, rig.cache.entries_gone_after_s - 60):
        backdate(rig, operation, "shards_committed_time", waited_s)
        with pytest.raises(ServiceError) as caught:
            rig.coordinator.recover()
        assert caught.value.reason is Reason.CACHE_UNAVAILABLE
        assert rig.state(operation) is OperationState.COMMITTED

    backdate(rig, operation, "shards_committed_time", rig.cache.entries_gone_after_s + 1)
    rig.coordinator.recover()
    assert [rig.state(operation), rig.state(following)] == [OperationState.DONE, OperationState.PREPARING]

    rig.cache.error = None
    rig.settle()
    rig.check_invariants()


def backdate(rig: Rig, operation: Operation, column: str, seconds: float) -> None:
    rig.installation.execute(
        None,
        f"UPDATE operations SET {column} = clock_timestamp() - make_interval(secs => :s) WHERE id = :id",
        s=seconds,
        id=operation.id,
    )


def test_the_wait_for_a_cache_begins_when_the_last_shard_has_committed(
    rig: Rig, arm: Callable[[str, str], None]
) -> None:
    rig.create()
    operation = roll_out(rig, 10_000)

    rig.cache.error = cache_unavailable()
    arm("before-commit-prepared", "fail shard=1")
    rig.deliver()

    query = "SELECT state, shards_committed_time IS NOT NULL AS noted FROM operations WHERE id = :id"
    assert rig.installation.execute(None, query, id=operation.id) == [("COMMITTED", False)]

    arm("before-commit-prepared", "")
    for _ in range(2):
        with pytest.raises(ServiceError):
            rig.coordinator.recover()
        assert rig.installation.execute(None, query, id=operation.id) == [("COMMITTED", True)]

    [first] = rig.installation.execute(None, "SELECT shards_committed_time FROM operations ORDER BY seq DESC LIMIT 1")
    assert rig.ledger.all_shards_committed(operation.id) > 0

    rig.cache.error = None
    rig.settle()

    [last] = rig.installation.execute(None, "SELECT shards_committed_time FROM operations ORDER BY seq DESC LIMIT 1")
    assert first == last
    assert rig.ledger.all_shards_committed(operation.id) == 0
