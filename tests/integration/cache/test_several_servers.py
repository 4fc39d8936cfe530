"""Two cache servers, each with one of two shards: what one of them does or suffers is nothing to the other's users."""

from __future__ import annotations

import time
from collections.abc import Callable, Iterator
from contextlib import closing
from uuid import uuid4

import pytest
import redis
from prometheus_client import REGISTRY

from segsvc.cache.client import CacheClient
from segsvc.cache.patch_store import PatchStore
from segsvc.cache.readers import CacheReaders, make_reader
from segsvc.cache.server import server_name
from segsvc.cache.warm_notes import WarmNotes
from segsvc.cli.doctor import storage
from segsvc.domain.errors import Reason, ServiceError
from segsvc.domain.events import UpdateUser
from segsvc.domain.membership import FIRST_SEGMENT
from segsvc.domain.operation import RequestKey
from segsvc.domain.override import Effect, OverrideChanges, WantedOverride
from segsvc.failpoints import failpoints
from segsvc.local.redis import RedisServer
from segsvc.postgres.catalog.segments import PostgresSegmentCatalog
from segsvc.postgres.shard.overrides import PostgresOverrideStore
from segsvc.postgres.shard.user_transaction import PostgresUserStore
from segsvc.services.ingestion import Ingestion
from segsvc.services.overrides import OverrideService
from segsvc.services.segments import SegmentService
from segsvc.services.slug_map import SlugMap
from segsvc.services.warming import Warmer
from tests.eventually import eventually
from tests.installation import KEYS, Installation
from tests.integration.cache.conftest import SHARDS, World
from tests.integration.cache.lane_front import Lane, Start, reads

USERS = 40
LOST, KEPT = 0, 1
"""The shard whose server is killed, and the shard of the other server."""


class Pair(World):
    """A world whose shards have a server each."""

    def __init__(self, installation: Installation, lost: RedisServer, kept: RedisServer) -> None:
        super().__init__(installation, kept)
        self.client.close()
        self.lost = lost
        self.urls = (lost.url, kept.url)
        self.settings = self.settings.model_copy(update={"cache_urls": self.urls})
        self.client = CacheClient(self.urls, find_keys=lambda: KEYS, timeout_s=0.5, ttl_s=86_400)
        self.both = CacheReaders(self.client, SHARDS, partial=True, patches=PatchStore(self._slugs.__getitem__))
        self.raw_lost = redis.Redis.from_url(lost.url)

    def close(self) -> None:
        self.both.close()
        self.raw_lost.close()
        super().close()

    def is_cached(self, *user_ids: int) -> bool:
        self.both.connect()
        return None not in self.both.lookup(user_ids)


@pytest.fixture
def pair(installation: Installation, own_cache: RedisServer, cache_server: RedisServer) -> Iterator[Pair]:
    made = Pair(installation, own_cache, cache_server)
    made.raw.flushall()
    made.add_users(USERS)
    made.add_segment("beta", [2, 4, 5])
    yield made
    made.close()


@pytest.fixture
def lane(pair: Pair, start: Start) -> Lane:
    lane = start(pair, cache_urls=pair.urls)
    for user in (4, 5):
        eventually(lambda user=user: hits(lane, user))  # type: ignore[misc]
    return lane


def hits(lane: Lane, user_id: int) -> bool:
    before = reads("hit")
    lane.segments(user_id, timeout_s=60)
    return reads("hit") == before + 1


def names(client: redis.Redis) -> set[bytes]:
    return {name.partition(b"}")[0] for name in client.scan_iter()}


def refused_for_the_cache(step: Callable[[], object]) -> bool:
    try:
        step()
    except ServiceError as error:
        return error.reason is Reason.CACHE_UNAVAILABLE
    return False


# -- both are there -------------------------------------------------------------------------------------------------


def test_each_server_holds_its_own_shards_alone(pair: Pair) -> None:
    pair.fill(*range(1, USERS))
    notes = WarmNotes(pair.client)
    for shard in range(SHARDS):
        notes.add_reads(shard, {1: 2})
    assert names(pair.raw_lost) == {b"{%b:0" % KEYS.tag}
    assert names(pair.raw) == {b"{%b:1" % KEYS.tag}
    assert [notes.memory(shard).server for shard in range(SHARDS)] == [server_name(url) for url in pair.urls]


@pytest.mark.parametrize("size", [1, 7, USERS, 1000])
def test_pieces_over_both_servers_are_the_whole_in_the_order_asked(pair: Pair, size: int) -> None:
    users = [*range(1, USERS), *range(USERS - 1, 0, -3)]
    pair.fill(*range(1, USERS, 3))
    pair.both.connect()
    with closing(pair.both.lookups(users, size)) as pieces:
        found = [entry for piece in pieces for entry in piece]
    assert found == pair.both.lookup(users)
    assert [entry is not None for entry in found] == [user % 3 == 1 for user in users]
    assert [bool(entry and entry[FIRST_SEGMENT:]) for entry in found] == [user == 4 for user in users]


def test_what_is_not_taken_is_no_later_lookups_answer(pair: Pair) -> None:
    pair.fill(*range(1, USERS, 3))
    pair.both.connect()
    with closing(pair.both.lookups(range(1, USERS), 5)) as pieces:
        next(pieces)
    assert not pair.both.complete
    pair.both.connect()
    assert [entry is not None for entry in pair.both.lookup(range(1, USERS))] == [u % 3 == 1 for u in range(1, USERS)]


def test_a_server_that_is_connected_again_in_the_middle_of_a_lookup_answers_for_the_right_users(pair: Pair) -> None:
    """Another thread connects as soon as a connection is lost, while pieces of a lookup are still to come. What is owed
    on the lost connection is nothing to the new one, and patches are fetched between the two."""
    users = [user for user in range(1, USERS) if user % SHARDS == LOST]
    pair.fill(*users)
    members = set(users[::3])
    pair.publish(pair.bulk_change(pair.add_segment("patched"), sorted(members)))
    pair.both.connect()

    reader = pair.both._by_shard[LOST]

    found: dict[int, bool] = {}
    with closing(pair.both.lookups(users, 1)) as pieces:
        for user, [entry] in zip(users, pieces, strict=True):
            if entry is not None:
                found[user] = len(entry) - FIRST_SEGMENT == (user in (2, 4)) + (user in members)
            reader._patches._shards.clear()  # each piece fetches the patches
            if user == users[4]:
                # With two pieces under way, as after a timeout.
                reader.lose(reader._asked)  # type: ignore[arg-type]
                pair.both.connect()

    assert set(found.values()) == {True}
    assert len(found) >= len(users) - 3, "only the pieces that were under way are misses"


def test_one_server_needs_no_parts(pair: Pair) -> None:
    """With one server a read costs what it costs without this: the reader of one server alone."""
    same = CacheClient((pair.urls[1],) * SHARDS, find_keys=lambda: KEYS, timeout_s=0.5, ttl_s=60)
    assert len(same.servers) == 1
    assert not isinstance(make_reader(same, SHARDS, partial=True, patches=PatchStore(int)), CacheReaders)


def test_the_doctor_looks_at_each_server(pair: Pair) -> None:
    assert storage.cache(pair.settings) == []
    pair.raw_lost.config_set("maxmemory-policy", "noeviction")
    [item] = storage.cache(pair.settings)
    assert (
        item.text == f"{server_name(pair.urls[0])}: the cache's maxmemory-policy is noeviction; it must be volatile-lru"
    )
    twice = tuple(url.replace("127.0.0.1", "localhost") for url in pair.urls[1:]) + pair.urls[1:]
    [item] = storage.cache(pair.settings.model_copy(update={"cache_urls": twice}))
    assert item.text == " and ".join(map(server_name, twice)) + " are one server"


# -- one is dead ----------------------------------------------------------------------------------------------------


def test_a_dead_server_makes_only_its_own_users_cold(pair: Pair, lane: Lane) -> None:
    pair.lost.kill()

    before = {source: reads(source) for source in ("hit", "bypass", "error")}
    for _ in range(5):
        assert lane.segments(5, timeout_s=60) == ["beta"]
        assert lane.segments(4, timeout_s=60) == ["beta"]
    results = lane.batch([4, 5, 6, 5], timeout_s=60).results
    assert [list(result.user_segments.slugs) for result in results] == [["beta"], ["beta"], [], ["beta"]]
    assert {source: reads(source) - count for source, count in before.items()} == {"hit": 7, "bypass": 7, "error": 0}
    assert connected(pair) == [0, 1]

    pair.lost.start()
    eventually(lambda: hits(lane, 4))
    assert connected(pair) == [1, 1]


def connected(pair: Pair) -> list[float | None]:
    return [REGISTRY.get_sample_value("segsvc_cache_connected", {"server": server_name(url)}) for url in pair.urls]


def test_a_server_that_hangs_costs_the_other_users_one_wait(pair: Pair, lane: Lane) -> None:
    pair.lost.pause()
    assert lane.segments(4, timeout_s=60) == ["beta"]

    hit, begun, calls = reads("hit"), time.monotonic(), 0
    while time.monotonic() - begun < 1.0:
        assert lane.segments(5, timeout_s=60) == ["beta"]
        calls += 1
    assert reads("hit") - hit == calls
    assert calls > 10

    pair.lost.resume()
    eventually(lambda: hits(lane, 4))


def test_the_check_does_not_take_a_dead_server_for_misses(pair: Pair) -> None:
    strict = make_reader(pair.client, SHARDS, partial=False, patches=PatchStore(int))
    strict.connect()
    pair.lost.kill()
    with pytest.raises(ServiceError) as refused:
        strict.lookup([4, 5])
    assert refused.value.reason is Reason.CACHE_UNAVAILABLE
    with pytest.raises(ServiceError):
        strict.connect()
    strict.close()


def test_changes_of_its_users_wait_and_all_others_go_on(pair: Pair) -> None:
    ingestion = Ingestion(PostgresUserStore(pair.databases), pair.client, failpoints(None))
    segments = SegmentService(PostgresSegmentCatalog(pair.databases))
    overrides = OverrideService(PostgresOverrideStore(pair.databases), pair.client, segments, failpoints(None))
    exclude = OverrideChanges((WantedOverride("beta", Effect.EXCLUDE, None),), ())
    pair.fill(2, 4, 5)
    pair.lost.kill()

    def update(user_id: int) -> None:
        ingestion.apply_batch(user_id % SHARDS, [UpdateUser(user_id, 7, "{}")])

    def override(user_id: int) -> None:
        overrides.modify(user_id, exclude, RequestKey("ModifyUserOverrides", uuid4(), b"%d" % user_id))

    assert refused_for_the_cache(lambda: update(2))
    assert refused_for_the_cache(lambda: override(4))
    (row,) = pair.memberships.load(LOST, [4])
    assert row.segment_ids, "a change that was refused has not happened"
    update(3)
    override(5)
    (row,) = pair.memberships.load(KEPT, [5])
    assert not row.segment_ids

    pair.lost.start()
    eventually(lambda: not refused_for_the_cache(lambda: update(2)))
    override(4)


def test_a_bulk_change_reaches_the_living_server_and_says_that_it_did_not_reach_the_other(pair: Pair) -> None:
    pair.fill(4, 5)
    pair.both.connect()
    assert None not in pair.both.lookup([4, 5])
    pair.lost.pause()
    assert refused_for_the_cache(lambda: pair.client.drop_generations(range(SHARDS)))
    assert pair.both.lookup([5]) == [None]
    pair.fill(5)

    pair.lost.resume()
    eventually(lambda: not refused_for_the_cache(lambda: pair.client.drop_generations([LOST])))
    assert [entry is not None for entry in pair.both.lookup([4, 5])] == [False, True]


def test_the_warmer_goes_on_with_the_living_servers_shards(pair: Pair) -> None:
    warmer = Warmer(
        reads=pair.memberships,
        cache=pair.client,
        notes=WarmNotes(pair.client),
        slugs=SlugMap(pair.memberships.slugs),
        budget_bytes=1 << 40,
        patches_max=64,
    )
    pair.lost.kill()
    assert refused_for_the_cache(lambda: warmer.warm_shard(LOST))
    assert warmer.warm_shard(KEPT).entries == USERS // 2
    assert REGISTRY.get_sample_value("segsvc_cache_memory_bytes", {"server": server_name(pair.urls[1]), "what": "used"})

    pair.lost.start()
    eventually(lambda: not refused_for_the_cache(lambda: warmer.warm_shard(LOST)))
    assert pair.is_cached(*range(1, USERS))


# -- a server is added ----------------------------------------------------------------------------------------------


def test_while_a_server_is_added_each_process_drops_what_any_other_may_read(pair: Pair) -> None:
    """Processes of three kinds at once: with the old layout, with the new layout, and all of them know the other."""
    old, new = (pair.urls[1],) * SHARDS, pair.urls
    before = CacheClient(old, also=new, find_keys=lambda: KEYS, timeout_s=0.5, ttl_s=60)
    after = CacheClient(new, also=old, find_keys=lambda: KEYS, timeout_s=0.5, ttl_s=60)
    readers = [make_reader(client, SHARDS, partial=False, patches=PatchStore(int)) for client in (before, after)]
    for reader in readers:
        reader.connect()

    def fill(client: CacheClient) -> None:
        pair.client = client
        pair.fill(4)

    def cached() -> list[bool]:
        return [reader.lookup([4])[0] is not None for reader in readers]

    for changing in (before, after):
        for client in (before, after):
            fill(client)
        assert cached() == [True, True]
        changing.drop_entries(LOST, [4])
        assert cached() == [False, False]

        for client in (before, after):
            fill(client)
        changing.drop_generations([LOST])
        assert cached() == [False, False]

        token = changing.bar(LOST, 4)
        assert [bool(client.acquire(LOST, [4]).user_ids) for client in (before, after)] == [False, False]
        changing.drop_entries(LOST, [4], token)

    for reader in readers:
        reader.close()
    before.close()
    after.close()
