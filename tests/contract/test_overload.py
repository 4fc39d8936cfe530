"""Far more costly calls than the front can do: cheap calls and changes go on, the rest is refused early."""

from __future__ import annotations

import threading
import time
from collections import Counter
from collections.abc import Callable, Iterator
from concurrent.futures import ThreadPoolExecutor
from contextlib import contextmanager

import grpc
import sqlalchemy as sa
from grpc import StatusCode
from segmentation.v1 import membership_pb2 as members
from segmentation.v1 import segments_pb2 as pb

from tests.contract.conftest import FrontUnderTest, new_slug
from tests.contract.refusals import refusal_of
from tests.contract.rollouts import roll_out

USERS = range(9_200_000, 9_200_040)
SECONDS = 4.0
GIVE_UP_S = 60.0
"""The overload lasts at least the first, and then until each kind of call has succeeded often enough or for the second:
a busy machine takes longer."""
LEAST = {"read": 8, "user": 8, "list": 8, "edit": 4, "rollout": 1, "count": 1}
"""Calls of each kind that must succeed. A rollout waits for the same locks as the counts, four times."""
DEADLINE_S = 4.0
PAUSE_S = 0.25
"""The duration of a count here, so that the test does not depend on the machine's speed."""
COSTLY_CALLERS = 250
"""They all call at once, and each one again and again."""

NOT_DONE = object()
"""What a rollout returns that was accepted and not done in time."""

Ended = Counter[tuple[str, StatusCode | None]]
"""How often each kind of call ended with each code; None: a rollout that was accepted and not done in time."""


@contextmanager
def slow_counts(front: FrontUnderTest) -> Iterator[None]:
    """Counts and cold reads, and nothing else, wait on every shard for a lock that is released only for a moment."""
    stop = threading.Event()

    def hold(engine: sa.Engine) -> None:
        while not stop.is_set():
            with engine.begin() as connection:
                # Transactions of the front may hold the table for longer than a session of ours waits.
                connection.exec_driver_sql("SET LOCAL lock_timeout = 0")
                connection.exec_driver_sql("LOCK TABLE overrides IN ACCESS EXCLUSIVE MODE")
                stop.wait(PAUSE_S)
            time.sleep(0.01)

    engines = front.installation.databases.shards
    with ThreadPoolExecutor(len(engines)) as threads:
        holding = [threads.submit(hold, engine) for engine in engines]
        try:
            yield
        finally:
            stop.set()
            for each in holding:
                each.result()


def test_an_overload_of_costly_calls_harms_no_other_calls(front: FrontUnderTest) -> None:
    front.installation.create_users({user_id: {} for user_id in USERS})
    slug = front.create().slug
    calls: dict[str, tuple[int, Callable[[], object]]] = {
        "count": (
            COSTLY_CALLERS,
            lambda: front.segments.GetSegmentStatistics(pb.GetSegmentStatisticsRequest(slug=slug), timeout=DEADLINE_S),
        ),
        "read": (
            2,
            lambda: front.memberships.GetUserSegments(
                members.GetUserSegmentsRequest(user_id=USERS[0]), timeout=DEADLINE_S
            ),
        ),
        "user": (2, lambda: front.memberships.GetUser(members.GetUserRequest(user_id=USERS[1]), timeout=DEADLINE_S)),
        "list": (2, lambda: front.segments.ListSegments(pb.ListSegmentsRequest(page_size=5), timeout=DEADLINE_S)),
        "edit": (1, lambda: _edit(front, slug)),
        "rollout": (1, lambda: _roll_out(front, slug)),
    }

    total: Ended = Counter()
    early: list[float] = []
    counting = threading.Lock()
    begun = time.monotonic()

    def goes_on() -> bool:
        lasted_s = time.monotonic() - begun
        with counting:
            enough = all(total[name, StatusCode.OK] >= least for name, least in LEAST.items())
        return lasted_s < SECONDS or (not enough and lasted_s < GIVE_UP_S)

    def call_on(name: str, call: Callable[[], object]) -> None:
        while goes_on():
            called = time.monotonic()
            code: StatusCode | None = StatusCode.OK

            try:
                if call() is NOT_DONE:
                    code = None
            except grpc.RpcError as error:
                code = error.code()  # type: ignore[attr-defined]
                if code is StatusCode.RESOURCE_EXHAUSTED:
                    refusal = refusal_of(error)
                    assert (refusal.reason, bool(refusal.retry_after_s)) == ("OVERLOADED", True)
                    early.append(time.monotonic() - called)
                    time.sleep(0.2)  # a pause before the next call, shorter than the refusal demands

            with counting:
                total[name, code] += 1

    with slow_counts(front), ThreadPoolExecutor(300) as threads:
        work = [(name, call) for name, (callers, call) in calls.items() for _ in range(callers)]
        list(threads.map(lambda each: call_on(*each), work))

    for name, least in LEAST.items():
        assert total[name, StatusCode.OK] >= least, (name, total)
    for name in ("read", "user", "list"):
        refused = sum(count for (of, code), count in total.items() if of == name and code is not StatusCode.OK)
        assert refused <= 0.1 * total[name, StatusCode.OK], (name, total)
    # Most of the other counts are refused at once because there is no place, and not at their deadline.
    assert total["count", StatusCode.RESOURCE_EXHAUSTED] > total["count", StatusCode.DEADLINE_EXCEEDED], total
    assert sorted(early)[len(early) // 2] < DEADLINE_S / 2, sorted(early)[::50]


def _edit(front: FrontUnderTest, slug: str) -> None:
    segment = pb.Segment(slug=slug, description=new_slug())
    front.segments.UpdateSegment(pb.UpdateSegmentRequest(segment=segment), timeout=DEADLINE_S)
    time.sleep(0.1)


def _roll_out(front: FrontUnderTest, slug: str) -> object:
    operation = roll_out(front, slug, int(time.monotonic()) % 100, timeout=2 * DEADLINE_S)
    return operation if operation.done else NOT_DONE
