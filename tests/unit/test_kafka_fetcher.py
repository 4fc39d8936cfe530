"""What the bridge's consumer changes in kafka-python, and whether those parts of kafka-python are still the same."""

from __future__ import annotations

import hashlib
import inspect
from collections.abc import Callable
from typing import Any

import kafka
import pytest
from kafka import TopicPartition
from kafka.consumer.fetcher import Fetcher
from kafka.consumer.subscription_state import TopicPartitionState
from kafka.record.legacy_records import LegacyRecordBatch
from kafka.record.memory_records import MemoryRecords

from segsvc.bridge import event_watch
from segsvc.bridge.event_watch import loss_of
from segsvc.bridge.fetcher import REST_S, TRIES, Reset, Trials
from segsvc.domain.event_records import EventLoss, EventPosition

WHERE = TopicPartition("create-user", 3)


@pytest.mark.parametrize(
    ("method", "digest"),
    [
        (Fetcher.fetched_records, "bf91319f1a2fda46"),
        (Fetcher._append, "341c09c715c59d8b"),
        (Fetcher._parse_fetched_data, "3cd93b6d3b7b96e1"),
        (Fetcher._reset_offset_if_needed, "efb40736761169f4"),
        (Fetcher.PartitionRecords, "cf2214c6a21884be"),
        (TopicPartitionState.reset, "48f492029908a30c"),
        (LegacyRecordBatch.__iter__, "993c55f9dcb40d38"),
        (MemoryRecords.__init__, "ebf098b8ae19659e"),
    ],
    ids=lambda value: getattr(value, "__qualname__", ""),
)
def test_kafka_python_is_what_the_fetcher_was_written_for(method: Callable[..., Any], digest: str) -> None:
    """If this fails, kafka-python has changed: read what is new in that method, adapt ``segsvc.bridge.fetcher`` and
    ``segsvc.bridge.batches`` if necessary, and only then write the new digest here."""
    found = hashlib.sha256(inspect.getsource(method).encode()).hexdigest()[:16]
    assert found == digest, f"{method.__qualname__} of kafka-python {kafka.__version__} is not that of 3.0.12"


def test_something_damaged_is_tried_at_distances_and_then_let_go() -> None:
    now = [100.0]
    trials = Trials(lambda: now[0])
    for attempt in range(1, TRIES):
        for _ in range(3):  # several failures within one rest count as one try
            assert not trials.failed(WHERE, 17, "why")
        assert trials.resting == {WHERE}
        assert trials.standing == {WHERE: (17, "why")}
        now[0] += REST_S
        assert attempt < TRIES
        assert trials.resting == set()

    assert trials.failed(WHERE, 17, "why")
    trials.let_go(WHERE, 18)
    assert trials.standing == {}

    # An offset that follows at once needs no more tries; a later one does.
    assert trials.failed(WHERE, 18, "why")
    trials.let_go(WHERE, 19)
    trials.read(WHERE)
    assert not trials.failed(WHERE, 19, "why")
    assert not trials.failed(WHERE, 25, "another")  # a new place begins at its first try

    trials.forget(WHERE)
    assert trials.resting == set()


def test_a_partition_that_is_given_out_again_stands_no_longer() -> None:
    trials = Trials()
    trials.stands(WHERE, 4, "the broker does not give it out (UnknownError)")
    assert trials.standing
    trials.given_out(WHERE)
    assert trials.standing == {}
    assert trials.failed(WHERE, 4, "damaged") is False
    trials.given_out(WHERE)
    assert trials.standing  # it is given out, but is still damaged


def known(offset: int, topic_id: str = "a") -> EventPosition:
    return EventPosition(WHERE.topic, WHERE.partition, topic_id, offset)


def lost(first: int, end: int | None, reason: str) -> EventLoss:
    return EventLoss(WHERE.topic, WHERE.partition, first, end, reason)


@pytest.mark.parametrize(
    ("before", "to", "remembered", "topic_id", "end", "loss"),
    [
        (5, 12, known(5), "a", 20, lost(5, 12, event_watch.RETENTION)),
        (5, 12, None, "a", 20, lost(5, 12, event_watch.RETENTION)),  # an installation of a release that noted nothing
        (None, 0, None, "a", 20, None),  # the first start
        (None, 7, None, "a", 20, None),
        (None, 7, known(7), "a", 20, None),  # expired, but every dropped event had been read
        (None, 7, known(15), "a", 20, None),
        (None, 7, known(4), "a", 20, lost(4, 7, event_watch.EXPIRED)),
        (30, 0, known(30), "a", 20, lost(30, None, event_watch.RECREATED)),
        (None, 0, known(30), "", 20, lost(30, None, event_watch.RECREATED)),
        (None, 0, known(10), "b", 20, lost(10, None, event_watch.RECREATED)),
        (None, 0, known(10, ""), "b", 20, None),  # it is unknown whether this is the same topic
        (12, 12, known(12), "a", 20, None),
    ],
)
def test_the_loss_where_a_position_is_reset(
    before: int | None, to: int, remembered: EventPosition | None, topic_id: str, end: int, loss: EventLoss | None
) -> None:
    assert loss_of(Reset(WHERE, before, to), remembered, topic_id, end) == loss
