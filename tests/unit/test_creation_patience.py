"""A creation that waits for its turn answers within its caller's deadline, however long it pauses between checks."""

from __future__ import annotations

from collections.abc import Iterator
from itertools import chain, repeat
from typing import Protocol, cast
from unittest.mock import Mock

import pytest

from segsvc.domain.errors import Reason, ServiceError, catalog_unavailable
from segsvc.domain.operation import Accepted, Failure, Operation, OperationState
from segsvc.domain.segment import SegmentText
from segsvc.services.acceptance import Acceptance, AcceptanceStore
from segsvc.services.creations import Creations, CreationStore
from segsvc.services.operations import EndWatcher, OperationService, OperationStore
from segsvc.twophase.protocol import Coordinator
from tests.eventually import quick


class Ledger(AcceptanceStore, CreationStore, OperationStore, Protocol):
    """The methods that a front's services need."""


@pytest.fixture
def store() -> Mock:
    """Creations are accepted, and other operations are before them."""
    store = Mock(spec=Ledger)
    store.segment.return_value = None
    store.live_segments.return_value = 0
    store.draw_segment_id.return_value = 1
    store.start_next.return_value = None  # another operation is in flight, all the time
    store.get.return_value = Mock(spec=Operation, state=OperationState.QUEUED, failure=None)
    store.insert.return_value = Accepted(store.get.return_value)
    return store


@pytest.fixture
def creations(store: Mock) -> Iterator[Creations]:
    coordinator = Mock(spec=Coordinator)

    def abort(*_: object, **__: object) -> bool:
        queued = store.get.return_value
        queued.state, queued.failure = OperationState.ABORTED, Failure(Reason.OPERATION_QUEUE_BUSY.text, "busy")
        return True

    coordinator.abort.side_effect = abort
    shards = range(2)
    made = Creations(
        store=store,
        acceptance=Acceptance(store=store, coordinator=coordinator, broker=Mock(), costs=Mock()),
        operations=OperationService(store=store, watcher=cast(EndWatcher, Mock()), shards=shards),
        coordinator=coordinator,
        shards=shards,
        fan_out=Mock(),
    )

    yield made
    made.close()


def test_a_creation_gives_up_at_its_deadline_and_not_at_its_next_check(creations: Creations, store: Mock) -> None:
    def create_late() -> None:
        store.get.return_value.state, store.get.return_value.failure = OperationState.QUEUED, None
        with pytest.raises(ServiceError) as refused:
            creations.create_segment("late", SegmentText(), request=None, deadline_s=0.45)
        assert refused.value.reason is Reason.OPERATION_QUEUE_BUSY

    quick(create_late, within_s=0.6)  # it checks after 0.42 and 0.64 s


def test_a_process_that_holds_up_the_queue_does_not_end_the_wait(creations: Creations, store: Mock) -> None:
    store.start_next.side_effect = chain(
        [ServiceError(Reason.OVERLOADED, "held up"), ServiceError(Reason.OVERLOADED, "held up")], repeat(None)
    )
    with pytest.raises(ServiceError) as refused:
        creations.create_segment("late", SegmentText(), request=None, deadline_s=0.6)
    assert refused.value.reason is Reason.OPERATION_QUEUE_BUSY
    assert store.start_next.call_count > 3


def test_a_catalog_that_is_away_ends_it(creations: Creations, store: Mock) -> None:
    store.start_next.side_effect = catalog_unavailable()
    with pytest.raises(ServiceError) as refused:
        creations.create_segment("late", SegmentText(), request=None, deadline_s=5.0)
    assert refused.value.reason is Reason.CATALOG_UNAVAILABLE
