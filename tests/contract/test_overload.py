"""Far more costly calls than the front can do: cheap calls and changes go on, the rest is refused early."""

from __future__ import annotations

import threading
import time
from collections import Counter
from collections.abc import Callable, Iterator
from concurrent.futures import ThreadPoolExecutor
from contextlib import contextmanager
from typing import Any

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
DEADLINE_S = 2.0
PAUSE_S = 0.25
"""The duration of a count here, so that the test does not depend on the machine's speed."""
COSTLY_CALLERS = 250
"""They all call at once, and each one again and again."""

Ended = Counter[tuple[str, StatusCode]]


@contextmanager
def slow_counts(front: FrontUnderTest) -> Iterator[None]:
    """Counts and cold reads, and nothing else, wait on every shard for a lock that is released only for a moment."""
    stop = threading.Event()

    def hold(engine: sa.Engine) -> None:
        while not stop.is_set():
            with engine.begin() as connection:
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


def test_an_overload_of_costly_calls_harms_no_others(front: FrontUnderTest) -> None:
    front.installation.create_users({user_id: {} for user_id in USERS})
    slug = front.create().slug
    calls: dict[str, tuple[int, Callable[[], Any]]] = {
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

    end = time.monotonic() + SECONDS
    late: list[float] = []

    def call_on(name: str, call: Callable[[], Any]) -> Ended:
        ended: Ended = Counter()
        while time.monotonic() < end:
            begun = time.monotonic()
            code = StatusCode.OK

            try:
                call()
            except grpc.RpcError as error:
                code = error.code()  # type: ignore[attr-defined]
                if code is StatusCode.RESOURCE_EXHAUSTED:
                    refusal = refusal_of(error)
                    assert (refusal.reason, bool(refusal.retry_after_s)) == ("OVERLOADED", True)
                    late.append(time.monotonic() - begun)
                    time.sleep(0.2)  # a pause before the next call, shorter than the refusal demands

            ended[name, code] += 1
        return ended

    total: Ended = Counter()
    with slow_counts(front), ThreadPoolExecutor(300) as threads:
        work = [(name, call) for name, (callers, call) in calls.items() for _ in range(callers)]
        for ended in threads.map(lambda each: call_on(*each), work):
            total += ended

    for name in ("read", "user", "list"):
        refused = {code: count for (of, code), count in total.items() if of == name and code is not StatusCode.OK}
        assert total[name, StatusCode.OK] >= 2 * SECONDS, (name, total)
        assert sum(refused.values()) <= 0.1 * total[name, StatusCode.OK], (name, total)
    for name, least in (("edit", SECONDS), ("rollout", 1)):  # a rollout waits for the same locks, four times
        found = {code.name: count for (of, code), count in total.items() if of == name}
        assert found.get("OK", 0) >= least, (name, found)
    # Most of the other counts are refused at once because there is no place, and not at their deadline.
    assert total["count", StatusCode.OK] > 0, total
    assert total["count", StatusCode.RESOURCE_EXHAUSTED] > total["count", StatusCode.DEADLINE_EXCEEDED], total
    assert sorted(late)[len(late) // 2] < DEADLINE_S / 2, sorted(late)[::50]


def _edit(front: FrontUnderTest, slug: str) -> None:
    segment = pb.Segment(slug=slug, description=new_slug())
    front.segments.UpdateSegment(pb.UpdateSegmentRequest(segment=segment), timeout=DEADLINE_S)
    time.sleep(0.1)


def _roll_out(front: FrontUnderTest, slug: str) -> None:
    operation = roll_out(front, slug, int(time.monotonic()) % 100, timeout=2 * DEADLINE_S)
    assert operation.done, "it was not done in time"
