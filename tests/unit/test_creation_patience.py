"""A creation that waits for its turn answers within its caller's time, whatever the pauses between two looks are."""

from __future__ import annotations

import time
from typing import cast
from unittest.mock import Mock

import pytest

from segsvc.domain.errors import Reason, ServiceError
from segsvc.domain.operation import Failure, Operation, OperationState
from segsvc.domain.segment import SegmentText
from segsvc.services.operations import EndWatcher, OperationService, OperationStore
from segsvc.twophase import Coordinator


def test_a_creation_gives_up_when_its_time_is_up_and_not_at_its_next_look() -> None:
    store, coordinator = Mock(spec=OperationStore), Mock(spec=Coordinator)
    store.segment.return_value = None
    store.live_segments.return_value = 0
    store.draw_segment_id.return_value = 1
    store.start_oldest.return_value = None  # another operation is in flight, all the time
    queued = Mock(spec=Operation, state=OperationState.QUEUED, failure=None)
    busy = Failure(Reason.OPERATION_QUEUE_BUSY.text, "busy")
    store.insert.return_value = store.get.return_value = queued

    def abort(*_: object, **__: object) -> bool:
        queued.state, queued.failure = OperationState.ABORTED, busy
        return True

    coordinator.abort.side_effect = abort
    service = OperationService(
        store=store,
        coordinator=coordinator,
        broker=Mock(),
        watcher=cast(EndWatcher, Mock()),
        shards=range(2),
        fan_out=Mock(),
    )
    begin = time.monotonic()
    with pytest.raises(ServiceError) as refused:
        # Its looks are after 0.42 and 0.64 s.
        service.create_segment("late", SegmentText(), request=None, deadline_s=0.45)
    assert time.monotonic() - begin < 0.6
    assert refused.value.reason is Reason.OPERATION_QUEUE_BUSY
    service.close()
