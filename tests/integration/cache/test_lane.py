"""The hot lane on a real cache and real shards, by both entries: the same answers and the same refusals."""

from __future__ import annotations

import threading
import time
from collections.abc import Iterator
from concurrent.futures import ThreadPoolExecutor

import grpc
import pytest
from google.rpc import code_pb2
from segmentation.v1 import membership_pb2 as pb

import grpc_api.hot.lane
from grpc_api.call_scope import REQUEST_ID_KEY
from grpc_api.hot.calls import BATCH_GET_USER_SEGMENTS, GET_USER_SEGMENTS
from tests.eventually import eventually
from tests.installation import KEYS
from tests.integration.cache.conftest import World
from tests.integration.cache.lane_front import LANES, Lane, RefusedError, Start, native_lane, reads

INCLUDE = 1
NO_SUCH_USER = 999_999


# -- answers --------------------------------------------------------------------------------------------------------


def test_miss_and_hit_are_the_same_answer(world: World, lane: Lane) -> None:
    before_hits, before_misses = reads("hit"), reads("miss")
    miss = lane.answer(4)
    eventually(lambda: world.is_cached(4))
    hit = lane.answer(4)
    assert hit == miss
    assert (list(hit.slugs), hit.user_id) == (["alpha", "beta"], 4)
    assert abs(hit.read_time.ToNanoseconds() / 1e9 - time.time()) < 10
    assert (reads("hit") - before_hits, reads("miss") - before_misses) == (1, 1)


def test_user_in_no_segment_has_an_empty_list(world: World, lane: Lane) -> None:
    assert lane.segments(6) == []
    eventually(lambda: world.is_cached(6))
    assert lane.segments(6) == []


def test_unknown_user_is_refused_and_leaves_nothing_in_the_cache(world: World, lane: Lane) -> None:
    with pytest.raises(RefusedError) as refused:
        lane.segments(NO_SUCH_USER)
    assert (refused.value.code, refused.value.reason) == (code_pb2.NOT_FOUND, "USER_NOT_FOUND")
    key = KEYS.user(NO_SUCH_USER % 2, NO_SUCH_USER)
    eventually(lambda: not world.raw.exists(key))


def test_user_created_after_a_read_is_found(world: World, lane: Lane) -> None:
    """No step at the cache is necessary for it."""
    with pytest.raises(RefusedError):
        lane.segments(22)
    world.installation.execute(0, "INSERT INTO users (id, slot, attributes, version) VALUES (22, 500, '{}', 0)")
    assert lane.segments(22) == []


def test_largest_user_id(world: World, lane: Lane) -> None:
    user = 2**63 - 1
    world.installation.execute(
        1, "INSERT INTO users (id, slot, attributes, version) VALUES (:id, 501, '{}', 0)", id=user
    )
    assert lane.segments(user) == []
    eventually(lambda: world.is_cached(user))
    assert lane.answer(user).user_id == user


def test_segment_created_since_is_named(world: World, lane: Lane) -> None:
    """An entry may hold ids that are new to this front: another front or the warmer filled it."""
    lane.segments(4)
    world.add_segment("newest", [7])
    world.fill(7)
    assert lane.segments(7) == ["newest"]
    before = reads("hit")
    assert lane.segments(7) == ["newest"]
    assert reads("hit") == before + 1


def test_batch_answers_each_in_the_order_asked(world: World, lane: Lane) -> None:
    lane.segments(4)
    asked = [5, NO_SUCH_USER, 4, 0, 5, -3, 6]

    results = lane.batch(asked).results
    assert len(results) == len(asked)
    assert [list(r.user_segments.slugs) if r.HasField("user_segments") else r.error.code for r in results] == [
        ["beta"],
        code_pb2.NOT_FOUND,
        ["alpha", "beta"],
        code_pb2.INVALID_ARGUMENT,
        ["beta"],
        code_pb2.INVALID_ARGUMENT,
        [],
    ]

    assert [r.user_segments.user_id for r in results if r.HasField("user_segments")] == [5, 4, 5, 6]

    errors = [RefusedError(r.error) for r in results if r.HasField("error")]
    assert [(e.reason, e.fields) for e in errors] == [
        ("USER_NOT_FOUND", []),
        ("FIELD_REQUIRED", ["user_ids[3]"]),
        ("FIELD_INVALID", ["user_ids[5]"]),
    ]


def test_batch_of_only_impossible_users(lane: Lane) -> None:
    assert [result.error.code for result in lane.batch([0, -1]).results] == [code_pb2.INVALID_ARGUMENT] * 2


def test_large_batches_side_by_side(world: World, start: Start) -> None:
    users = world.add_users(3000)
    world.add_segment("thirds", [user for user in users if user % 3 == 0])
    lane = start(world)

    def ask(first: int) -> bool:
        results = lane.batch(range(first, first + 1000), timeout_s=30).results
        return all(
            list(result.user_segments.slugs) == (["thirds"] if (first + n) % 3 == 0 else [])
            for n, result in enumerate(results)
        )

    with ThreadPoolExecutor(6) as threads:
        assert all(threads.map(ask, [1, 1001, 2001, 501, 1501, 1]))


def test_single_reads_among_batches(world: World, start: Start) -> None:
    """While batches keep coming, calls for one user get their turns, and each call gets its own answer."""
    users = world.add_users(400)
    world.add_segment("thirds", [user for user in users if user % 3 == 0])
    world.fill(*users)
    lane = start(world)
    stop = threading.Event()

    def batches(first: int) -> int:
        asked = 0
        while not stop.is_set():
            size = 1 + asked % 7 * 50
            results = lane.batch(range(first, first + size), timeout_s=30).results
            assert [result.user_segments.user_id for result in results] == list(range(first, first + size))
            asked += 1
        return asked

    with ThreadPoolExecutor(4) as threads:
        running = [threads.submit(batches, first) for first in (1, 20, 40, 60)]
        try:
            for user in users[:200]:
                assert lane.segments(user, timeout_s=30) == (["thirds"] if user % 3 == 0 else [])
        finally:
            stop.set()
        assert all(batch.result() for batch in running)


# -- refusals -------------------------------------------------------------------------------------------------------


@pytest.mark.parametrize(
    ("user_id", "reason"), [(0, "FIELD_REQUIRED"), (-1, "FIELD_INVALID"), (-(2**63), "FIELD_INVALID")]
)
def test_impossible_user_id_is_refused(lane: Lane, user_id: int, reason: str) -> None:
    with pytest.raises(RefusedError) as refused:
        lane.segments(user_id)
    error = refused.value
    assert (error.code, error.reason, error.fields) == (code_pb2.INVALID_ARGUMENT, reason, ["user_id"])


@pytest.mark.parametrize(("count", "reason"), [(0, "FIELD_REQUIRED"), (1001, "BATCH_TOO_LARGE")])
def test_batch_without_users_or_with_too_many_is_refused(lane: Lane, count: int, reason: str) -> None:
    with pytest.raises(RefusedError) as refused:
        lane.batch([4] * count)
    error = refused.value
    assert (error.code, error.reason, error.fields) == (code_pb2.INVALID_ARGUMENT, reason, ["user_ids"])


@pytest.mark.parametrize("method", [GET_USER_SEGMENTS, BATCH_GET_USER_SEGMENTS])
def test_bytes_that_are_no_request_are_refused(lane: Lane, method: str) -> None:
    with pytest.raises(RefusedError) as refused:
        lane.ask(method, b"\xff\xff\xff", 5.0)
    assert (refused.value.code, refused.value.reason) == (code_pb2.INTERNAL, "INTERNAL")
    assert lane.segments(5) == ["beta"]


@pytest.mark.parametrize("method", ["lookup", "lookups"])
def test_fault_of_ours_costs_the_calls_of_its_batch_and_no_more(
    lane: Lane, monkeypatch: pytest.MonkeyPatch, method: str
) -> None:
    def fail(users: object) -> None:
        raise RuntimeError("a secret")

    with monkeypatch.context() as patched:
        patched.setattr(lane.reads.entries, method, fail)
        with pytest.raises(RefusedError) as refused:
            lane.segments(4) if method == "lookup" else lane.batch([4])
    assert (refused.value.code, refused.value.reason) == (code_pb2.INTERNAL, "INTERNAL")
    assert "secret" not in refused.value.message
    assert lane.segments(5) == ["beta"]


# -- changes are seen -----------------------------------------------------------------------------------------------


def test_bulk_change_is_seen_when_it_is_done(world: World, lane: Lane) -> None:
    segment = world.add_segment("ramp", [4])
    assert lane.segments(4) == ["alpha", "beta", "ramp"]
    eventually(lambda: world.is_cached(4))
    world.set_members(segment, [5])
    assert lane.segments(4) == ["alpha", "beta", "ramp"], "before it is done, the cache may still answer"
    world.client.drop_generations([0, 1])
    assert lane.segments(4) == ["alpha", "beta"]
    assert lane.segments(5) == ["beta", "ramp"]


def test_bulk_change_leaves_the_cache_hot(world: World, lane: Lane) -> None:
    """Single reads and batches are hits with the new lists. The segment is created meanwhile, so the first read of a
    member learns its slug from the shard."""
    users = list(range(1, 21))
    for user in users:
        lane.segments(user)
    eventually(lambda: world.is_cached(*users))

    segment = world.add_segment("ramp", range(10, 21))
    world.publish(world.bulk_change(segment, range(10, 21)))
    assert lane.segments(10) == ["ramp"]
    eventually(lambda: world.is_cached(10))

    hits = reads("hit")
    for user in (4, 5, 9, 11):
        expected = ["alpha"] * (user == 4) + ["beta"] * (user in (4, 5)) + ["ramp"] * (user >= 10)
        assert lane.segments(user) == expected
    answered = [list(result.user_segments.slugs) for result in lane.batch(users).results]
    assert answered == [lane.segments(user) for user in users]
    assert reads("hit") - hits == 4 + 2 * len(users)


def test_change_of_one_user_is_seen_when_it_is_acknowledged(world: World, lane: Lane) -> None:
    lane.segments(4)
    eventually(lambda: world.is_cached(4))
    world.installation.execute(0, "DELETE FROM users WHERE id = 4")
    world.client.drop_entries(0, [4])
    with pytest.raises(RefusedError) as refused:
        lane.segments(4)
    assert refused.value.reason == "USER_NOT_FOUND"


def test_reads_of_a_barred_user_go_to_the_shard(world: World, lane: Lane) -> None:
    token = world.client.bar(0, 4)
    assert lane.segments(4) == ["alpha", "beta"]
    assert world.raw.get(KEYS.user(0, 4)) == b"B" + token


def test_override_ends_without_any_write(world: World, lane: Lane) -> None:
    segment = world.add_segment("trial")
    world.override(4, segment, INCLUDE, 2.0)
    assert lane.segments(4) == ["alpha", "beta", "trial"]
    eventually(lambda: lane.segments(4) == ["alpha", "beta"])
    eventually(lambda: world.is_cached(4))


# -- what the lane reports ------------------------------------------------------------------------------------------


def test_reads_are_counted_for_the_warmer(world: World, start: Start, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(grpc_api.hot.lane, "COUNTS_EVERY_S", 0.2)
    users = world.add_users(2 * 1100)
    lane = start(world)

    for _ in range(3):
        lane.segments(users[1])  # shard 0, block 0
    lane.batch([users[2099], users[2098], NO_SUCH_USER])  # block 1 of shards 0 and 1

    def counts(shard: int) -> dict[bytes, float]:
        return dict(world.raw.zrange(KEYS.hot(shard), 0, -1, withscores=True))

    eventually(lambda: counts(0) == {b"0": 3, b"1": 1} and counts(1) == {b"1": 1})
    assert 0 < world.raw.ttl(KEYS.hot(0)) <= 3600


@pytest.fixture
def native(world: World) -> Iterator[grpc.Channel]:
    world.add_users(4)
    lane = native_lane(world.settings.model_copy(update={"cache_url": world.server.url}))
    assert lane.channel is not None
    yield lane.channel
    lane.close()


@pytest.mark.parametrize("given", [None, "", "x" * 129])
def test_request_id_is_made_if_there_is_none_fit_for_logs(native: grpc.Channel, given: str | None) -> None:
    metadata = [] if given is None else [(REQUEST_ID_KEY, given)]
    made = set()

    for user_id in (4, 4, 4, NO_SUCH_USER):
        request = pb.GetUserSegmentsRequest(user_id=user_id).SerializeToString()
        try:
            _, call = native.unary_unary(GET_USER_SEGMENTS).with_call(request, timeout=5, metadata=metadata)
            made.add(dict(call.initial_metadata())[REQUEST_ID_KEY])
        except grpc.RpcError as error:
            made.add(dict(error.trailing_metadata())[REQUEST_ID_KEY])

    assert len(made) == 4
    assert all(len(request_id) == 32 for request_id in made)


def test_close_answers_what_waits(world: World) -> None:
    world.add_users(4)
    lane = LANES["queued"](world.settings.model_copy(update={"cache_url": world.server.url}))

    with world.databases.shards[0].begin() as blocker:
        blocker.exec_driver_sql("LOCK TABLE users IN ACCESS EXCLUSIVE MODE")
        payload = pb.GetUserSegmentsRequest(user_id=4).SerializeToString()
        future = lane.lane.submit(GET_USER_SEGMENTS, payload, "a test", None)
        eventually(lambda: lane.reads.cold.waiting == 1)

        closing = threading.Thread(target=lane.close)
        closing.start()
        time.sleep(0.1)

    closing.join(10)
    assert pb.UserSegments.FromString(future.result(0)).user_id == 4
