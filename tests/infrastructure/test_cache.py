"""The cache is emptied during a fill or a publication, has no memory left, comes back with old data, or is replaced by
an empty cache."""

from __future__ import annotations

from collections.abc import Iterator
from contextlib import ExitStack, contextmanager

import pytest
import redis
import sqlalchemy as sa
from segmentation.v1 import membership_pb2

from segsvc.bootstrap import Inspection
from segsvc.cli.front import is_serving
from segsvc.demo.client import Client
from segsvc.local.processes import free_ports
from tests.eventually import eventually
from tests.infrastructure.system import SHARDS, System


@pytest.fixture
def raw(system: System) -> Iterator[redis.Redis]:
    with redis.Redis.from_url(system.cache.url) as server:
        yield server


def warm(system: System, slug: str, percent: float) -> None:
    """Wait until every user is a hit, and check that the answers are right."""
    inspection = Inspection(system.settings)
    try:
        eventually(lambda: system.read(slug) and None not in inspection.cached(system.users))
    finally:
        inspection.close()
    assert system.read(slug) == system.members(slug, percent)


@contextmanager
def locked_reads(system: System, shard: int) -> Iterator[None]:
    """Make the reads of a shard's memberships wait as long as the block lasts."""
    engine = sa.create_engine(system.settings.shard_dsns[shard], poolclass=sa.NullPool)
    with engine.begin() as connection:
        connection.exec_driver_sql("LOCK TABLE memberships IN ACCESS EXCLUSIVE MODE")
        yield


def reads_that(system: System, shard: int, what: str) -> int:
    """Number of sessions of cold reads in this state."""
    statement = f"SELECT FROM pg_stat_activity WHERE application_name = 'segsvc-reads' AND {what}"
    return len(system.installation.execute(shard, f"{statement} AND datname = current_database()"))


@pytest.mark.infrastructure
def test_the_cache_is_emptied_between_a_read_and_its_fill(system: System, slug: str, raw: redis.Redis) -> None:
    system.new_segment(slug, 0)
    user = min(system.members(slug, 60))
    shard = user % SHARDS
    request = membership_pb2.GetUserSegmentsRequest(user_id=user)

    other_address = f"127.0.0.1:{free_ports(1)[0]}"

    with system.another("other-front", ["serve"], grpc_address=other_address) as own:
        eventually(lambda: is_serving(own), 60)
        other = Client.of(system.settings.model_copy(update={"grpc_address": other_address}))
        # Warming fills as well, and in this test only this one reader may fill.
        with system.frozen("worker-warming"):
            raw.flushall()
            with locked_reads(system, shard):
                answer = system.client.memberships.GetUserSegments.future(request, timeout=60)
                eventually(lambda: (raw.get(system.keys.user(shard, user)) or b"").startswith(b"L"))
                eventually(lambda: reads_that(system, shard, "wait_event_type = 'Lock'") == 1)
                reader = system.frozen("serve")
                reader.__enter__()

            # The reader has the lease, and the old list is in its socket.
            eventually(lambda: reads_that(system, shard, "wait_event_type = 'Lock'") == 0)
            raw.flushall()
            other.roll_out(slug, 60)
            reader.__exit__(None, None, None)

        assert slug not in answer.result().slugs
        assert system.read(slug) == system.read(slug, other) == system.members(slug, 60)
        other.close()

    system.expect_well(slug, 60)


@pytest.mark.parametrize("when", ["at rest", pytest.param("in flight", marks=pytest.mark.infrastructure)])
def test_the_cache_comes_back_with_what_it_held_long_ago(
    system: System, slug: str, raw: redis.Redis, when: str
) -> None:
    system.new_segment(slug, 20)
    warm(system, slug, 20)
    held = {shard: raw.get(system.keys.generation(shard)) for shard in range(SHARDS)}

    raw.save()
    try:
        if when == "at rest":
            system.client.roll_out(slug, 60)
            system.cache.kill()
            system.cache.start()
        else:
            with system.armed("invalidated-not-done") as point:
                name = system.client.start_roll_out(slug, 60)
                point.await_fired()
                system.cache.kill()
                system.cache.start()
                # All old entries and old generations exist again: the dropped generation has come back.
                assert raw.dbsize() > len(system.users)
                assert {shard: raw.get(system.keys.generation(shard)) for shard in range(SHARDS)} == held
            eventually(lambda: system.state(name) == "DONE")

        assert raw.exists(system.keys.user(1, 1))
        assert system.read(slug) == system.members(slug, 60)
        warm(system, slug, 60)
    finally:
        (system.cache.folder / "dump.rdb").unlink()

    system.expect_well(slug, 60)


@pytest.mark.parametrize(
    "point",
    [
        "committed-not-invalidated",
        pytest.param("prepared-not-voted", marks=pytest.mark.infrastructure),
        pytest.param("patch-written-not-appended", marks=pytest.mark.infrastructure),
    ],
)
def test_an_empty_cache_takes_the_place_of_one_that_is_lost(
    system: System, slug: str, raw: redis.Redis, point: str
) -> None:
    system.new_segment(slug, 20)
    warm(system, slug, 20)

    with system.armed(point) as held:
        name = system.client.start_roll_out(slug, 60)
        held.await_fired()
        system.cache.kill()
        # Without a cache the shards answer the reads.
        assert system.read(slug) in (system.members(slug, 20), system.members(slug, 60))
        system.cache.start()

    eventually(lambda: system.state(name) == "DONE")
    assert system.read(slug) == system.members(slug, 60)
    warm(system, slug, 60)
    system.expect_well(slug, 60)


@pytest.mark.infrastructure
def test_the_cache_is_away_when_it_must_be_told(system: System, slug: str) -> None:
    system.new_segment(slug, 20)
    warm(system, slug, 20)

    with system.armed("committed-not-invalidated") as held:
        name = system.client.start_roll_out(slug, 60)
        held.await_fired()
        system.cache.kill()

    seen = system.log_ends()
    eventually(lambda: "CACHE_UNAVAILABLE" in system.logged(seen))
    assert system.state(name) == "COMMITTED"  # no caller may be told that it is done

    system.cache.start()
    eventually(lambda: system.state(name) == "DONE")
    system.expect_well(slug, 60)


@pytest.mark.infrastructure
def test_the_cache_is_emptied_while_a_patch_is_published(system: System, slug: str, raw: redis.Redis) -> None:
    system.new_segment(slug, 20)
    warm(system, slug, 20)

    with system.armed("patch-written-not-appended") as held:
        name = system.client.start_roll_out(slug, 60)
        held.await_fired()
        assert chunks_of(system, raw)
        raw.flushall()
        # Every shard has committed, so what is read and filled now, under other generations, is of the new rule.
        assert system.read(slug) == system.members(slug, 60)

    eventually(lambda: system.state(name) == "DONE")
    assert system.read(slug) == system.members(slug, 60)
    warm(system, slug, 60)
    system.expect_well(slug, 60)


@pytest.mark.infrastructure
@pytest.mark.parametrize("point", ["patch-read-not-written", "patch-written-not-appended"])
def test_no_memory_is_left_for_a_patch(system: System, slug: str, raw: redis.Redis, point: str) -> None:
    system.new_segment(slug, 20)
    warm(system, slug, 20)
    seen = system.log_ends()

    with ExitStack() as memory:
        with system.armed(point) as held:
            name = system.client.start_roll_out(slug, 60)
            held.await_fired()
            memory.enter_context(full(raw))
        # What cannot be patched is dropped: that frees memory, so it is possible.
        eventually(lambda: system.state(name) == "DONE")
        assert '"event": "patch_not_published"' in system.logged(seen)
        assert not [shard for shard in range(SHARDS) if raw.exists(system.keys.generation(shard))]
        assert system.read(slug) == system.members(slug, 60)

    warm(system, slug, 60)
    system.expect_well(slug, 60)


@pytest.mark.parametrize(
    "lost",
    ["chunks", pytest.param("lists", marks=pytest.mark.infrastructure)],
)
def test_patches_that_are_lost_make_misses_and_no_wrong_lists(
    system: System, slug: str, raw: redis.Redis, lost: str
) -> None:
    system.new_segment(slug, 20)
    warm(system, slug, 20)

    with system.frozen("worker-warming"):
        for percent in (60, 35):
            system.client.roll_out(slug, percent)
        inspection = Inspection(system.settings)
        try:
            # Nobody has filled anything since: these are the entries of before, with two patches laid over them.
            assert None not in inspection.cached(system.users)
        finally:
            inspection.close()

        keys = chunks_of(system, raw) if lost == "chunks" else [system.keys.patches(shard) for shard in range(SHARDS)]
        assert raw.delete(*keys)
        inspection = Inspection(system.settings)
        try:
            assert inspection.cached(system.users).count(None) == len(system.users)
        finally:
            inspection.close()
        assert system.read(slug) == system.members(slug, 35)

    warm(system, slug, 35)
    system.expect_well(slug, 35)


def chunks_of(system: System, raw: redis.Redis) -> list[bytes]:
    """Keys of all chunks of patches."""
    prefixes = [system.keys.chunk_prefix(shard) for shard in range(SHARDS)]
    return [key for prefix in prefixes for key in raw.scan_iter(prefix + b"*", count=10_000)]


@contextmanager
def full(raw: redis.Redis) -> Iterator[None]:
    """Let the cache refuse, as long as the block lasts, everything that could need memory."""
    policy = raw.config_get("maxmemory-policy")["maxmemory-policy"]
    raw.config_set("maxmemory-policy", "noeviction")
    raw.config_set("maxmemory", "1mb")
    try:
        with pytest.raises(redis.ResponseError, match="used memory"):
            raw.set("anything", 1)
        yield
    finally:
        raw.config_set("maxmemory", 0)
        raw.config_set("maxmemory-policy", policy)
