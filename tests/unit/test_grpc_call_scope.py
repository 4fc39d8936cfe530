"""Deadlines, and blocking calls on threads."""

from __future__ import annotations

import asyncio
import threading
import time

import pytest

from grpc_api import call_scope
from grpc_api.call_scope import BlockingCalls, CallScope
from segsvc.domain.errors import Reason, ServiceError


def call_with(deadline_s: float | None) -> CallScope:
    now = time.monotonic()
    return CallScope("/a.B/C", "id", now, None if deadline_s is None else now + deadline_s)


@pytest.mark.parametrize(
    ("deadline_s", "patience_s"), [(10.0, 9.0), (2.0, 1.8), (1.0, 0.8), (0.2, 0.0), (0.1, 0.0), (-1.0, 0.0)]
)
def test_patience_leaves_time_for_the_answer(
    monkeypatch: pytest.MonkeyPatch, deadline_s: float, patience_s: float
) -> None:
    monkeypatch.setattr(time, "monotonic", lambda: 1000.0)
    assert call_with(deadline_s).patience_s() == pytest.approx(patience_s)


def test_without_a_deadline_there_is_no_end() -> None:
    assert call_with(None).patience_s() is None
    assert call_with(None).remaining_s() is None


async def test_work_learns_how_much_time_is_left() -> None:
    blocking = BlockingCalls("test", threads=1, waiting_max=1, bound_s=30)
    for deadline_s, told in ((5.0, 4.8), (1.0, 0.9), (None, None), (60.0, None)):
        call_scope.enter(call_with(deadline_s))
        left = await blocking.run(lambda timeout_s: timeout_s)
        # A busy machine takes some of it before the work begins.
        assert left is told or (left is not None and told is not None and told - 0.8 < left <= told)
    blocking.close()


async def test_a_call_whose_turn_comes_too_late_does_nothing() -> None:
    blocking = BlockingCalls("test", threads=1, waiting_max=1, bound_s=30)
    call_scope.enter(call_with(-0.1))
    done: list[None] = []
    with pytest.raises(ServiceError) as caught:
        await blocking.run(lambda _: done.append(None))
    assert caught.value.reason is Reason.DEADLINE_EXCEEDED
    assert not done
    blocking.close()


async def test_work_that_hangs_is_answered_for_before_the_client_gives_up() -> None:
    blocking = BlockingCalls("test", threads=1, waiting_max=1, bound_s=30)
    release, begun = threading.Event(), time.monotonic()
    for _ in range(2):  # the second gets no thread
        call_scope.enter(call_with(0.4))
        with pytest.raises(ServiceError) as caught:
            await blocking.run(lambda _: release.wait(30))
        assert caught.value.reason is Reason.DEADLINE_EXCEEDED
    assert time.monotonic() - begun < 20

    release.set()
    call_scope.enter(call_with(None))
    assert await blocking.run(lambda _: "next") == "next"
    blocking.close()


async def test_a_timeout_inside_the_work_is_raised_unchanged() -> None:
    blocking = BlockingCalls("test", threads=1, waiting_max=0, bound_s=30)
    call_scope.enter(call_with(5.0))

    def fails(_: float | None) -> None:
        raise TimeoutError

    with pytest.raises(TimeoutError):
        await blocking.run(fails)
    blocking.close()


async def test_what_waits_is_bounded_and_its_place_comes_back() -> None:
    blocking = BlockingCalls("test", threads=1, waiting_max=1, bound_s=30)
    call_scope.enter(call_with(None))
    release = threading.Event()
    running = asyncio.create_task(blocking.run(lambda _: release.wait(30)))
    waiting = asyncio.create_task(blocking.run(lambda _: "never begun"))
    await asyncio.sleep(0)

    with pytest.raises(ServiceError) as caught:
        await blocking.run(lambda _: None)
    assert caught.value.reason is Reason.OVERLOADED
    assert caught.value.retry_after_s

    waiting.cancel()  # its client has gone: its place is free, though no thread has become free
    await asyncio.gather(waiting, return_exceptions=True)
    third = asyncio.create_task(blocking.run(lambda _: "third"))
    release.set()
    assert await running
    assert await third == "third"
    blocking.close()


async def test_exceptions_come_through() -> None:
    blocking = BlockingCalls("test", threads=1, waiting_max=0, bound_s=30)
    call_scope.enter(call_with(None))
    for _ in range(3):
        with pytest.raises(ZeroDivisionError):
            await blocking.run(lambda _: 1 / 0)
    blocking.close()


async def test_a_call_whose_turn_would_come_too_late_is_refused_at_once() -> None:
    """The number of waiting calls and their usual duration decide; a call with more time or a free thread is let in."""
    blocking = BlockingCalls("test", threads=1, waiting_max=100, bound_s=30)
    call_scope.enter(call_with(None))
    begun_s = time.monotonic()
    await blocking.run(lambda _: time.sleep(0.3))
    usual_max_s = time.monotonic() - begun_s
    call_scope.enter(call_with(0.32))
    assert await blocking.run(lambda _: "a free thread tries") == "a free thread tries"

    call_scope.enter(call_with(None))
    release = threading.Event()
    running = [asyncio.create_task(blocking.run(lambda _: release.wait(30))) for _ in range(5)]
    await asyncio.sleep(0)

    begun: list[None] = []
    call_scope.enter(call_with(0.9))
    with pytest.raises(ServiceError) as caught:
        await blocking.run(lambda _: begun.append(None))
    assert caught.value.reason is Reason.OVERLOADED
    assert caught.value.retry_after_s is not None
    assert 0.3 < caught.value.retry_after_s < 5 * usual_max_s + 0.5

    call_scope.enter(call_with(60.0))
    patient = asyncio.create_task(blocking.run(lambda _: "patient"))
    await asyncio.sleep(0)
    release.set()
    assert await patient == "patient"
    assert all(await asyncio.gather(*running))
    assert not begun
    blocking.close()
