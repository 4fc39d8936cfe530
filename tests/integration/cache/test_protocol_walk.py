"""Random walks of readers, writers and bulk changes over a real server that loses keys at random.

PostgreSQL is a dictionary here; everything else is real. After every step, the answer of a read must be at least as new
as everything acknowledged. The walk is useful only if it finds the holes that the protocol closes: so it is also made
on weakened protocols, and must fail on each.
"""

from __future__ import annotations

import random
from collections.abc import Callable, Sequence
from dataclasses import dataclass, field

import pytest

from segsvc.cache import scripts
from segsvc.cache.client import CacheClient
from segsvc.domain.membership import FIRST_SEGMENT, NEVER_US, ROW_VERSION, Entry, Grant
from tests.installation import KEYS
from tests.integration.cache.conftest import World

USERS = (2, 4)
SHARD = 0
STEPS = 1500
SEEDS = range(4)


class StaleHitError(AssertionError):
    """A read gets a value that is older than an acknowledged one."""


@dataclass
class Load:
    user: int
    grant: Grant
    read: tuple[int, int] | None = None


@dataclass
class Write:
    user: int
    token: bytes | None = None
    committed: int | None = None
    visible: bool = False


@dataclass
class Walk:
    """One walk. A protocol is a client and a few habits; weakenings change the client or the habits."""

    world: World
    client: CacheClient
    rng: random.Random
    read_first: bool = False
    drop_first: bool = False
    skip_drop: bool = False
    operations: int = 0
    versions: dict[int, int] = field(default_factory=lambda: dict.fromkeys(USERS, 0))
    acknowledged_operations: int = 0
    acknowledged: dict[int, int] = field(default_factory=lambda: dict.fromkeys(USERS, 0))
    loads: list[Load] = field(default_factory=list)
    early_reads: list[tuple[int, tuple[int, int]]] = field(default_factory=list)
    writes: list[Write] = field(default_factory=list)
    operation: str = "none"
    hits: int = 0

    def run(self, steps: int) -> None:
        moves: Sequence[tuple[int, Callable[[], None]]] = [
            (30, self.begin_load),
            (20, self.go_on_with_load),
            (4, self.abandon_load),
            (8, self.begin_write),
            (14, self.go_on_with_write),
            (5, self.go_on_with_operation),
            (2, self.lose_a_key),
        ]

        weights = [weight for weight, _ in moves]
        for _ in range(steps):
            self.rng.choices(moves, weights)[0][1]()
            self.look()

    def look(self) -> None:
        for user, entry in zip(USERS, self.world.cached(*USERS), strict=True):
            if entry is None:
                continue
            self.hits += 1
            if entry[ROW_VERSION] < self.acknowledged[user] or entry[FIRST_SEGMENT] < self.acknowledged_operations:
                raise StaleHitError

    def now(self, user: int) -> tuple[int, int]:
        return self.versions[user], self.operations

    def begin_load(self) -> None:
        user, read = self.rng.choice(USERS), None
        if self.read_first:
            if len(self.early_reads) < 3:
                self.early_reads.append((user, self.now(user)))
                return
            user, read = self.early_reads.pop(0)

        grant = self.client.acquire(SHARD, [user])
        if grant.user_ids and len(self.loads) < 4:
            self.loads.append(Load(user, grant, read))

    def go_on_with_load(self) -> None:
        if not self.loads:
            return

        load = self.rng.choice(self.loads)
        if load.read is None:
            load.read = self.now(load.user)
            return

        version, operations = load.read
        entry: Entry = (NEVER_US, version, 1, 0, 0, operations)
        self.client.fill(SHARD, load.grant, [(load.user, entry)])
        self.loads.remove(load)

    def abandon_load(self) -> None:
        if self.loads:
            self.loads.remove(self.rng.choice(self.loads))

    def begin_write(self) -> None:
        if len(self.writes) < 3:
            user = self.rng.choice(USERS)
            self.writes.append(Write(user, self.client.bar(SHARD, user) if self.rng.random() < 0.7 else None))

    def go_on_with_write(self) -> None:
        if not self.writes:
            return

        write = self.rng.choice(self.writes)

        if write.committed is None:
            if self.rng.random() < 0.15:
                self.writes.remove(write)  # a crash before the commit
                return
            self.versions[write.user] += 1
            write.committed = self.versions[write.user]
        elif not write.visible:
            if self.rng.random() < 0.2:
                write.token = None  # a crash: another process goes on, without the token
                return
            if not self.skip_drop:
                self.client.drop_entries(SHARD, [write.user], write.token)
            write.visible = True
        else:
            self.acknowledged[write.user] = max(self.acknowledged[write.user], write.committed)
            self.writes.remove(write)

    def go_on_with_operation(self) -> None:
        if self.operation == "none":
            if self.drop_first:
                self.client.drop_generations([SHARD])
            else:
                self.operations += 1
            self.operation = "begun"
        elif self.operation == "begun":
            if self.drop_first:
                self.operations += 1
            else:
                self.client.drop_generations([SHARD])
            self.operation = "dropped"
        else:
            self.acknowledged_operations = self.operations
            self.operation = "none"

    def lose_a_key(self) -> None:
        lost = self.rng.choice([KEYS.generation(SHARD), *KEYS.users(SHARD, USERS), None])
        if lost is None:
            self.world.raw.flushall()
        else:
            self.world.raw.delete(lost)


@pytest.mark.parametrize("seed", SEEDS)
def test_no_read_is_older_than_what_was_acknowledged(world: World, seed: int) -> None:
    walk = Walk(world, world.client, random.Random(seed))
    walk.run(STEPS)
    assert walk.hits > STEPS / 10, "a walk without hits proves nothing"


class AnyLease(CacheClient):
    """Fills as soon as a lease exists, whichever process holds it."""

    def fill(self, shard: int, grant: Grant, rows: Sequence[tuple[int, Entry]]) -> int:
        with self.connection(shard) as connection:
            for key in KEYS.users(shard, [user for user, _ in rows]):
                held: bytes | None = connection.run("GET", key)
                if held and held.startswith(b"L"):
                    grant = Grant(grant.nonce, held[1:], grant.user_ids)
        return super().fill(shard, grant, rows)


class NoLease(CacheClient):
    """Fills without a check of the key."""

    def fill(self, shard: int, grant: Grant, rows: Sequence[tuple[int, Entry]]) -> int:
        with self.connection(shard) as connection:
            for key in KEYS.users(shard, [user for user, _ in rows]):
                connection.run("SET", key, b"L" + grant.token, "PX", scripts.LEASE_MS)
        return super().fill(shard, grant, rows)


class NonceAtFill(CacheClient):
    """Takes the generation at the fill, not at the acquisition."""

    def fill(self, shard: int, grant: Grant, rows: Sequence[tuple[int, Entry]]) -> int:
        return super().fill(shard, Grant(self.acquire(shard, [999_998]).nonce, grant.token, grant.user_ids), rows)


WEAKENINGS: dict[str, tuple[type[CacheClient], dict[str, bool]]] = {
    "any lease will do": (AnyLease, {}),
    "no lease": (NoLease, {}),
    "nonce taken at the fill": (NonceAtFill, {}),
    "shard read before the lease": (CacheClient, {"read_first": True}),
    "generation dropped before the commit": (CacheClient, {"drop_first": True}),
    "no drop after the commit": (CacheClient, {"skip_drop": True}),
}


def _walk_often(world: World, client: CacheClient, habits: dict[str, bool]) -> None:
    for seed in range(20):
        world.raw.flushall()
        Walk(world, client, random.Random(seed), **habits).run(STEPS)


@pytest.mark.parametrize("name", WEAKENINGS)
def test_walk_finds_the_hole_of_a_weakened_protocol(world: World, name: str) -> None:
    kind, habits = WEAKENINGS[name]
    client = kind(world.server.url, find_keys=lambda: KEYS, timeout_s=0.5, ttl_s=3600)
    try:
        with pytest.raises(StaleHitError):
            _walk_often(world, client, habits)
    finally:
        client.close()
