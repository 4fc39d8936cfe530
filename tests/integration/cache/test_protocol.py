"""Every step of the cache protocol on a real server: what makes a hit, which load may fill, and what drops an entry."""

from __future__ import annotations

from collections.abc import Sequence

import pytest

import segsvc.cache.client
from segsvc.cache import scripts
from segsvc.cache.connection import CacheConnection, Command
from segsvc.domain.errors import ServiceError
from segsvc.domain.membership import NEVER_US, Entry
from tests.eventually import eventually
from tests.installation import KEYS
from tests.integration.cache.conftest import World

USER = 4
SHARD = 0
ENTRY: Entry = (NEVER_US, 1, 2, 0, 0, 7, 8)
KEY = KEYS.user(SHARD, USER)
G = KEYS.generation(SHARD)


@pytest.fixture
def filled(world: World) -> World:
    grant = world.client.acquire(SHARD, [USER])
    world.client.fill(SHARD, grant, [(USER, ENTRY)])
    assert world.cached(USER) == [ENTRY]
    return world


# -- acquire --------------------------------------------------------------------------------------------------------


def test_first_acquire_makes_a_generation_of_this_server(world: World) -> None:
    grant = world.client.acquire(SHARD, [USER])
    assert world.raw.get(G) == world.raw.info("server")["run_id"].encode() + grant.nonce + bytes(8)
    assert world.raw.ttl(G) == -1, "with a TTL it could be evicted, and the shard would go cold"
    assert world.raw.get(KEY) == b"L" + grant.token
    assert 0 < world.raw.pttl(KEY) <= scripts.LEASE_MS


def test_later_acquires_keep_the_generation(world: World) -> None:
    first = world.client.acquire(SHARD, [USER])
    second = world.client.acquire(SHARD, [USER + 2])
    assert (second.nonce, second.user_ids) == (first.nonce, {USER + 2})
    assert second.token != first.token


def test_generations_of_shards_are_apart(world: World) -> None:
    assert world.client.acquire(0, [2]).nonce != world.client.acquire(1, [1]).nonce


@pytest.mark.parametrize("holder", [b"Lother", b"Bother"])
def test_lease_and_block_of_another_are_respected(world: World, holder: bytes) -> None:
    world.raw.set(KEY, holder, ex=60)
    assert world.client.acquire(SHARD, [USER]).user_ids == frozenset()
    assert world.raw.get(KEY) == holder


def test_hit_is_refused(filled: World) -> None:
    value = filled.raw.get(KEY)
    assert filled.client.acquire(SHARD, [USER, 6]).user_ids == {6}
    assert filled.raw.get(KEY) == value


def _other_format(value: bytes) -> bytes:
    return value[:11] + b"\x09" + value[12:]


@pytest.mark.parametrize("spoil", [lambda v: v[:-1], lambda v: v[:30], _other_format, lambda v: b"V", lambda v: b"x"])
def test_value_that_is_no_hit_can_be_replaced(filled: World, spoil: object) -> None:
    """Otherwise it stays a miss until it expires."""
    value = filled.raw.get(KEY)
    filled.raw.set(KEY, spoil(value), ex=60)  # type: ignore[operator]
    assert filled.cached(USER) == [None]
    filled_again = filled.client.acquire(SHARD, [USER])
    assert filled_again.user_ids == {USER}
    filled.client.fill(SHARD, filled_again, [(USER, ENTRY)])
    assert filled.cached(USER) == [ENTRY]


def test_value_whose_override_has_expired_can_be_replaced(world: World) -> None:
    grant = world.client.acquire(SHARD, [USER])
    now_us = world.client._now_us()
    world.client.fill(SHARD, grant, [(USER, (now_us + 300_000, 1, now_us - 10_000_000, 0, 0))])
    assert world.cached(USER) != [None]
    assert world.client.acquire(SHARD, [USER]).user_ids == frozenset()
    eventually(lambda: world.cached(USER) == [None])
    assert world.raw.exists(KEY), "this is about the check, not about Redis's expiry"
    assert world.client.acquire(SHARD, [USER]).user_ids == {USER}


def test_many_users_in_one_call(world: World) -> None:
    users = list(range(2, 2 + 2 * 1000, 2))
    world.raw.set(KEYS.user(SHARD, 600), b"Bother", ex=60)
    grant = world.client.acquire(SHARD, users)
    assert grant.user_ids == set(users) - {600}
    assert world.client.fill(SHARD, grant, [(user, ENTRY) for user in sorted(grant.user_ids)]) == 999
    assert world.cached(*users).count(None) == 1


def test_bulk_change_between_the_calls_of_one_acquire(world: World, monkeypatch: pytest.MonkeyPatch) -> None:
    """A lease of the old generation can only be filled as a miss.

    The grant must not have it under the new nonce, and the lease is given back at once.
    """
    monkeypatch.setattr(segsvc.cache.client, "KEYS_PER_CALL", 1)
    run_all = CacheConnection.run_all

    def interrupted(connection: CacheConnection, commands: Sequence[Command]) -> list[object]:
        replies = run_all(connection, commands[:1])
        if len(commands) > 1:
            world.raw.delete(G)
            replies += run_all(connection, commands[1:])
        return replies

    with monkeypatch.context() as patched:
        patched.setattr(CacheConnection, "run_all", interrupted)
        grant = world.client.acquire(SHARD, [2, 4, 6])

    assert grant.user_ids == {4, 6}
    assert grant.busy == 1
    assert world.raw.get(G).endswith(grant.nonce + bytes(8))
    assert world.raw.get(KEYS.user(SHARD, 2)) is None


# -- fill -----------------------------------------------------------------------------------------------------------


@pytest.mark.parametrize(
    "now", [None, b"Lother", b"Bother", b"L", b"Vsomething"], ids=["lost", "leased again", "barred", "odd", "value"]
)
def test_fill_needs_its_own_lease_still_in_place(world: World, now: bytes | None) -> None:
    grant = world.client.acquire(SHARD, [USER])
    world.raw.delete(KEY)
    if now is not None:
        world.raw.set(KEY, now, ex=60)
    assert world.client.fill(SHARD, grant, [(USER, ENTRY)]) == 0
    assert world.raw.get(KEY) == now


def test_value_carries_the_nonce_of_its_lease(world: World) -> None:
    grant = world.client.acquire(SHARD, [USER])
    world.client.drop_generations([SHARD])
    world.client.acquire(SHARD, [USER + 2])  # a new generation
    assert world.client.fill(SHARD, grant, [(USER, ENTRY)]) == 1
    assert world.cached(USER) == [None], "read before the bulk change, it must not be a hit after it"


def test_entries_live_a_day_with_jitter_and_end_with_an_override(world: World, monkeypatch: pytest.MonkeyPatch) -> None:
    users = list(range(2, 202, 2))
    monkeypatch.setattr(segsvc.cache.client, "KEYS_PER_CALL", 1)  # users of one call end together

    grant = world.client.acquire(SHARD, users)
    world.client.fill(SHARD, grant, [(user, ENTRY) for user in users[1:]])

    read_time_us = world.client._now_us()
    world.client.fill(SHARD, grant, [(users[0], (read_time_us + 5_000_000, 1, read_time_us, 0, 0))])

    lives = [world.raw.ttl(KEYS.user(SHARD, user)) for user in users[1:]]
    assert min(lives) >= 0.89 * 86_400
    assert max(lives) <= 86_400
    assert len(set(lives)) > 50
    assert 0 < world.raw.pttl(KEYS.user(SHARD, users[0])) <= 5000


def test_lease_is_given_back_only_by_its_owner(world: World) -> None:
    grant = world.client.acquire(SHARD, [USER, 6])
    world.raw.set(KEYS.user(SHARD, 6), b"Lother", ex=10)
    world.client.release(SHARD, grant, [USER, 6])
    assert world.raw.get(KEY) is None
    assert world.raw.get(KEYS.user(SHARD, 6)) == b"Lother"


# -- changes of one user --------------------------------------------------------------------------------------------


def test_a_barred_user_is_a_miss_and_is_not_filled(filled: World) -> None:
    filled.client.bar(SHARD, USER)
    assert filled.cached(USER) == [None]
    assert filled.client.acquire(SHARD, [USER]).user_ids == frozenset()
    assert 0 < filled.raw.pttl(KEY) <= scripts.BAR_MS


def test_bar_takes_a_load_its_permission(world: World) -> None:
    grant = world.client.acquire(SHARD, [USER])
    token = world.client.bar(SHARD, USER)
    assert world.client.fill(SHARD, grant, [(USER, ENTRY)]) == 0
    world.client.drop_entries(SHARD, [USER], token)
    assert world.raw.get(KEY) is None
    assert world.client.fill(SHARD, grant, [(USER, ENTRY)]) == 0, "it was read before the change"


def test_drop_takes_value_lease_and_own_bar_away(world: World) -> None:
    world.client.acquire(SHARD, [2])
    token = world.client.bar(SHARD, 4)
    filled = world.client.acquire(SHARD, [6])
    world.client.fill(SHARD, filled, [(6, ENTRY)])
    world.client.drop_entries(SHARD, [2, 4, 6, 8], token)
    assert not world.raw.exists(*KEYS.users(SHARD, [2, 4, 6, 8]))


def test_drop_leaves_another_writers_bar(world: World) -> None:
    theirs = world.client.bar(SHARD, USER)
    world.client.drop_entries(SHARD, [USER])
    world.client.drop_entries(SHARD, [USER], b"0123456789abcdef")
    assert world.raw.get(KEY) == b"B" + theirs


def test_drop_of_very_many(world: World) -> None:
    users = list(range(2, 2 + 2 * 5000, 2))
    world.raw.mset({KEYS.user(SHARD, user): b"V" for user in users})
    world.client.drop_entries(SHARD, users)
    assert not world.raw.exists(*KEYS.users(SHARD, users))
    world.client.drop_entries(SHARD, [])


def test_drop_works_without_memory_to_spare(own_world: World) -> None:
    raw = own_world.raw
    raw.set(KEY, b"V" * 50)
    raw.config_set("maxmemory-policy", "noeviction")
    raw.config_set("maxmemory", "1mb")
    with pytest.raises(ServiceError):
        own_world.client.acquire(SHARD, [8])
    own_world.client.drop_entries(SHARD, [USER])
    own_world.client.drop_generations([SHARD])
    assert not raw.exists(KEY)


# -- bulk changes and losses ----------------------------------------------------------------------------------------


def test_dropped_generation_makes_every_entry_of_the_shard_a_miss(filled: World) -> None:
    other = filled.client.acquire(1, [1])
    filled.client.fill(1, other, [(1, ENTRY)])

    filled.client.drop_generations([SHARD])
    assert filled.cached(USER, 1) == [None, ENTRY]

    filled.client.acquire(SHARD, [10])
    assert filled.cached(USER) == [None], "a new generation does not bring the old one's entries back"

    filled.client.drop_generations([SHARD, 1])
    filled.client.drop_generations([SHARD, 1])
    assert filled.cached(USER, 1) == [None, None]


def test_lost_keys_are_misses_never_empty_lists(filled: World) -> None:
    filled.raw.delete(KEY)
    assert filled.cached(USER) == [None]
    filled.raw.flushall()
    assert filled.cached(USER, 1) == [None, None]


def test_generation_of_another_run_is_none(filled: World) -> None:
    """A server that restarted with older data has such a generation."""
    generation = filled.raw.get(G)
    filled.raw.set(G, b"f" * 40 + generation[40:])
    assert filled.cached(USER) == [None]
    grant = filled.client.acquire(SHARD, [USER])
    assert grant.user_ids == {USER}
    assert filled.raw.get(G)[:40] == generation[:40]
    assert grant.nonce != generation[40:]


@pytest.mark.parametrize("generation", [b"", b"x", b"y" * 60])
def test_odd_generation_is_none(filled: World, generation: bytes) -> None:
    filled.raw.set(G, generation)
    assert filled.cached(USER) == [None]
    assert filled.client.acquire(SHARD, [USER]).user_ids == {USER}
    assert filled.raw.get(G) != generation


def test_restarted_server_with_old_data_has_no_hits(own_world: World) -> None:
    """The same happens with persistence, or when a replica takes over."""
    raw = own_world.raw
    grant = own_world.client.acquire(SHARD, [USER])
    own_world.client.fill(SHARD, grant, [(USER, ENTRY)])
    assert own_world.cached(USER) == [ENTRY]
    before = raw.dump(KEY), raw.dump(G)

    own_world.server.restart()
    eventually(raw.ping)
    raw.restore(KEY, 0, before[0])
    raw.restore(G, 0, before[1])

    with pytest.raises(ServiceError):
        own_world.cached(USER)  # the old connection is gone for good
    assert own_world.cached(USER) == [None]
    assert own_world.client.acquire(SHARD, [USER]).user_ids == {USER}
