"""Foreign data in the cache's server: values of another installation, and values that are no values of ours."""

from __future__ import annotations

from collections.abc import Callable, Iterator

import pytest
import redis

from segsvc.cache.client import CacheClient
from segsvc.cache.keys import Keys
from segsvc.cache.patch_store import PatchStore
from segsvc.cache.reader import CacheReader
from segsvc.cache.warm_notes import WarmNotes
from segsvc.domain.errors import ServiceError, catalog_unavailable
from segsvc.domain.membership import NEVER_US, Sweep
from tests.installation import KEYS
from tests.integration.cache.conftest import World

SHARD = 0
USER = 4
ENTRY = (NEVER_US, 1, 1, 0, 0, 7)
OTHER = Keys(b"0ther000")

Write = Callable[[redis.Redis, bytes], object]

FOREIGN: dict[str, Write] = {
    "lease without an end": lambda raw, key: raw.set(key, b"Lforeign"),
    "bar without an end": lambda raw, key: raw.set(key, b"Bforeign"),
    "bar for a day": lambda raw, key: raw.set(key, b"Bforeign", ex=86_400),
    "value without a head": lambda raw, key: raw.set(key, b"V"),
    "nothing": lambda raw, key: raw.set(key, b""),
    "list": lambda raw, key: raw.rpush(key, b"a"),
    "set": lambda raw, key: raw.sadd(key, b"a"),
    "hash": lambda raw, key: raw.hset(key, b"a", b"b"),
    "sorted set": lambda raw, key: raw.zadd(key, {b"a": 1}),
    "stream": lambda raw, key: raw.xadd(key, {b"a": b"b"}),
}


@pytest.fixture
def other(world: World) -> Iterator[CacheClient]:
    """Another installation on the same server."""
    client = CacheClient(world.server.url, find_keys=lambda: OTHER, timeout_s=0.5, ttl_s=60)
    yield client
    client.close()


def fill(client: CacheClient, user: int = USER) -> int:
    grant = client.acquire(SHARD, [user])
    return client.fill(SHARD, grant, [(user, ENTRY)] if user in grant.user_ids else [])


@pytest.mark.parametrize("kind", FOREIGN)
def test_a_user_whose_key_holds_something_foreign_is_cached_again(world: World, kind: str) -> None:
    key = KEYS.user(SHARD, USER)
    for heal in (lambda: None, lambda: world.client.drop_entries(SHARD, [USER])):
        world.raw.delete(key)
        FOREIGN[kind](world.raw, key)
        heal()
        world.reader.connect()
        assert world.reader.lookup([USER]) == [None]
        assert fill(world.client) == 1
        assert world.reader.lookup([USER]) == [ENTRY]


@pytest.mark.parametrize("kind", FOREIGN)
def test_a_shard_whose_generation_is_foreign_gets_a_new_one(world: World, kind: str) -> None:
    FOREIGN[kind](world.raw, KEYS.generation(SHARD))
    world.reader.connect()
    assert world.reader.lookup([USER]) == [None]
    assert fill(world.client) == 1
    assert world.reader.lookup([USER]) == [ENTRY]
    world.client.drop_generations([SHARD])
    assert world.reader.lookup([USER]) == [None]


def test_a_release_leaves_what_is_foreign_alone(world: World) -> None:
    grant = world.client.acquire(SHARD, [USER])
    world.raw.delete(KEYS.user(SHARD, USER))
    world.raw.rpush(KEYS.user(SHARD, USER), b"a")
    world.client.release(SHARD, grant, [USER])
    assert world.raw.type(KEYS.user(SHARD, USER)) == b"list"


@pytest.mark.parametrize("kind", FOREIGN)
def test_counts_of_reads_heal(world: World, kind: str) -> None:
    notes = WarmNotes(world.client)
    FOREIGN[kind](world.raw, KEYS.hot(SHARD))
    notes.add_reads(SHARD, {3: 5, 2: 9})
    assert notes.hottest(SHARD) == [2, 3]
    notes.fade(SHARD)


def test_members_that_are_no_blocks_are_taken_out(world: World) -> None:
    notes = WarmNotes(world.client)
    notes.add_reads(SHARD, {3: 5, 2: 9})
    foreign = {b"x": 7, b"": 7, b"-1": 7, b"1e3": 7, b"99999999999999999999": 7, b"\xff": 7, b"03": 7, b" 4": 7}
    world.raw.zadd(KEYS.hot(SHARD), foreign)
    world.raw.zadd(KEYS.hot(SHARD), {b"5": float("inf")})
    assert notes.hottest(SHARD) == [5, 2, 3]
    assert world.raw.zcard(KEYS.hot(SHARD)) == 3
    notes.fade(SHARD)
    assert notes.hottest(SHARD) == [2, 3]


@pytest.mark.parametrize("tail", [b"", b"x y", b"1", b"1 2 3", b"-1 2", b"\xff\xff"])
def test_a_note_of_the_warmer_that_is_none_is_no_note(world: World, tail: bytes) -> None:
    notes = WarmNotes(world.client)
    nonce = world.client.acquire(SHARD, [USER]).nonce
    world.raw.set(KEYS.warm(SHARD), nonce + tail)
    assert notes.last_sweep(SHARD) is None
    notes.note_sweep(SHARD, Sweep(nonce, 7, 8))
    assert notes.last_sweep(SHARD) == Sweep(nonce, 7, 8)


def test_two_installations_do_not_see_each_other(world: World, other: CacheClient) -> None:
    theirs = CacheReader(other, 2, patches=PatchStore(int))
    theirs.connect()
    world.reader.connect()

    assert fill(world.client) == 1
    assert theirs.lookup([USER]) == [None]
    assert fill(other) == 1

    world.client.drop_generations([SHARD])
    world.client.bar(SHARD, USER)

    assert world.reader.lookup([USER]) == [None]
    assert theirs.lookup([USER]) == [ENTRY]
    assert WarmNotes(other).hottest(SHARD) == []
    theirs.close()


def test_without_a_name_there_is_no_cache(world: World) -> None:
    known = False

    def find() -> Keys:
        if not known:
            raise catalog_unavailable()
        return KEYS

    client = CacheClient(world.server.url, find_keys=find, timeout_s=0.5, ttl_s=60)
    reader = CacheReader(client, 2, patches=PatchStore(int))
    for step in (lambda: client.acquire(SHARD, [USER]), lambda: client.bar(SHARD, USER), reader.connect):
        with pytest.raises(ServiceError, match="CACHE_UNAVAILABLE"):
            step()

    known = True
    assert fill(client) == 1
    reader.connect()
    assert reader.lookup([USER]) == [ENTRY]

    reader.close()
    client.close()
