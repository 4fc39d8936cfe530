"""Calls for many users and calls for one take turns on the lane's thread."""

from __future__ import annotations

from concurrent.futures import Future

from segmentation.v1 import membership_pb2 as pb

from grpc_api.lane_calls import BATCH_GET_USER_SEGMENTS, GET_USER_SEGMENTS
from grpc_api.membership_wire import BATCH_USERS_MAX
from tests.integration.cache.conftest import World
from tests.integration.cache.lane_front import queued_lane

BATCHES = 40


def test_single_read_waits_for_one_turn_of_batches_and_not_for_all(world: World) -> None:
    """It comes while the first batch is answered, when all batches have been taken; and is answered before most."""
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
        # Called on the lane's thread, before it does anything else.
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
    # At most the turn that was under way, and one more if its first batch was taken alone; a turn is of some thousand
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
