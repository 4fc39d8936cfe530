"""Calls for many users and calls for one take turns on the lane's thread."""

from __future__ import annotations

import statistics
import threading
import time
from collections.abc import Sequence
from concurrent.futures import Future

import pytest
from segmentation.v1 import membership_pb2 as pb

from grpc_api.hot.calls import BATCH_GET_USER_SEGMENTS, GET_USER_SEGMENTS
from grpc_api.hot.wire import BATCH_USERS_MAX
from segsvc.domain.errors import Reason, ServiceError
from tests.eventually import eventually, seconds_of
from tests.integration.cache.conftest import World
from tests.integration.cache.lane_front import Lane, Start, queued_lane

BATCHES = 40


def test_single_read_waits_for_one_turn_of_batches_and_not_for_all(world: World) -> None:
    """It comes while the first batch is answered and all batches are taken, and is answered before most of them."""
    users = world.add_users(10)
    world.fill(*users)
    lane = queued_lane(world.settings.model_copy(update={"cache_url": world.server.url}))
    batch = pb.BatchGetUserSegmentsRequest(user_ids=users * (BATCH_USERS_MAX // len(users))).SerializeToString()
    single = pb.GetUserSegmentsRequest(user_id=users[0]).SerializeToString()
    ended: list[str] = []
    answers: list[Future[bytes]] = []

    def submit(method: str, payload: bytes, name: str) -> None:
        answer = lane.lane.submit(method, payload, name, None)
        answers.append(answer)
        # The callback runs on the lane's thread, before the thread does anything else.
        answer.add_done_callback(lambda _: ended.append(name))

    try:
        for number in range(BATCHES):
            submit(BATCH_GET_USER_SEGMENTS, batch, f"batch {number}")
        answers[0].add_done_callback(lambda _: submit(GET_USER_SEGMENTS, single, "single"))
        for answer in answers[:BATCHES]:
            assert len(pb.BatchGetUserSegmentsResponse.FromString(answer.result(10)).results) == BATCH_USERS_MAX
        assert pb.UserSegments.FromString(answers[BATCHES].result(10)).user_id == users[0]
    finally:
        lane.close()
    batches = [name for name in ended if name != "single"]
    assert batches == [f"batch {number}" for number in range(BATCHES)]
    # At most the round that was under way, and one more if its first batch was taken alone; a round has some thousand
    # users.
    assert ended.index("single") <= 6


def test_batches_that_wait_for_their_turn_are_answered_when_the_lane_closes(world: World) -> None:
    users = world.add_users(10)
    world.fill(*users)
    lane = queued_lane(world.settings.model_copy(update={"cache_url": world.server.url}))
    batch = pb.BatchGetUserSegmentsRequest(user_ids=users * (BATCH_USERS_MAX // len(users))).SerializeToString()

    answers = [lane.lane.submit(BATCH_GET_USER_SEGMENTS, batch, "a test", None) for _ in range(BATCHES)]

    lane.close()
    for answer in answers:
        assert len(pb.BatchGetUserSegmentsResponse.FromString(answer.result(0)).results) == BATCH_USERS_MAX


def asked(lane: Lane, monkeypatch: pytest.MonkeyPatch) -> list[int]:
    """Users that the lane looks up in the cache from now on, in batches."""
    users: list[int] = []
    lookups = lane.reads.entries.lookups

    def noting(user_ids: Sequence[int], users_per_command: int) -> object:
        users.extend(user_ids)
        return lookups(user_ids, users_per_command)

    monkeypatch.setattr(lane.reads.entries, "lookups", noting)
    return users


@pytest.mark.parametrize("leaving", ["cancelled", "too late"])
def test_abandoned_batches_are_not_computed(
    world: World, start: Start, monkeypatch: pytest.MonkeyPatch, leaving: str
) -> None:
    """Their clients leave, or their deadlines pass, while the lane is busy with the first call."""
    users = world.add_users(10)
    world.fill(*users)
    lane = start(world)
    lane.segments(users[0])
    computed = asked(lane, monkeypatch)

    held: list[Sequence[int]] = []
    go_on, lookup = threading.Event(), lane.reads.entries.lookup

    def busy_lookup(user_ids: Sequence[int]) -> object:
        held.append(user_ids)
        go_on.wait(20)
        return lookup(user_ids)

    monkeypatch.setattr(lane.reads.entries, "lookup", busy_lookup)

    def batch_of(user_id: int) -> bytes:
        return pb.BatchGetUserSegmentsRequest(user_ids=[user_id] * 100).SerializeToString()

    single = pb.GetUserSegmentsRequest(user_id=users[0]).SerializeToString()
    blocker = lane.send(GET_USER_SEGMENTS, single, 20)
    eventually(lambda: held)

    left_s = 0.3 if leaving == "too late" else 20
    left = [lane.send(BATCH_GET_USER_SEGMENTS, batch_of(users[1]), left_s) for _ in range(20)]
    stays = lane.send(BATCH_GET_USER_SEGMENTS, batch_of(users[2]), 20)

    time.sleep(0.2)  # the front has all calls
    if leaving == "cancelled":
        for call in left:
            call.cancel()
    time.sleep(0.4)  # the deadlines of the late calls have passed

    go_on.set()
    assert blocker.result(20)
    assert len(pb.BatchGetUserSegmentsResponse.FromString(stays.result(20)).results) == 100

    assert set(computed) == {users[0], users[2]}


def test_batches_that_would_be_late_are_refused_at_once(world: World) -> None:
    """Once the lane knows how long batches take; the remaining batches are answered in time."""
    users = world.add_users(10)
    world.fill(*users)
    lane = queued_lane(world.settings.model_copy(update={"cache_url": world.server.url}))
    batch = pb.BatchGetUserSegmentsRequest(user_ids=users * (BATCH_USERS_MAX // len(users))).SerializeToString()

    try:
        lane.lane.submit(BATCH_GET_USER_SEGMENTS, batch, "a test", None).result(20)

        def one() -> None:
            lane.lane.submit(BATCH_GET_USER_SEGMENTS, batch, "a test", None).result(20)

        # The median: a busy machine delays some of them.
        left_s = 50 * statistics.median(seconds_of(one) for _ in range(20))
        answers = [
            lane.lane.submit(BATCH_GET_USER_SEGMENTS, batch, "a test", time.monotonic() + left_s) for _ in range(400)
        ]
        ended = [_how(answer) for answer in answers]
    finally:
        lane.close()

    assert ended.count("answered") >= 5
    assert ended.count("OVERLOADED") >= 200
    eventually(lambda: all(answer.done() for answer in answers))


def _how(answer: Future[bytes]) -> str:
    try:
        answer.result(20)
    except ServiceError as error:
        return error.reason.text if error.retry_after_s or error.reason is not Reason.OVERLOADED else "no RetryInfo"
    return "answered"
