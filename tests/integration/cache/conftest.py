"""A small installation of two shards, and a cache; helpers to change users as a writer does."""

from __future__ import annotations

from collections.abc import Iterator, Sequence
from pathlib import Path

import numpy as np
import pytest
import redis

import segsvc.services.warming
from segsvc.cache.client import CacheClient
from segsvc.cache.patch_store import PatchStore
from segsvc.cache.reader import CacheReader
from segsvc.domain import bits
from segsvc.domain.membership import FIRST_SEGMENT, Entry
from segsvc.domain.patch import Patch
from segsvc.domain.sharding import BLOCK_SLOTS
from segsvc.local.postgres import PostgresServer
from segsvc.local.redis import CACHE_CONFIG, RedisServer
from segsvc.postgres.engine import Databases, Pool
from segsvc.postgres.shard.memberships import PostgresMemberships
from segsvc.twophase.ports import Published
from tests.installation import KEYS, Installation, new_installation
from tests.integration.cache.lane_front import LANES, Lane, Start
from tests.integration.cache.watched import Watched

SHARDS = 2
CACHE_TIMEOUT_S = 0.5


class World:
    """The installation with its cache, and the actions of tests on both.

    Attributes:
        segment: a segment that a fixture has added.
    """

    segment: int

    def __init__(self, installation: Installation, server: RedisServer) -> None:
        self.installation = installation
        self.settings = installation.settings
        self.server = server

        self._slugs: dict[int, str] = {}
        self.client = CacheClient(server.url, find_keys=lambda: KEYS, timeout_s=CACHE_TIMEOUT_S, ttl_s=86_400)
        self.reader = CacheReader(self.client, SHARDS, patches=PatchStore(self._slugs.__getitem__))

        self.databases = Databases(self.settings, "test", Pool(4, self.settings.read_timeout_s))
        self.memberships = PostgresMemberships(self.databases)

        self.raw = redis.Redis.from_url(server.url)

    def close(self) -> None:
        self.reader.close()
        self.client.close()
        self.databases.close()
        self.raw.close()

    def add_users(self, count: int) -> list[int]:
        """Add the users 1 … count."""
        users = list(range(1, count + 1))
        self.installation.add_users(users)
        return users

    def add_segment(self, slug: str, members: Sequence[int] = ()) -> int:
        """Add a segment on all shards, with these members in its bits. Returns its id; ids do not follow the slugs."""
        segment_id = 999 - len(self._slugs)
        self._slugs[segment_id] = slug
        for shard in range(SHARDS):
            self.installation.execute(
                shard, "INSERT INTO segments (id, slug, salt) VALUES (:id, :slug, 1)", id=segment_id, slug=slug
            )
        self.set_members(segment_id, members)
        return segment_id

    def set_members(self, segment_id: int, members: Sequence[int]) -> None:
        """Give the segment exactly these members, as a bulk change does."""
        for shard in range(SHARDS):
            self.installation.execute(shard, "DELETE FROM memberships WHERE segment_id = :id", id=segment_id)
            mine = [user for user in members if user % SHARDS == shard]
            slots = self.installation.execute(shard, "SELECT slot FROM users WHERE id = ANY(:ids)", ids=mine)

            blocks: dict[int, np.ndarray] = {}
            for row in slots:
                slot = int(str(row.slot))
                blocks.setdefault(slot // 1024, np.zeros(1024, dtype=bool))[slot % 1024] = True

            for block, flags in blocks.items():
                self.installation.execute(
                    shard,
                    "INSERT INTO memberships (block, segment_id, bits) VALUES (:block, :id, :bits)",
                    block=block,
                    id=segment_id,
                    bits=np.packbits(flags, bitorder="little").tobytes(),
                )

    def bulk_change(
        self, segment_id: int, members: Sequence[int], changed: Sequence[int] = (), *, deleted: bool = False
    ) -> list[Patch]:
        """Commit a rollout (or a deletion) that gives the segment these members. Returns each shard's patch.

        Args:
            changed: users who were changed in the epoch before.
        """
        self.set_members(segment_id, members)
        patches = []
        for shard in range(SHARDS):
            self.installation.execute(
                shard,
                "INSERT INTO shard_epoch (epoch) VALUES (1) ON CONFLICT (one) "
                "DO UPDATE SET epoch = shard_epoch.epoch + 1",
            )
            (state,) = self.installation.execute(shard, "SELECT epoch, next_slot FROM shard_epoch, shard_state")
            slots = int(str(state.next_slot))
            rows = self.installation.execute(shard, "SELECT id, slot FROM users")
            slot_of = {int(str(row.id)): int(str(row.slot)) for row in rows}
            inside = np.array([slot_of[user] for user in members if user in slot_of], dtype=np.int64)
            packed = None if deleted else bits.at_slots(inside, 0, -(-slots // BLOCK_SLOTS))
            noted = np.array(sorted(slot_of[user] for user in changed if user in slot_of), dtype=np.uint32)
            patches.append(Patch(int(str(state.epoch)), segment_id, slots, packed, noted))
        return patches

    def publish(self, patches: Sequence[Patch]) -> list[Published]:
        return [
            self.client.append_patch(shard, patch, self.client.write_patch(shard, patch))
            for shard, patch in enumerate(patches)
        ]

    def override(self, user_id: int, segment_id: int, effect: int, expires_in_s: float | None = None) -> None:
        """Add an override. Effect 1 includes, 2 excludes."""
        self.installation.execute(
            user_id % SHARDS,
            "INSERT INTO overrides (user_id, segment_id, effect, expire_time) "
            "VALUES (:user, :segment, :effect, clock_timestamp() + make_interval(secs => :secs))",
            user=user_id,
            segment=segment_id,
            effect=effect,
            secs=expires_in_s,
        )

    def fill(self, *user_ids: int) -> None:
        """Load users into the cache, as a miss does."""
        for user_id in user_ids:
            shard = user_id % SHARDS
            grant = self.client.acquire(shard, [user_id])
            assert grant.user_ids == {user_id}
            (row,) = self.memberships.load(shard, [user_id])
            entry = (
                row.valid_until_us,
                row.row_version,
                row.read_time_us,
                row.epoch,
                row.slot,
                *sorted(row.segment_ids),
            )
            assert self.client.fill(shard, grant, [(user_id, entry)]) == 1

    def fill_again(self, *user_ids: int) -> None:
        for user_id in user_ids:
            self.client.drop_entries(user_id % SHARDS, [user_id])
        self.fill(*user_ids)

    def cached(self, *user_ids: int) -> list[Entry | None]:
        """The entries that the hot path answers with; None means a miss."""
        if not self.reader.connected:
            self.reader.connect()
        return self.reader.lookup(user_ids)

    def is_cached(self, *user_ids: int) -> bool:
        """Whether all of these users are hits."""
        return None not in self.cached(*user_ids)

    def cached_segments(self, user_id: int) -> tuple[int, ...] | None:
        (entry,) = self.cached(user_id)
        return entry if entry is None else tuple(entry[FIRST_SEGMENT:])


@pytest.fixture
def installation(pg_server: PostgresServer) -> Iterator[Installation]:
    with new_installation(pg_server, shards=SHARDS) as made:
        yield made


@pytest.fixture
def world(installation: Installation, cache_server: RedisServer) -> Iterator[World]:
    """A world on the session's cache, which is emptied first."""
    made = World(installation, cache_server)
    made.raw.flushall()
    made.raw.config_set("maxmemory-policy", "volatile-lru")
    yield made
    made.close()


@pytest.fixture
def own_cache(tmp_path: Path) -> Iterator[RedisServer]:
    """The test's own cache, which it may kill, pause and restart."""
    server = RedisServer("cache", tmp_path / "cache", {**CACHE_CONFIG, "maxmemory": "64mb"})
    server.start()
    yield server
    if server.running:
        server.resume()
    server.purge()


@pytest.fixture
def own_world(installation: Installation, own_cache: RedisServer) -> Iterator[World]:
    made = World(installation, own_cache)
    yield made
    made.close()


@pytest.fixture(params=LANES)
def start(request: pytest.FixtureRequest) -> Iterator[Start]:
    """A function that starts a lane for a world, with changed settings if given."""
    started: list[Lane] = []

    def begin(world: World, **settings: object) -> Lane:
        url = world.server.url
        lane = LANES[request.param](world.settings.model_copy(update={"cache_url": url, **settings}))
        started.append(lane)
        return lane

    yield begin
    for lane in started:
        lane.close()


@pytest.fixture
def lane(world: World, start: Start) -> Lane:
    world.add_users(20)
    world.add_segment("beta", [2, 4, 5])
    world.add_segment("alpha", [4])
    return start(world)


@pytest.fixture
def watched(world: World, monkeypatch: pytest.MonkeyPatch) -> Watched:
    monkeypatch.setattr(segsvc.services.warming, "BLOCKS_AT_ONCE", 1)
    return Watched(world)
