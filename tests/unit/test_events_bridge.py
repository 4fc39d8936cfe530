"""The bridge's bookkeeping: which offset may be committed, when each batch is sent, what becomes of its events."""

from __future__ import annotations

import random
from collections.abc import Collection, Mapping, Sequence

import pytest
from hypothesis import given
from hypothesis import strategies as st

from segsvc.bridge.flows import BATCH_BYTES_MAX, GATHER_MAX_S, RESULT_WAIT_S, Flows
from segsvc.bridge.offsets import PartitionProgress, Taken
from segsvc.bridge.waiting import Backoff, Waits
from segsvc.domain.errors import broker_unavailable
from segsvc.domain.events import DeleteUser, UserEvent
from segsvc.services.ingestion import BatchReport
from tasks.outcomes import BATCH_LOST, OUT_OF_MEMORY, WORKER_ENDED, Outcome, TryAgain


@given(st.lists(st.integers(1, 3), min_size=1, max_size=30), st.randoms(use_true_random=False))
def test_only_what_has_nothing_unfinished_before_it_is_committable(gaps: list[int], order: random.Random) -> None:
    progress = PartitionProgress("create-user", 0)
    offset, events = 0, []
    for gap in gaps:
        offset += gap
        events.append(progress.take(offset, DeleteUser(1), b"k", b"1234"))

    assert progress.committable() is None
    assert progress.unfinished_bytes == 4 * len(events)

    for taken in order.sample(events, len(events)):
        progress.finish(taken)
        finished = []
        for event in events:
            if not event.finished:
                break
            finished.append(event)
        assert progress.committable() == (finished[-1].offset + 1 if finished else None)
        assert progress.window_events == len(events) - len(finished)

    assert progress.committable() == offset + 1 == progress.next_offset
    assert (progress.unfinished_events, progress.unfinished_bytes) == (0, 0)
    progress.committed(offset + 1)
    assert progress.committable() is None


class FakeBatches:
    """Workers that give the answers that a test has set."""

    def __init__(self) -> None:
        self.sent: list[tuple[str, int, list[int]]] = []
        self.expire_s: list[float] = []
        self.answers: dict[str, Outcome] = {}
        self.begins: set[str] | None = set()
        """Batches that a worker has begun; None: all."""
        self.down = False

    def send(self, topic: str, shard: int, events: Sequence[UserEvent], expire_s: float) -> str:
        if self.down:
            raise broker_unavailable()
        self.sent.append((topic, shard, [event.user_id for event in events]))
        self.expire_s.append(expire_s)
        return str(len(self.sent) - 1)

    def collect(self, batch_ids: Sequence[str]) -> Mapping[str, Outcome]:
        if self.down:
            raise broker_unavailable()
        return {batch_id: self.answers.pop(batch_id) for batch_id in batch_ids if batch_id in self.answers}

    def begun(self, batch_ids: Sequence[str]) -> Collection[str]:
        return {batch_id for batch_id in batch_ids if self.begins is None or batch_id in self.begins}


class Bench:
    def __init__(self, *, batch_max: int = 10, in_flight_max: int = 8, busy_from: int = 0) -> None:
        self.now = 100.0
        self.answered = 0
        """Batches that ``fail`` has answered."""

        self.batches = FakeBatches()
        self.dead: list[tuple[int, str]] = []
        self.progress = {topic: PartitionProgress(topic, 0) for topic in ("create-user", "delete-user")}
        self.flows = Flows(
            self.batches,
            lambda taken, reason: self.dead.append((taken.offset, reason)),
            Waits(lambda: self.now),
            batch_max=batch_max,
            in_flight_max=in_flight_max,
            busy_from=busy_from,
            clock=lambda: self.now,
        )

    def add(self, *offsets: int, shard: int = 0, topic: str = "create-user", raw: bytes = b"x") -> list[Taken]:
        events = [self.progress[topic].take(offset, DeleteUser(offset), None, raw) for offset in offsets]
        for taken in events:
            self.flows.add(taken, shard)
        return events

    def step(self, after_s: float = 0.0, *, more: bool = False, **answers: Outcome) -> None:
        self.now += after_s
        self.batches.answers.update({batch_id.removeprefix("b"): outcome for batch_id, outcome in answers.items()})
        self.flows.step(more=more)


def test_one_batch_of_a_flow_at_a_time_and_in_order() -> None:
    bench = Bench(batch_max=3)
    events = bench.add(*range(5))
    bench.step()

    bench.add(5)
    bench.step()
    assert bench.batches.sent == [("create-user", 0, [0, 1, 2])]

    bench.step(b0=BatchReport(2, 1))
    assert [event.finished for event in events] == [True, True, True, False, False]
    assert bench.batches.sent[1:] == [("create-user", 0, [3, 4, 5])]
    bench.step(b1=BatchReport(3, 0))
    assert bench.flows.in_flight == 0
    assert not bench.flows.held_back


def test_topics_and_shards_go_side_by_side_up_to_the_limit_and_by_turns() -> None:
    bench = Bench(in_flight_max=2)
    for shard in range(3):
        bench.add(shard, shard=shard)
    bench.add(10, topic="delete-user")

    bench.step()
    assert [sent[:2] for sent in bench.batches.sent] == [("create-user", 0), ("create-user", 1)]

    bench.add(4, shard=0)
    bench.step(b0=BatchReport(1, 0))
    bench.step(b1=BatchReport(1, 0))
    assert [sent[:2] for sent in bench.batches.sent[2:]] == [("create-user", 2), ("delete-user", 0)]
    bench.step(b2=BatchReport(1, 0))
    assert [sent[:2] for sent in bench.batches.sent[4:]] == [("create-user", 0)]


def test_a_batch_is_cut_by_bytes_too() -> None:
    bench = Bench(batch_max=100)
    bench.add(0, 1, 2, raw=b"x" * (BATCH_BYTES_MAX // 2))
    bench.step()
    assert bench.batches.sent == [("create-user", 0, [0, 1])]


def test_dead_events_go_to_the_dead_letters_and_are_not_finished_yet() -> None:
    bench = Bench()
    events = bench.add(0, 1, 2)
    bench.step()
    bench.step(b0=BatchReport(1, 1, ((1, "refused"),)))
    assert bench.dead == [(1, "refused")]
    assert [event.finished for event in events] == [True, False, True]
    assert bench.progress["create-user"].committable() == 1


def test_a_shard_in_trouble_gets_one_batch_at_a_time_at_growing_distances() -> None:
    bench = Bench()
    bench.add(0)
    bench.add(1, topic="delete-user")
    bench.add(2, shard=1)
    bench.step()
    assert len(bench.batches.sent) == 3

    bench.step(b0=TryAgain("SHARD_UNAVAILABLE"), b1=TryAgain("SHARD_UNAVAILABLE"), b2=BatchReport(1, 0))
    bench.add(3, shard=1)
    bench.step(0.1)
    assert bench.batches.sent[3:] == [("create-user", 1, [3])]

    bench.step(0.5, b3=BatchReport(1, 0))
    assert len(bench.batches.sent) == 5  # one of the two, as a probe
    bench.step(10.0)
    assert len(bench.batches.sent) == 5
    bench.step(b4=BatchReport(1, 0))
    assert len(bench.batches.sent) == 6
    assert sorted(sent[2] for sent in bench.batches.sent[4:]) == [[0], [1]]


def test_while_workers_are_busy_and_more_is_at_hand_batches_become_full_first() -> None:
    bench = Bench(batch_max=3, busy_from=2)
    for shard in range(3):
        bench.add(shard, shard=shard)

    bench.step(more=True)  # no worker is busy yet
    assert [sent[1] for sent in bench.batches.sent] == [0, 1]

    bench.add(3, 4, shard=2)
    bench.add(5, shard=0)
    bench.step(more=True)
    assert bench.batches.sent[2:] == [("create-user", 2, [2, 3, 4])]

    bench.step(more=True, b0=BatchReport(1, 0))  # two batches are in flight, and this one is not full
    assert len(bench.batches.sent) == 3
    bench.step(more=True, b1=BatchReport(1, 0))
    assert bench.batches.sent[3:] == [("create-user", 0, [5])]


def test_no_batch_waits_for_long_to_become_full() -> None:
    bench = Bench(batch_max=3, busy_from=1)
    bench.add(0)
    bench.step(more=True)
    bench.add(1, topic="delete-user")
    bench.step(more=True)

    bench.step(GATHER_MAX_S - 0.01, more=True)
    assert len(bench.batches.sent) == 1
    bench.step(0.02, more=True)
    assert bench.batches.sent[1:] == [("delete-user", 0, [1])]

    bench.add(2, shard=1)
    bench.step(more=True)
    assert len(bench.batches.sent) == 2
    bench.step()  # no more events are waiting
    assert bench.batches.sent[2:] == [("create-user", 1, [2])]


def test_a_batch_whose_events_were_lost_on_the_way_comes_again() -> None:
    bench = Bench()
    bench.add(0)
    bench.add(1, topic="delete-user")
    bench.step()
    bench.step(b0=TryAgain(BATCH_LOST))
    bench.add(2, topic="delete-user")
    bench.step(b1=BatchReport(1, 0))  # nothing is wrong with the shard
    assert bench.batches.sent[2:] == [("delete-user", 0, [2])]
    bench.step(1.0)
    assert bench.batches.sent[3:] == [("create-user", 0, [0])]


def test_without_the_cache_only_the_topic_that_needs_it_waits() -> None:
    bench = Bench()
    bench.add(0)
    bench.add(1, topic="delete-user")
    bench.step()
    bench.step(b0=BatchReport(1, 0), b1=TryAgain("CACHE_UNAVAILABLE"))
    bench.add(2)
    bench.step()
    assert bench.batches.sent[2:] == [("create-user", 0, [2])]
    bench.step(1.0)
    assert bench.batches.sent[3:] == [("delete-user", 0, [1])]


def test_a_batch_without_a_result_is_sent_again_ever_later() -> None:
    bench = Bench()
    (event,) = bench.add(0)
    bench.step()

    bench.step(RESULT_WAIT_S - 1)
    assert len(bench.batches.sent) == 1
    bench.step(1.0)
    assert len(bench.batches.sent) == 2
    bench.step(2 * RESULT_WAIT_S - 1)
    assert len(bench.batches.sent) == 2
    bench.step(1.0)
    assert bench.batches.expire_s == [RESULT_WAIT_S, 2 * RESULT_WAIT_S, 4 * RESULT_WAIT_S]

    bench.step(b0=BatchReport(1, 0))  # the answer to a copy that is no longer waited for
    assert not event.finished
    bench.step(b2=BatchReport(1, 0))
    assert event.finished


def test_a_broker_that_is_down_holds_everything_and_loses_nothing() -> None:
    bench = Bench()
    bench.add(0)
    bench.step()

    bench.batches.down = True
    bench.add(1, shard=1)
    bench.step()
    bench.step(0.1)

    bench.batches.down = False
    bench.step(0.05)
    assert len(bench.batches.sent) == 1
    bench.step(0.2, b0=BatchReport(1, 0))
    assert [sent[2] for sent in bench.batches.sent] == [[0], [1]]


def test_events_of_a_lost_partition_are_not_sent_any_more() -> None:
    bench = Bench()
    bench.add(0)
    bench.add(1, shard=1)
    bench.step()
    bench.add(2)

    bench.progress["create-user"].lose()
    bench.step(b0=TryAgain("LOCK_TIMEOUT"), b1=BatchReport(1, 0))
    bench.step(60.0)
    bench.step(60.0)

    assert len(bench.batches.sent) == 2
    assert not bench.flows.held_back


def test_backoff_grows_to_its_bound_and_starts_over() -> None:
    backoff = Backoff(1.0, 4.0)
    distances = []
    for _ in range(4):
        backoff.failed(10.0)
        distances.append(backoff.ready_at - 10.0)
    assert distances == [1.0, 2.0, 4.0, 4.0]
    backoff.succeeded()
    assert backoff.ready_at == 0.0
    backoff.failed(10.0)
    assert backoff.ready_at == 11.0


def test_a_batch_that_the_database_does_not_get_through_is_halved_down_to_one_event() -> None:
    bench = Bench(batch_max=8)
    events = bench.add(*range(9))
    bench.step()
    bench.step(b0=TryAgain("DEADLINE_EXCEEDED"))
    bench.step(b1=TryAgain("DEADLINE_EXCEEDED"))
    assert [sent[2] for sent in bench.batches.sent] == [list(range(8)), [0, 1, 2, 3], [0, 1]]

    bench.step(1.0, b2=TryAgain("DEADLINE_EXCEEDED"))
    assert bench.batches.sent[3:] == [("create-user", 0, [0])]

    # One event cannot be halved: it waits, as in any outage, and does not become a dead letter.
    bench.step(b3=TryAgain("DEADLINE_EXCEEDED"))
    assert bench.flows.in_flight == 0
    bench.step(1.0)
    assert bench.batches.sent[4:] == [("create-user", 0, [0])]

    # A slow batch leaves the size as small as it is; quick batches make it grow. The order stays.
    bench.step(5.0, b4=BatchReport(1, 0))
    assert bench.batches.sent[5:] == [("create-user", 0, [1])]
    bench.step(0.1, b5=BatchReport(1, 0))
    bench.step(0.1, b6=BatchReport(2, 0))
    bench.step(0.1, b7=BatchReport(4, 0))
    assert [sent[2] for sent in bench.batches.sent[6:]] == [[2, 3], [4, 5, 6, 7], [8]]

    bench.step(b8=BatchReport(1, 0))
    assert all(event.finished for event in events)
    assert bench.dead == []


def test_a_batch_without_a_result_is_halved() -> None:
    bench = Bench()
    bench.add(*range(4))
    bench.step()
    bench.step(RESULT_WAIT_S)
    assert [sent[2] for sent in bench.batches.sent] == [[0, 1, 2, 3], [0, 1]]


INTERNAL = TryAgain("INTERNAL")


def fail(
    bench: Bench, bad: set[int], *, steps: int, every_s: float = 1.0, outcome: TryAgain | None = INTERNAL
) -> list[int]:
    """Answer batches with this outcome if they hold one of these events, and apply the rest.

    Args:
        outcome: None: there is no answer.

    Returns:
        what was applied.
    """
    applied: list[int] = []
    for _ in range(steps):
        bench.now += every_s
        bench.flows.step()

        for number in range(bench.answered, len(bench.batches.sent)):
            events = bench.batches.sent[number][2]
            if bad.isdisjoint(events):
                bench.batches.answers[str(number)] = BatchReport(len(events), 0)
                applied += events
            elif outcome is not None:
                bench.batches.answers[str(number)] = outcome
        bench.answered = len(bench.batches.sent)
    return applied


@pytest.mark.parametrize("outcome", [INTERNAL, TryAgain(WORKER_ENDED)])
def test_an_event_on_which_the_workers_always_fail_is_let_go_alone(outcome: TryAgain) -> None:
    bench = Bench(batch_max=8)
    bench.add(*range(20))
    applied = fail(bench, {5}, steps=50, outcome=outcome)
    assert not bench.dead  # not yet
    applied += fail(bench, {5}, steps=100, outcome=outcome)
    [(offset, reason)] = bench.dead
    assert (offset, reason.split(":")[0]) == (5, outcome.reason)
    assert sorted(applied) == [number for number in range(20) if number != 5]
    assert not bench.flows.held_back


def test_an_event_that_ends_whole_workers_is_let_go_alone() -> None:
    """No process is left that could answer, or put the message back."""
    bench = Bench(batch_max=8)
    bench.batches.begins = None
    bench.add(*range(20))
    applied = fail(bench, {5}, steps=1500, outcome=None)
    [(offset, reason)] = bench.dead
    assert (offset, reason.split(":")[0]) == (5, WORKER_ENDED)
    assert sorted(applied) == [number for number in range(20) if number != 5]
    assert not bench.flows.held_back


def test_workers_that_fail_on_everything_do_not_flood_the_dead_letters() -> None:
    bench = Bench(batch_max=8)
    for shard in range(4):
        bench.add(*range(100 * shard, 100 * shard + 50), shard=shard)
    applied = fail(bench, set(range(1000)), steps=3500)
    assert not applied
    assert len(bench.dead) == 10
    # A corrected release goes on with the rest.
    applied = fail(bench, set(), steps=100)
    assert len(applied) + len(bench.dead) == 200
    assert not bench.flows.held_back


def test_no_other_reason_lets_an_event_go() -> None:
    for reason in ("SHARD_UNAVAILABLE", "OUTAGE", "RESULT_REFUSED", "CACHE_UNAVAILABLE", BATCH_LOST, OUT_OF_MEMORY):
        bench = Bench()
        bench.add(1)
        for _ in range(500):
            bench.step(1.0, **{f"b{len(bench.batches.sent) - 1}": TryAgain(reason)} if bench.batches.sent else {})
        assert not bench.dead
        assert bench.flows.held_back


def test_without_workers_no_event_is_let_go() -> None:
    bench = Bench()
    bench.add(1)
    for _ in range(5000):
        bench.step(1.0)
    assert not bench.dead
    assert bench.flows.held_back


def test_a_batch_for_which_there_is_no_memory_becomes_smaller() -> None:
    bench = Bench()
    bench.add(*range(4))
    bench.step()
    bench.step(b0=TryAgain(OUT_OF_MEMORY))
    bench.step(1.0)
    assert [sent[2] for sent in bench.batches.sent] == [[0, 1, 2, 3], [0, 1]]
