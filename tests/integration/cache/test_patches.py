"""A bulk change on a real cache: entries stay, patches are laid over them, and whatever goes wrong makes misses."""

from __future__ import annotations

from dataclasses import replace

import pytest

from segsvc.cache.client import CacheClient
from segsvc.cache.patch_store import PatchStore
from segsvc.cache.patches import CHUNK_SLOTS, decode_list
from segsvc.cache.reader import CacheReader
from segsvc.domain.errors import Reason, ServiceError
from segsvc.domain.membership import FIRST_SEGMENT
from segsvc.twophase.ports import Published
from tests.installation import KEYS
from tests.integration.cache.conftest import SHARDS, World

USERS = 40


@pytest.fixture
def hot(world: World) -> World:
    """Everyone is cached with the one segment that there is: users up to 10 are in it."""
    world.add_users(USERS)
    world.segment = world.add_segment("beta", range(1, 11))
    world.fill(*range(1, USERS + 1))
    return world


def generations(world: World) -> list[bytes]:
    return [world.raw.get(KEYS.generation(shard)) for shard in range(SHARDS)]


def test_a_rollout_leaves_every_entry_a_hit_with_the_new_list(hot: World) -> None:
    other = hot.add_segment("alpha")
    before = hot.raw.mget(*(KEYS.user(user % SHARDS, user) for user in range(1, USERS + 1)))
    assert hot.publish(hot.bulk_change(other, range(5, 21))) == [Published.APPENDED] * SHARDS

    for user in range(1, USERS + 1):
        expected = (other,) * (5 <= user <= 20) + (hot.segment,) * (user <= 10)
        assert hot.cached_segments(user) == expected, "by their slugs: alpha before beta"
    assert hot.raw.mget(*(KEYS.user(user % SHARDS, user) for user in range(1, USERS + 1))) == before
    assert [hot.raw.pttl(KEYS.patches(shard)) for shard in range(SHARDS)] == [-1] * SHARDS, "it must not be evicted"
    chunks = [
        key for shard in range(SHARDS) for key in hot.raw.keys(KEYS.chunk_prefix(shard).replace(b"{", b"?") + b"*")
    ]
    assert len(chunks) == SHARDS
    assert all(86_400_000 < hot.raw.pttl(chunk) <= 86_410_000 for chunk in chunks), (
        "as long as an entry's lease and life"
    )


def test_a_deletion_strikes_the_segment_from_the_lists(hot: World) -> None:
    hot.publish(hot.bulk_change(hot.segment, [], deleted=True))
    assert {hot.cached_segments(user) for user in range(1, USERS + 1)} == {()}


def test_entries_read_after_it_are_as_they_are(hot: World) -> None:
    patches = hot.bulk_change(hot.segment, [1])
    hot.client.drop_entries(0, [2])
    hot.fill(2)
    hot.publish(patches)
    assert (hot.cached_segments(1), hot.cached_segments(2), hot.cached_segments(3)) == ((hot.segment,), (), ())
    (entry,) = hot.cached(2)
    assert entry is not None
    assert hot.client.acquire(0, [2]).user_ids == frozenset(), "it is new enough for everyone"


def test_a_user_who_changed_is_read_again(hot: World) -> None:
    hot.publish(hot.bulk_change(hot.segment, [1, 2], changed=[2]))
    assert not hot.is_cached(2)
    assert hot.is_cached(1, 3, 4)
    hot.fill(2)
    assert hot.cached_segments(2) == (hot.segment,)


def test_many_patches_and_only_the_last_ones_count(hot: World) -> None:
    short = CacheClient(hot.server.url, find_keys=lambda: KEYS, timeout_s=0.5, ttl_s=86_400, patches_max=3)
    hot.client.close()
    hot.client = short
    for _ in range(3):
        hot.publish(hot.bulk_change(hot.segment, [1]))
    assert hot.is_cached(*range(1, USERS + 1))
    hot.fill_again(4)
    hot.publish(hot.bulk_change(hot.segment, [1, 4]))
    assert len(hot.raw.keys(b"*:c:*")) == 3 * SHARDS, "chunks of what fell out of the list are gone"
    assert [user for user in range(1, USERS + 1) if hot.is_cached(user)] == [4], "the rest is older than the list"
    assert hot.cached_segments(4) == (hot.segment,)
    notes = decode_list(hot.raw.get(KEYS.patches(0)), hot.client.acquire(0, []).nonce or generations(hot)[0][40:50])
    assert [note.epoch for note in notes] == [2, 3, 4]


# -- publishing: twice, late, with a gap ----------------------------------------------------------------------------


def test_a_twin_appends_nothing(hot: World) -> None:
    patches = hot.bulk_change(hot.segment, [1, 2])
    assert hot.publish(patches) == [Published.APPENDED] * SHARDS
    lists = [hot.raw.get(KEYS.patches(shard)) for shard in range(SHARDS)]
    assert hot.publish(patches) == [Published.KNOWN] * SHARDS
    assert [hot.raw.get(KEYS.patches(shard)) for shard in range(SHARDS)] == lists


def test_a_zombie_changes_nothing(hot: World) -> None:
    first = hot.bulk_change(hot.segment, [1, 2])
    token = hot.client.write_patch(0, first[0])
    hot.publish(first)
    hot.publish(hot.bulk_change(hot.segment, [3]))
    assert hot.client.append_patch(0, first[0], token) is Published.KNOWN
    assert (hot.cached_segments(2), hot.cached_segments(3)) == ((), (hot.segment,))


def test_a_gap_drops_the_generation(hot: World) -> None:
    hot.publish(hot.bulk_change(hot.segment, [1]))
    hot.bulk_change(hot.segment, [2])  # not published
    assert hot.publish(hot.bulk_change(hot.segment, [3])) == [Published.DROPPED] * SHARDS
    assert generations(hot) == [None] * SHARDS
    assert not any(hot.raw.exists(KEYS.patches(shard)) for shard in range(SHARDS))
    assert {hot.cached_segments(user) for user in range(1, USERS + 1)} == {None}
    hot.fill(3)
    assert hot.cached_segments(3) == (hot.segment,)


def test_the_first_patch_of_a_generation_may_have_any_epoch(hot: World) -> None:
    hot.bulk_change(hot.segment, [1])
    hot.client.drop_generations(range(SHARDS))
    hot.fill(1, 2, 3)
    hot.publish(hot.bulk_change(hot.segment, [2]))
    assert [hot.cached_segments(user) for user in (1, 2, 3, 4)] == [(), (hot.segment,), (), None]


def test_without_a_generation_there_is_nothing_to_patch(world: World) -> None:
    world.add_users(USERS)
    segment = world.add_segment("beta")
    assert world.publish(world.bulk_change(segment, [1])) == [Published.NONE] * SHARDS
    assert not any(world.raw.exists(KEYS.patches(shard)) for shard in range(SHARDS))


def test_a_list_is_not_appended_to_the_generation_of_another_run(hot: World) -> None:
    value = generations(hot)[0]
    hot.raw.set(KEYS.generation(0), b"x" * 40 + value[40:])
    assert hot.publish(hot.bulk_change(hot.segment, [1])) == [Published.NONE, Published.APPENDED]
    assert hot.cached_segments(2) is None


# -- what the server loses ------------------------------------------------------------------------------------------


def test_a_lost_chunk_makes_misses_which_reads_heal(hot: World) -> None:
    hot.publish(hot.bulk_change(hot.segment, [1, 2]))
    hot.raw.delete(*hot.raw.keys(b"*:c:*"))
    assert {hot.cached_segments(user) for user in range(1, USERS + 1)} == {None}
    hot.fill(1, 2)  # the lease is given although a value is there: it is older than the patch
    assert [hot.cached_segments(user) for user in (1, 2, 3)] == [(hot.segment,), (hot.segment,), None]


def test_who_has_the_chunk_does_not_need_it_again(hot: World) -> None:
    hot.publish(hot.bulk_change(hot.segment, [1, 2]))
    assert hot.cached_segments(2) == (hot.segment,)
    hot.raw.delete(*hot.raw.keys(b"*:c:*"))
    assert hot.cached_segments(4) == ()


def test_a_lost_list_begins_again(hot: World) -> None:
    hot.publish(hot.bulk_change(hot.segment, [1, 2]))
    hot.raw.delete(*(KEYS.patches(shard) for shard in range(SHARDS)))
    assert {hot.cached_segments(user) for user in range(1, USERS + 1)} == {None}
    hot.fill(1, 2)
    assert hot.publish(hot.bulk_change(hot.segment, [1])) == [Published.APPENDED] * SHARDS
    assert [hot.cached_segments(user) for user in (1, 2, 3)] == [(hot.segment,), (), None]


@pytest.mark.parametrize("foreign", [b"foreign", b"0123456789"])
def test_a_foreign_list_is_replaced(hot: World, foreign: bytes) -> None:
    hot.publish(hot.bulk_change(hot.segment, [1, 2]))
    hot.raw.set(KEYS.patches(1), foreign)
    assert hot.cached_segments(1) is None
    hot.publish(hot.bulk_change(hot.segment, [1, 2]))
    assert hot.cached_segments(1) is None, "its entry is older than the list, which begins again"
    hot.fill(1)
    assert hot.cached_segments(1) == (hot.segment,)


def test_foreign_values_of_another_type_do_no_harm(hot: World) -> None:
    hot.publish(hot.bulk_change(hot.segment, [1, 2]))
    for key in (KEYS.patches(1), *hot.raw.keys(KEYS.chunk_prefix(0).replace(b"{", b"?") + b"*")):
        hot.raw.delete(key)
        hot.raw.rpush(key, "foreign")
    assert {hot.cached_segments(user) for user in range(1, USERS + 1)} == {None}
    assert hot.reader.connected
    assert hot.publish(hot.bulk_change(hot.segment, [1])) == [Published.APPENDED] * SHARDS


def test_a_cache_without_memory_refuses_a_patch_and_takes_a_drop(own_world: World) -> None:
    world = own_world
    world.add_users(USERS)
    segment = world.add_segment("beta", [1])
    world.fill(1, 2)
    patches = world.bulk_change(segment, [2])
    world.raw.config_set("maxmemory-policy", "noeviction")
    world.raw.config_set("maxmemory", 1)
    with pytest.raises(ServiceError) as caught:
        world.client.write_patch(0, patches[0])
    assert caught.value.reason is Reason.CACHE_UNAVAILABLE
    with pytest.raises(ServiceError):
        world.client.append_patch(0, patches[0], b"t" * 16)
    world.client.drop_generations([0])
    assert world.cached_segments(2) is None


# -- readers --------------------------------------------------------------------------------------------------------


def test_pieces_that_are_under_way_keep_their_order(hot: World) -> None:
    """A reader fetches patches while replies to later pieces are on their way."""
    hot.publish(hot.bulk_change(hot.segment, range(1, 41, 3)))
    users = list(range(1, USERS + 1))
    reader = CacheReader(hot.client, SHARDS, patches=PatchStore(int))
    reader.connect()
    for size in (1, 3, 7, 100):
        found = [entry for piece in reader.lookups(users, size) for entry in piece]
        assert [entry is not None and hot.segment in entry[5:] for entry in found] == [user % 3 == 1 for user in users]

    hot.publish(hot.bulk_change(hot.segment, range(2, 41, 3)))
    pieces = reader.lookups(users, 5)
    assert next(pieces) is not None
    pieces.close()
    assert not reader.connected, "replies were still to come"
    reader.connect()
    assert [entry is not None and hot.segment in entry[5:] for entry in reader.lookup(users)] == [
        user % 3 == 2 for user in users
    ]
    reader.close()


def test_a_slow_reader_keeps_what_it_fetched_under_one_generation(hot: World) -> None:
    """The generation changes between the entries and their patches: then they are misses."""
    hot.publish(hot.bulk_change(hot.segment, [1, 2]))
    reader = hot.reader
    reader.connect()
    connection = reader.ask([[1, 2]])
    values = reader.receive(connection)
    hot.client.drop_generations(range(SHARDS))
    hot.fill(1)
    hot.publish(hot.bulk_change(hot.segment, [2]))
    assert reader.entries([1, 2], values, connection) == [None, None]
    assert (hot.cached_segments(1), hot.cached_segments(2)) == ((), None)


def test_a_publisher_who_comes_late_writes_nothing_under_a_reader_who_has_the_list(hot: World) -> None:
    """The reader has its entry, and the list of then; the chunk it gets two operations later."""
    other = hot.add_segment("alpha")
    first = hot.bulk_change(hot.segment, [1])
    hot.publish(first)

    memory = PatchStore(int, bytes_max=1)  # it has no room for chunks
    reader = CacheReader(hot.client, SHARDS, patches=memory)
    reader.connect()
    assert reader.lookup([4]) == [None]
    connection = reader.ask([[4]])

    hot.publish(hot.bulk_change(other, [4]))
    third = hot.bulk_change(hot.segment, [4])
    hot.publish(third)
    # The zombie of the first operation reads its segment as it is by now.
    hot.client.write_patch(0, replace(first[0], members=third[0].members))

    memory._bytes_max = 1 << 20
    [entry] = reader.entries([4], reader.receive(connection), connection)
    assert entry is not None
    assert entry[FIRST_SEGMENT:] == (), "the third operation's bit without the second's was never true"
    reader.close()


def test_the_warmer_says_which_entries_are_good_enough(hot: World) -> None:
    for _ in range(3):
        hot.publish(hot.bulk_change(hot.segment, [1]))
    even = [2, 4, 6]
    hot.fill_again(4)
    assert hot.client.acquire(0, even, enough=0).user_ids == frozenset()
    assert hot.client.acquire(0, even, enough=2).user_ids == {2, 6}
    assert hot.client.acquire(0, [8]).user_ids == {8}, "a reader comes after a miss"


def test_patches_of_many_chunks(world: World) -> None:
    """The users' slots lie in three chunks; one user changed in each."""
    world.add_users(USERS)
    for shard in range(SHARDS):
        world.installation.execute(shard, "UPDATE users SET slot = slot + (id % 3) * :chunk", chunk=CHUNK_SLOTS)
        world.installation.execute(shard, "UPDATE shard_state SET next_slot = :next", next=3 * CHUNK_SLOTS)
    segment = world.add_segment("beta")
    world.fill(*range(1, USERS + 1))
    members = [user for user in range(1, USERS + 1) if user % 5 < 2]
    world.publish(world.bulk_change(segment, members, changed=[3, 4, 5]))
    for user in range(1, USERS + 1):
        expected = None if user in (3, 4, 5) else (segment,) * (user in members)
        assert world.cached_segments(user) == expected
