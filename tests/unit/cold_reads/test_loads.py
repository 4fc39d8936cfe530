"""Loading users whose entry is not cached: order of the steps, which reads may join a load, bounds. With fakes."""

from __future__ import annotations

import threading
from collections.abc import Callable

from prometheus_client import REGISTRY

from segsvc.domain.errors import Reason, ServiceError, shard_unavailable
from segsvc.domain.membership import NEVER_US
from segsvc.services.cold_reads import USERS_PER_LOAD, ColdReads
from tests.eventually import eventually
from tests.unit.cold_reads.conftest import Answers, FakeWorld


def counted(source: str) -> float:
    return REGISTRY.get_sample_value("segsvc_reads_total", {"source": source}) or 0.0


def test_steps_come_in_the_order_of_the_protocol(
    make: Callable[..., ColdReads], world: FakeWorld, answers: Answers
) -> None:
    make().submit([5], None, answers)
    eventually(lambda: bool(world.named("fill")))
    assert [step[0] for step in world.steps] == ["acquire", "load", "fill"]
    assert answers.all == [(5, (NEVER_US, 0, 123, 3, 9, 1, 2))]


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


def test_no_read_joins_a_load_whose_statement_was_sent(
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

    assert early.wait(1) == [(5, (NEVER_US, 0, 123, 3, 9, 1, 2))]
    assert late.wait(1) == [(5, (NEVER_US, 7, 123, 3, 9, 1, 2))]


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
    assert refused.wait(2)[1][1] == (NEVER_US, 0, 123, 3, 9, 1, 2)
