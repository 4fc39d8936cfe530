"""The hot lane answers rightly and in time while the cache or a shard is down, hangs or is overloaded."""

from __future__ import annotations

import threading

import pytest
import sqlalchemy as sa
from google.rpc import code_pb2

from grpc_api.hot.lane import BATCH_SHARE
from segsvc.local.postgres import PostgresServer
from tests.eventually import eventually, quick, seconds_of
from tests.installation import KEYS
from tests.integration.cache.conftest import World
from tests.integration.cache.lane_front import Lane, RefusedError, Start, reads, refusal_in_time

# -- dependencies that are down -------------------------------------------------------------------------------------


@pytest.fixture
def own_lane(own_world: World, start: Start) -> Lane:
    own_world.add_users(20)
    own_world.add_segment("beta", [2, 4, 5])
    return start(own_world)


def hits(lane: Lane, user_id: int) -> bool:
    before = reads("hit")
    lane.segments(user_id)
    return reads("hit") == before + 1


def test_cache_goes_down_and_comes_back(own_world: World, own_lane: Lane) -> None:
    eventually(lambda: hits(own_lane, 4))
    own_world.server.kill()

    before = reads("bypass")
    for _ in range(5):
        assert own_lane.segments(4, timeout_s=20) == ["beta"]
    assert own_lane.batch([5, 6], timeout_s=20).results[0].user_segments.slugs == ["beta"]
    assert reads("bypass") - before == 7

    own_world.server.start()
    eventually(lambda: hits(own_lane, 4))


def test_cache_hangs_and_goes_on(own_world: World, own_lane: Lane) -> None:
    eventually(lambda: hits(own_lane, 4))
    own_world.server.pause()

    # The call waits for the cache's timeout twice: once for the lane and once for the load.
    assert own_lane.segments(4) == ["beta"]

    # Calls must not wait for a cache that is known to be down, apart from the one that tries it again.
    took = sorted(seconds_of(lambda: own_lane.segments(4)) for _ in range(40))
    assert took[10] < own_world.settings.cache_timeout_s, took
    assert own_lane.segments(4) == ["beta"]

    own_world.server.resume()
    eventually(lambda: hits(own_lane, 4))


def test_a_cache_that_hangs_is_what_a_refusal_names(own_world: World, start: Start) -> None:
    """The shard was not queried, so the refusal must not name it."""
    own_world.add_users(4)
    lane = start(own_world, cache_timeout_s=1.0)
    eventually(lambda: hits(lane, 4))
    own_world.server.pause()

    try:
        # The lane waits for the cache once, and then the load waits for it.
        error = refusal_in_time(lambda: lane.segments(4, timeout_s=1.7))
    finally:
        own_world.server.resume()

    assert (error.code, error.reason) == (code_pb2.DEADLINE_EXCEEDED, "DEADLINE_EXCEEDED")
    assert "the cache" in error.message
    assert "shard" not in error.message
    eventually(lambda: hits(lane, 4))


def test_lane_starts_without_a_cache(own_world: World, start: Start) -> None:
    own_world.add_users(4)
    own_world.server.kill()
    lane = start(own_world)
    assert lane.segments(4) == []
    own_world.server.start()
    eventually(lambda: hits(lane, 4))


def test_cache_restarted_with_older_data_is_not_believed(own_world: World, own_lane: Lane) -> None:
    eventually(lambda: hits(own_lane, 4))
    own_world.reader.connect()
    dumps = {key: own_world.raw.dump(key) for key in (KEYS.generation(0), KEYS.user(0, 4))}
    own_world.server.restart()
    eventually(own_world.raw.ping)
    own_world.installation.execute(0, "DELETE FROM memberships")
    own_world.client.drop_generations([0])
    for key, dump in dumps.items():
        own_world.raw.restore(key, 0, dump)
    assert own_lane.segments(4) == []


class Shard0:
    """The first shard's database: closed as long as the block lasts."""

    def __init__(self, server: PostgresServer) -> None:
        self._engine = sa.create_engine(server.dsn("postgres"), isolation_level="AUTOCOMMIT", poolclass=sa.NullPool)

    def __enter__(self) -> None:
        self._run("ALTER DATABASE test_shard0 ALLOW_CONNECTIONS false")
        self._run("SELECT pg_terminate_backend(pid) FROM pg_stat_activity WHERE datname = 'test_shard0'")

    def __exit__(self, *_: object) -> None:
        self._run("ALTER DATABASE test_shard0 ALLOW_CONNECTIONS true")

    def _run(self, statement: str) -> None:
        with self._engine.connect() as connection:
            connection.exec_driver_sql(statement)


def test_shard_goes_down_and_comes_back(world: World, lane: Lane, pg_server: PostgresServer) -> None:
    lane.segments(4)
    eventually(lambda: world.is_cached(4))

    with Shard0(pg_server):

        def read_refused() -> None:
            with pytest.raises(RefusedError) as refused:
                lane.segments(2)
            error = refused.value
            assert (error.code, error.reason) == (code_pb2.UNAVAILABLE, "SHARD_UNAVAILABLE")
            assert error.retry_s == 1.0

        for _ in range(3):
            quick(read_refused, within_s=1.5)
        assert lane.segments(4) == ["alpha", "beta"], "what is cached needs no shard"
        assert lane.segments(5) == ["beta"], "other shards work"
        results = lane.batch([2, 4, 7]).results
        assert [result.WhichOneof("outcome") for result in results] == ["error", "user_segments", "user_segments"]

    def back() -> bool:
        try:
            return lane.segments(2) == ["beta"]
        except RefusedError:
            return False

    eventually(back)
    eventually(lambda: world.is_cached(2))


def test_restarted_shard_costs_no_call(world: World, lane: Lane) -> None:
    """Connections that broke while they were idle are noticed before they are used."""
    lane.segments(4)
    world.installation.execute(
        0,
        "SELECT pg_terminate_backend(pid) FROM pg_stat_activity "
        "WHERE datname = current_database() AND pid <> pg_backend_pid()",
    )
    assert lane.segments(2) == ["beta"]


def test_more_reads_than_may_wait_are_refused(world: World, start: Start) -> None:
    world.add_users(100)
    lane = start(world, cold_reads_max=10, cold_read_threads=1)
    assert lane.segments(99) == []

    with world.databases.shards[0].begin() as blocker:
        blocker.exec_driver_sql("LOCK TABLE users IN ACCESS EXCLUSIVE MODE")
        threads = [threading.Thread(target=lambda: lane.batch(range(2, 22, 2), timeout_s=20))]
        threads[0].start()

        # A batch leaves places for calls for one user.
        eventually(lambda: lane.reads.cold.waiting == int(BATCH_SHARE * 10))
        for user_id in (22, 24, 26):
            threads.append(threading.Thread(target=lane.segments, args=(user_id, 20)))
            threads[-1].start()
        eventually(lambda: lane.reads.cold.waiting == 10)

        with pytest.raises(RefusedError) as refused:
            lane.segments(40)
        assert (refused.value.code, refused.value.reason) == (code_pb2.RESOURCE_EXHAUSTED, "OVERLOADED")
        assert refused.value.retry_s
        assert lane.segments(41) == [], "the other shard has its own bound"

    for thread in threads:
        thread.join(20)
    eventually(lambda: lane.reads.cold.waiting == 0)
    assert lane.segments(40) == []


def test_deadline_of_a_call_that_waits_for_a_shard(world: World, lane: Lane) -> None:
    with world.databases.shards[0].begin() as blocker:
        blocker.exec_driver_sql("LOCK TABLE users IN ACCESS EXCLUSIVE MODE")

        def read_late() -> None:
            with pytest.raises(RefusedError) as refused:
                lane.segments(4, timeout_s=0.3)
            assert refused.value.code == code_pb2.DEADLINE_EXCEEDED
            eventually(lambda: lane.reads.cold.waiting == 0)

        quick(read_late, within_s=1.5)
    assert lane.segments(4) == ["alpha", "beta"]
