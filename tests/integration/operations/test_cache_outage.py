"""The cache must be invalidated before an operation is DONE; these tests show what happens while it is away."""

from __future__ import annotations

from collections.abc import Callable

import pytest

from segsvc.domain.errors import Reason, ServiceError, cache_unavailable
from segsvc.domain.operation import Operation, OperationState
from tests.integration.operations.conftest import SHARDS, Rig, roll_out


def test_the_cache_is_patched_before_done_and_done_waits_for_it(rig: Rig) -> None:
    rig.create()

    operation = roll_out(rig, 10_000)
    rig.cache.error = cache_unavailable()

    with pytest.raises(ServiceError):
        rig.deliver()
    assert rig.state(operation) is OperationState.COMMITTED

    rig.cache.error = None
    rig.settle()
    assert rig.state(operation) is OperationState.DONE
    assert sorted(rig.cache.published) == list(range(SHARDS))
    assert rig.cache.dropped == []


def test_a_retry_publishes_only_what_is_not_published(rig: Rig) -> None:
    """Recovery comes every two seconds as long as one shard's cache is out of reach."""
    rig.create()
    operation = roll_out(rig, 10_000)
    rig.cache.away = {0}
    for _ in range(3):
        with pytest.raises(ServiceError):
            rig.coordinator.recover() if rig.cache.written else rig.deliver()
        assert rig.state(operation) is OperationState.COMMITTED
    assert sorted(rig.cache.published) == list(range(1, SHARDS))

    rig.cache.away = set()
    rig.settle()
    assert rig.state(operation) is OperationState.DONE
    assert sorted(rig.cache.published) == list(range(SHARDS))
    assert rig.cache.dropped == []


def test_a_patch_that_cannot_be_published_is_a_dropped_generation(rig: Rig) -> None:
    """As when the cache has no memory for it: it refuses the patch, and still takes a deletion."""
    rig.create()
    operation = roll_out(rig, 10_000)
    rig.cache.full = True
    rig.settle()
    assert rig.state(operation) is OperationState.DONE
    assert (sorted(rig.cache.dropped), rig.cache.published) == (list(range(SHARDS)), [])


def test_a_publisher_that_comes_late_leaves_the_cache_alone(rig: Rig) -> None:
    """It slept while a twin ended the operation, and while the next one was published: its patch is not read any more,
    and a warm cache must not go cold for it."""
    rig.create()
    operation = roll_out(rig, 10_000)
    rig.settle()
    late = rig.ledger.get(operation.id)
    assert late is not None
    roll_out(rig, 20_000)
    rig.settle()

    published = list(rig.cache.published)
    again = Rig(rig.installation, rig.databases)
    again.cache = rig.cache
    again.coordinator._invalidation = rig.cache
    again.coordinator._publish(late)
    again.close()
    assert (rig.cache.published, rig.cache.dropped) == (published, [])


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
