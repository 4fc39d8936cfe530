"""Loading users whose entry is not cached: order of the steps, who may join, bounds, outages. On fakes."""

from __future__ import annotations

import threading
import time
from collections.abc import Callable, Iterator, Sequence
from dataclasses import dataclass, field

import pytest
from prometheus_client import REGISTRY

from segsvc.domain.errors import LockTimeout, Reason, ServiceError, cache_unavailable, shard_unavailable
from segsvc.domain.membership import NEVER_US, Entry, Grant, LoadedUser
from segsvc.services.cold_reads import USERS_PER_LOAD, ColdReads, Limits, Outcome
from segsvc.services.slug_map import SlugMap
from tests.eventually import eventually

WAIT_S = 10.0


def counted(source: str) -> float:
    return REGISTRY.get_sample_value("segsvc_reads_total", {"source": source}) or 0.0


@dataclass
class FakeWorld:
    """Cache and shards that note every step, and stop or fail where a test says."""

    steps: list[tuple[object, ...]] = field(default_factory=list)
    users: set[int] = field(default_factory=lambda: set(range(1, 1000)))
    version: int = 0
    refused: set[int] = field(default_factory=set)
    cache_down: bool = False
    failures: dict[int, Exception] = field(default_factory=dict)
    hold: dict[int, threading.Event] = field(default_factory=dict)

    def acquire(self, shard: int, user_ids: Sequence[int]) -> Grant:
        self.steps.append(("acquire", shard, tuple(user_ids)))
        if self.cache_down:
            raise cache_unavailable()
        return Grant(b"nonce", b"token", frozenset(user_ids) - self.refused)

    def load(self, shard: int, user_ids: Sequence[int], *, timeout_s: float | None = None) -> list[LoadedUser]:
        version = self.version  # the snapshot
        self.steps.append(("load", shard, tuple(user_ids), timeout_s))
        if shard in self.hold:
            assert self.hold[shard].wait(WAIT_S)
        if shard in self.failures:
            raise self.failures[shard]
        return [LoadedUser(u, 9, version, 123, NEVER_US, (2, 1)) for u in user_ids if u in self.users]

    def fill(self, shard: int, grant: Grant, rows: Sequence[tuple[int, Entry]]) -> int:
        self.steps.append(("fill", shard, tuple(user_id for user_id, _ in rows)))
        if self.cache_down:
            raise cache_unavailable()
        return len(rows)

    def release(self, shard: int, grant: Grant, user_ids: Sequence[int]) -> None:
        self.steps.append(("release", shard, tuple(user_ids)))

    def named(self, kind: str) -> list[tuple[object, ...]]:
        return [step for step in self.steps if step[0] == kind]


class Answers:
    def __init__(self) -> None:
        self.all: list[tuple[int, Outcome]] = []

    def __call__(self, user_id: int, outcome: Outcome) -> None:
        self.all.append((user_id, outcome))

    def wait(self, count: int) -> list[tuple[int, Outcome]]:
        eventually(lambda: len(self.all) >= count)
        return self.all

    def reasons(self) -> list[Reason | None]:
        return [outcome.reason if isinstance(outcome, ServiceError) else None for _, outcome in self.all]


@pytest.fixture
def world() -> FakeWorld:
    return FakeWorld()


@pytest.fixture
def answers() -> Answers:
    return Answers()


@pytest.fixture
def make(world: FakeWorld) -> Iterator[Callable[..., ColdReads]]:
    made: list[ColdReads] = []

    def build(**limits: float) -> ColdReads:
        bounds = {"waiting_max": 1000, "threads": 1, "statement_s": 2.0, "stalled_s": 5.0, **limits}
        cold = ColdReads(
            reads=world,
            cache=world,
            slugs=SlugMap(lambda _: {1: "b", 2: "c"}),
            shard_count=4,
            limits=Limits(**bounds),  # type: ignore[arg-type]
        )
        made.append(cold)
        return cold

    yield build
    for event in world.hold.values():
        event.set()
    for cold in made:
        cold.close(WAIT_S)


def test_steps_come_in_the_order_of_the_protocol(
    make: Callable[..., ColdReads], world: FakeWorld, answers: Answers
) -> None:
    make().submit([5], None, answers)
    eventually(lambda: bool(world.named("fill")))
    assert [step[0] for step in world.steps] == ["acquire", "load", "fill"]
    assert answers.all == [(5, (NEVER_US, 0, 123, 9, 1, 2))]


def test_refused_users_are_answered_and_not_filled(
    make: Callable[..., ColdReads], world: FakeWorld, answers: Answers
) -> None:
    world.refused = {5}
    world.hold[1] = threading.Event()
    cold = make()
    cold.submit([9], None, answers)
    eventually(lambda: bool(world.named("load")))
    cold.submit([5, 13], None, answers)
    world.hold[1].set()
    answers.wait(3)
    eventually(lambda: len(world.named("fill")) == 2)
    assert world.named("fill")[1] == ("fill", 1, (13,))


def test_unknown_user_is_not_found_and_gives_the_lease_back(
    make: Callable[..., ColdReads], world: FakeWorld, answers: Answers
) -> None:
    make().submit([1005], None, answers)
    answers.wait(1)
    assert answers.reasons() == [Reason.USER_NOT_FOUND]
    eventually(lambda: bool(world.named("release")))
    assert world.named("release") == [("release", 1, (1005,))]
    assert not world.named("fill")


def test_unknown_users_are_counted_apart_from_errors(
    make: Callable[..., ColdReads], world: FakeWorld, answers: Answers
) -> None:
    sources = ("unknown", "error", "miss")
    before = [counted(source) for source in sources]
    world.failures[2] = shard_unavailable(2)
    make().submit([1005, 1, 2], None, answers)
    answers.wait(3)
    assert [counted(source) - count for source, count in zip(sources, before, strict=True)] == [1, 1, 1]


def test_calls_gather_for_one_statement(make: Callable[..., ColdReads], world: FakeWorld, answers: Answers) -> None:
    world.hold[1] = threading.Event()
    cold = make()
    cold.submit([1], None, answers)
    eventually(lambda: bool(world.named("load")))
    for user_id in (5, 9, 5, 13):
        cold.submit([user_id], None, answers)
    world.hold[1].set()
    answers.wait(5)
    assert [step[2] for step in world.named("load")] == [(1,), (5, 9, 13)]


def test_nobody_joins_a_load_whose_statement_has_been_sent(
    make: Callable[..., ColdReads], world: FakeWorld, answers: Answers
) -> None:
    world.hold[1] = threading.Event()
    cold = make()
    early, late = answers, Answers()
    cold.submit([5], None, early)
    eventually(lambda: bool(world.named("load")))
    world.version = 7  # changed and acknowledged now
    cold.submit([5], None, late)
    world.hold[1].set()
    assert early.wait(1) == [(5, (NEVER_US, 0, 123, 9, 1, 2))]
    assert late.wait(1) == [(5, (NEVER_US, 7, 123, 9, 1, 2))]


def test_load_is_bounded(make: Callable[..., ColdReads], world: FakeWorld, answers: Answers) -> None:
    world.hold[1] = threading.Event()
    cold = make()
    cold.submit([1], None, answers)
    eventually(lambda: bool(world.named("load")))
    cold.submit(range(5, 5 + 4 * 300, 4), None, answers)
    world.hold[1].set()
    answers.wait(301)
    assert [len(step[2]) for step in world.named("load")] == [1, USERS_PER_LOAD, 300 - USERS_PER_LOAD]  # type: ignore[arg-type]


def test_more_than_the_bound_is_refused_with_a_delay(
    make: Callable[..., ColdReads], world: FakeWorld, answers: Answers
) -> None:
    world.hold[1] = threading.Event()
    cold = make(waiting_max=3)
    refused = Answers()
    cold.submit([1, 5, 5], None, answers)
    cold.submit([9], None, refused)
    ((user_id, error),) = refused.wait(1)
    assert user_id == 9
    assert isinstance(error, ServiceError)
    assert (error.reason, error.retry_after_s) == (Reason.OVERLOADED, 0.5)
    other = Answers()
    cold.submit([2], None, other)  # another shard
    assert other.wait(1)
    world.hold[1].set()
    answers.wait(3)
    eventually(lambda: not cold.waiting)
    cold.submit([9], None, refused)
    assert refused.wait(2)[1][1] == (NEVER_US, 0, 123, 9, 1, 2)


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
    cold = make()
    now = time.monotonic()
    cold.submit([1], now + 1.0, answers)
    eventually(lambda: bool(world.named("load")))
    timeout_s = world.named("load")[0][3]
    assert isinstance(timeout_s, float)
    assert 0 < timeout_s <= 1.0
    waiting, patient = Answers(), Answers()
    cold.submit([5], time.monotonic() + 0.05, waiting)
    cold.submit([5], None, patient)
    waiting.wait(1)  # though the thread is busy
    assert waiting.reasons() == [Reason.DEADLINE_EXCEEDED]
    world.hold[1].set()
    assert patient.wait(1)[0][1] == (NEVER_US, 0, 123, 9, 1, 2)
    assert world.named("load")[1][3] is None, "one caller without a deadline: the session's bound"


def test_shard_that_hangs_is_given_up(make: Callable[..., ColdReads], world: FakeWorld, answers: Answers) -> None:
    world.hold[1] = threading.Event()
    cold = make(stalled_s=0.2)
    begun = time.monotonic()
    cold.submit([1], None, answers)
    eventually(lambda: bool(world.named("load")))
    cold.submit([5], None, answers)  # for this one there is no thread
    answers.wait(2)
    assert answers.reasons() == [Reason.SHARD_UNAVAILABLE] * 2
    assert time.monotonic() - begun < 2
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
    cold = make(stalled_s=0.6)
    begun = time.monotonic()
    cold.submit([1], begun + 0.2, answers)
    answers.wait(1)
    assert answers.reasons() == [Reason.DEADLINE_EXCEEDED]
    assert time.monotonic() - begun < 0.5
    assert cold.waiting == 0

    # Nobody waits any more, and the shard is found out all the same.
    def refused_at_once() -> bool:
        one = Answers()
        cold.submit([5], time.monotonic() + 0.1, one)
        return one.reasons() == [Reason.SHARD_UNAVAILABLE]

    eventually(refused_at_once)
    time.sleep(2 * ColdReads.PROBE_S)  # no read is a probe that has no thread to try with
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


def test_whoever_tries_a_shard_that_is_down_is_told_so_in_time(
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
