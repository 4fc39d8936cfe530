"""Loading users whose entry is not cached: outages, deadlines, our own faults, closing. With fakes."""

from __future__ import annotations

import threading
import time
from collections.abc import Callable

from segsvc.domain.errors import LockTimeout, Reason, ServiceError, shard_unavailable
from segsvc.domain.membership import NEVER_US
from segsvc.services.cold_reads import ColdReads, Outcome
from tests.eventually import eventually
from tests.unit.cold_reads.conftest import WAIT_S, Answers, FakeWorld


def test_without_the_cache_reads_are_answered_and_nothing_is_filled(
    make: Callable[..., ColdReads], world: FakeWorld, answers: Answers
) -> None:
    world.cache_down = True
    make().submit([5, 9], None, answers)
    answers.wait(2)
    assert answers.reasons() == [None, None]
    assert not world.named("fill")
    assert not world.named("release")


def test_shard_that_is_down_fails_what_waits_for_it_and_no_other(
    make: Callable[..., ColdReads], world: FakeWorld, answers: Answers
) -> None:
    world.hold[1] = threading.Event()
    world.failures[1] = shard_unavailable(1)
    cold = make()
    cold.submit([1], None, answers)
    eventually(lambda: bool(world.named("load")))

    cold.submit([5, 9], None, answers)
    world.hold[1].set()

    answers.wait(3)
    assert answers.reasons() == [Reason.SHARD_UNAVAILABLE] * 3
    assert len(world.named("load")) == 1, "those that gathered do not wait for the same failure again"
    assert world.named("release") == [("release", 1, (1,))], "the lease must not keep others from filling"

    others = Answers()
    cold.submit([2, 3, 4], None, others)
    others.wait(3)
    assert others.reasons() == [None] * 3


def test_shard_that_is_down_is_tried_by_one_read_at_a_time_until_it_is_back(
    make: Callable[..., ColdReads], world: FakeWorld, answers: Answers
) -> None:
    world.failures[1] = shard_unavailable(1)
    cold = make()
    cold.submit([1], None, answers)
    answers.wait(1)

    for _ in range(50):
        cold.submit([5], None, answers)
    answers.wait(51)
    assert len(world.named("load")) <= 2
    del world.failures[1]

    def back() -> bool:
        one = Answers()
        cold.submit([5], None, one)
        one.wait(1)
        return one.reasons() == [None]

    eventually(back)
    answers.all.clear()
    cold.submit([1, 5, 9, 13], None, answers)
    answers.wait(4)
    assert answers.reasons() == [None] * 4


def test_slow_shard_is_not_a_shard_that_is_down(
    make: Callable[..., ColdReads], world: FakeWorld, answers: Answers
) -> None:
    world.failures[1] = ServiceError(Reason.DEADLINE_EXCEEDED, "the database did not answer in time")
    cold = make()
    cold.submit([1], None, answers)
    answers.wait(1)
    del world.failures[1]
    cold.submit([1], None, answers)
    answers.wait(2)
    assert answers.reasons() == [Reason.DEADLINE_EXCEEDED, None]


def test_locked_tables_are_an_outage_of_the_shard(
    make: Callable[..., ColdReads], world: FakeWorld, answers: Answers
) -> None:
    world.failures[1] = LockTimeout()
    make().submit([1], None, answers)
    answers.wait(1)
    assert answers.reasons() == [Reason.SHARD_UNAVAILABLE]


def test_deadline_bounds_the_statement_and_ends_the_wait(
    make: Callable[..., ColdReads], world: FakeWorld, answers: Answers
) -> None:
    world.hold[1] = threading.Event()
    cold = make(statement_s=60.0, stalled_s=60.0)
    cold.submit([1], time.monotonic() + 30, answers)
    eventually(lambda: bool(world.named("load")))

    timeout_s = world.named("load")[0][3]
    assert isinstance(timeout_s, float)
    assert 0 < timeout_s <= 30

    waiting, patient = Answers(), Answers()
    cold.submit([5], time.monotonic() + 0.05, waiting)
    cold.submit([5], None, patient)
    waiting.wait(1)  # though the thread is busy
    assert waiting.reasons() == [Reason.DEADLINE_EXCEEDED]

    world.hold[1].set()
    assert patient.wait(1)[0][1] == (NEVER_US, 0, 123, 3, 9, 1, 2)
    assert world.named("load")[1][3] is None, "one caller without a deadline: the session's bound"


def test_shard_that_hangs_is_given_up(make: Callable[..., ColdReads], world: FakeWorld, answers: Answers) -> None:
    world.hold[1] = threading.Event()
    cold = make(stalled_s=0.2)
    cold.submit([1], None, answers)
    eventually(lambda: bool(world.named("load")))
    cold.submit([5], None, answers)  # no thread is free for this one
    answers.wait(2)
    assert answers.reasons() == [Reason.SHARD_UNAVAILABLE] * 2
    world.hold[1].set()  # it answers after all

    def back() -> bool:
        one = Answers()
        cold.submit([9], None, one)
        one.wait(1)
        return one.reasons() == [None]

    eventually(back)
    assert len(answers.all) == 2, "nobody is answered twice"


def test_reads_of_a_load_that_hangs_are_answered_in_their_time(
    make: Callable[..., ColdReads], world: FakeWorld, answers: Answers
) -> None:
    world.hold[1] = threading.Event()
    cold = make(stalled_s=2.0)
    cold.submit([1], time.monotonic() + 0.2, answers)
    answers.wait(1)
    assert answers.reasons() == [Reason.DEADLINE_EXCEEDED]  # and not SHARD_UNAVAILABLE, after 2 s
    assert cold.waiting == 0

    # No read waits any more, and the shard is still found to be down.
    def refused_at_once() -> bool:
        one = Answers()
        cold.submit([5], time.monotonic() + 0.1, one)
        return one.reasons() == [Reason.SHARD_UNAVAILABLE]

    eventually(refused_at_once)
    time.sleep(2 * ColdReads.PROBE_S)  # a read for which no thread is free does not become the probe
    assert all(refused_at_once() for _ in range(20))
    assert len(world.named("load")) == 1

    world.hold[1].set()
    eventually(lambda: not refused_at_once())
    late = Answers()
    cold.submit([9], None, late)
    late.wait(1)
    assert late.reasons() == [None]
    assert len(answers.all) == 1
    eventually(lambda: cold.waiting == 0)


def test_the_read_that_tries_a_shard_again_is_refused_in_time(
    make: Callable[..., ColdReads], world: FakeWorld, answers: Answers
) -> None:
    world.failures[1] = shard_unavailable(1)
    cold = make()
    cold.submit([1], None, answers)
    answers.wait(1)

    del world.failures[1]
    world.hold[1] = threading.Event()
    time.sleep(2 * ColdReads.PROBE_S)

    cold.submit([1], time.monotonic() + 0.2, answers)
    answers.wait(2)
    assert answers.reasons() == [Reason.SHARD_UNAVAILABLE] * 2


def test_fault_of_ours_is_answered_and_the_thread_lives(
    make: Callable[..., ColdReads], world: FakeWorld, answers: Answers
) -> None:
    world.failures[1] = RuntimeError("a fault")
    cold = make()
    cold.submit([1], None, answers)
    answers.wait(1)

    assert answers.reasons() == [Reason.INTERNAL]
    assert "fault" not in str(answers.all[0][1])

    del world.failures[1]
    cold.submit([1], None, answers)
    answers.wait(2)
    assert answers.reasons()[1] is None


def test_answer_that_fails_keeps_no_other_from_its_own(
    make: Callable[..., ColdReads], world: FakeWorld, answers: Answers
) -> None:
    def broken(user_id: int, outcome: Outcome) -> None:
        raise RuntimeError("a fault")

    world.hold[1] = threading.Event()
    cold = make()
    cold.submit([1], None, answers)
    eventually(lambda: bool(world.named("load")))
    cold.submit([5], None, broken)
    cold.submit([5, 9], None, answers)
    world.hold[1].set()

    answers.wait(3)
    assert answers.reasons() == [None] * 3


def test_closing_answers_what_waits_and_takes_no_more(
    make: Callable[..., ColdReads], world: FakeWorld, answers: Answers
) -> None:
    world.hold[1] = threading.Event()
    cold = make()
    cold.submit([1, 5], None, answers)

    closing = threading.Thread(target=cold.close, args=(WAIT_S,))
    closing.start()
    world.hold[1].set()
    closing.join(WAIT_S)
    assert sorted(user_id for user_id, _ in answers.all) == [1, 5]

    late = Answers()
    cold.submit([1], None, late)
    assert late.reasons() == [Reason.SHARD_UNAVAILABLE]
