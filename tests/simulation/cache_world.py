"""One run of the cache protocol: readers, loads, writers and bulk changes on the cache's own code, under the scheduler.

The real parts are ``CacheReader`` with its ``PatchStore``, ``CacheClient``, ``ColdReads`` except its threads,
``OverrideService``, and of ``Coordinator`` all that follows a decision: the commit, the patch, and DONE. PostgreSQL is
a dictionary whose every statement and commit is a step (``cache_shard``); Redis is ``MemoryRedis``.

After each step the world asks what a read would answer now, by its own reading of the bytes in the cache. It must be
the whole truth of one moment, and a ``Sight`` that ``patch_model`` knows.
"""

from __future__ import annotations

import contextlib
import threading
from collections import Counter
from collections.abc import Callable, Iterable
from dataclasses import dataclass
from functools import cache
from typing import Any, Final, TypeVar

import segsvc.cache.reader
import segsvc.cache.server
import segsvc.services.cold_reads
import segsvc.twophase.protocol
from segsvc.cache.client import CacheClient
from segsvc.cache.entry import decode, generation_of, prefix
from segsvc.cache.keys import Keys
from segsvc.cache.patch_store import PatchStore
from segsvc.cache.patches import CHUNK_SHIFT, CHUNK_SLOTS, decode_chunk, decode_list
from segsvc.cache.reader import CacheReader
from segsvc.domain.errors import ServiceError, shard_unavailable
from segsvc.domain.membership import EPOCH, FIRST_SEGMENT, ROW_VERSION, SLOT, Entry, LoadedUser
from segsvc.domain.override import OverrideChanges
from segsvc.services.cold_reads import ColdReads, Limits, _Shard
from segsvc.services.overrides import OverrideService
from segsvc.twophase.protocol import Coordinator
from tests.simulation import patch_model
from tests.simulation.cache_shard import LATE_USER, SHARD, USERS, Ledger, Overrides, Reads, Shard, Truth, draw_changes
from tests.simulation.commit_world import UNAVAILABLE, Silent
from tests.simulation.database import Server
from tests.simulation.memory_redis import MemoryConnection, MemoryRedis
from tests.simulation.scheduler import FaultRates, Scheduler, Violation

T = TypeVar("T")
STEPS = 500
DRAIN_STEPS = 4000


@cache
def known_sights() -> frozenset[patch_model.Sight]:
    """The sights that the model can reach. One load shows as much as two, and one change of the user as much as many.

    Three operations show more than two: a change of the user that is not acknowledged yet is too old to be named by the
    second patch, and the third is not published.
    """
    return patch_model.explore(
        patch_model.Rules(), patch_model.Bounds(operations=3, publishers=0, patches=1, calls=True)
    ).sights


KEYS: Final = Keys(b"0")


class SimulatedClient(CacheClient):
    """The real client on connections to the server in memory."""

    RETRY_S = 0.0

    def __init__(self, scheduler: Scheduler, server: MemoryRedis, ttl_s: int, patches_max: int) -> None:
        super().__init__(
            "redis://memory",
            find_keys=lambda: KEYS,
            timeout_s=0.0,
            ttl_s=ttl_s,
            patches_max=patches_max,
            now_us=lambda: int(scheduler.now * 1e6),
            connect=lambda _url, _timeout_s: MemoryConnection(scheduler, server),  # type: ignore[arg-type, return-value]
        )


class AnySlug:
    """Every segment has a name."""

    def read_named(
        self, _shard: int, read: Callable[[], T], _ids: Callable[[T], Iterable[int]]
    ) -> tuple[T, frozenset[int]]:
        return read(), frozenset()

    def in_slug_order(self, segment_ids: Iterable[int]) -> list[int]:
        return sorted(segment_ids)


class SimulatedColdReads(ColdReads):
    """The real loads; the scheduler's tasks are its threads."""

    PROBE_S = 0.0  # its clock is not the scheduler's

    def __init__(self, reads: Reads, cache: CacheClient) -> None:
        self._reads = reads
        self._cache = cache
        self._slugs = AnySlug()  # type: ignore[assignment]
        self._limits = Limits(waiting_max=100, threads=2, statement_s=10, stalled_s=1000)
        self._shards = [_Shard(SHARD)]
        self._closing = threading.Event()
        self._threads = []

    def work(self, scheduler: Scheduler) -> None:
        """Load for ever, as one of the real threads does."""
        shard = self._shards[SHARD]
        while True:
            scheduler.wait(lambda: bool(shard.gathering), None, "wait for a message")
            load = self._next(shard)
            assert load is not None
            try:
                self._load(shard, load)
            finally:
                shard.loads.discard(load)


@dataclass(frozen=True)
class Habits:
    """What a mutant replaces."""

    redis: type[MemoryRedis] = MemoryRedis
    client: type[SimulatedClient] = SimulatedClient
    cold_reads: type[SimulatedColdReads] = SimulatedColdReads
    patch_store: type[PatchStore] = PatchStore
    reads: type[Reads] = Reads
    shard: type[Shard] = Shard
    coordinator: type[Coordinator] = Coordinator
    delete_for_duplicates: bool = True


@dataclass(frozen=True)
class Clock:
    """Takes the place of ``time`` in a reader."""

    scheduler: Scheduler

    def time_ns(self) -> int:
        return int(self.scheduler.now * 1e9)


@dataclass(frozen=True)
class Stored:
    """What the bytes in the cache say of a user.

    Attributes:
        hit: as in ``patch_model.Sight``.
        epoch: of the newest operation in the list.
    """

    hit: str
    segments: tuple[int, ...]
    version: int
    epoch: int


class CacheWorld:
    def __init__(
        self, seed: int, habits: Habits | None = None, *, rates: FaultRates | None = None, verbose: bool = False
    ) -> None:
        self.scheduler = Scheduler(seed, rates or FaultRates(), verbose)
        self.habits = habits or Habits()
        random = self.scheduler.random

        self.redis = self.habits.redis(lambda: self.scheduler.now)
        self.truth = Truth(seed, draw_changes(random, random.choice((0, 1, 2, 3, 5))))
        for user in USERS:
            if user != LATE_USER:
                self.truth.change(user)
                self.truth.acknowledged[user] = 1

        self._snapshot = dict(self.redis.values)
        self.hits: Counter[int] = Counter()
        """By user."""
        self.reads = 0
        self.patched = 0
        """How often the cache began to hold an entry that is a hit by patches."""

        # A short life lets an operation wait for its end; a short list and a small memory make patches fall out.
        self._ttl_s = random.choice((20, 86_400))
        self._patches_max = random.choice((1, 2, 64))
        self._patch_bytes_max = random.choice((5_000, 10_000, 1 << 20))

        self._events = [random.choice(USERS) for _ in range(random.choice((0, 1, 2, 4)))]
        self._overrides = [random.choice(USERS) for _ in range(random.choice((0, 1, 2)))]

        self._versions: dict[int, int] = {}
        """By event: the version that the event gave its user."""
        self._seen: dict[int, tuple[object, ...]] = {}

        self.scheduler.after_step = self._look

    def _server(self) -> Server:
        return Server(self.scheduler, "shard", lambda: shard_unavailable(SHARD))

    def _client(self) -> SimulatedClient:
        return self.habits.client(self.scheduler, self.redis, self._ttl_s, self._patches_max)

    # -- the cast ---------------------------------------------------------------------------------------------------

    def front(self) -> None:
        """Run two tasks that read and two that load, with one client of their own."""
        client = self._client()
        cold = self.habits.cold_reads(self.habits.reads(self._server(), self.truth), client)
        for n in range(2):
            self.scheduler.spawn(f"{self.scheduler.current_name} load {n}", lambda: cold.work(self.scheduler))
        self.scheduler.spawn(f"{self.scheduler.current_name} second", lambda: self._read(client, cold))
        self._read(client, cold)

    def _read(self, client: CacheClient, cold: ColdReads) -> None:
        reader = CacheReader(client, 1, patches=self.habits.patch_store(int, self._patch_bytes_max))
        while True:
            self.scheduler.sleep(0.05)

            user = self.scheduler.random.choice(USERS)
            promised = (self.truth.acknowledged_operation, self.truth.acknowledged.get(user, 0))
            begin = self.scheduler.now

            entry: Entry | None = None
            with contextlib.suppress(ServiceError):
                reader.connect()
                [entry] = reader.lookup([user])

            if entry is not None:
                self.hits[user] += 1
            else:
                outcome = self._cold(cold, user)
                if isinstance(outcome, ServiceError):
                    if outcome.reason.text == "USER_NOT_FOUND" and promised[1]:
                        raise Violation(f"user {user} was acknowledged and is not found")
                    continue
                entry = outcome

            self.reads += 1
            self._judge("a read saw", user, entry[FIRST_SEGMENT:], entry[ROW_VERSION], promised, begin)

    def _judge(
        self, who: str, user: int, segments: tuple[int, ...], version: int, promised: tuple[int, int], begin: float
    ) -> None:
        truth = self.truth
        if truth.was_true(user, segments, version, promised, begin, self.scheduler.now):
            return
        raise Violation(
            f"{who} {segments} of user {user}, version {version}; operation {promised[0]} and version {promised[1]} "
            f"were promised at {begin:.3f}; now operation {truth.epoch}, versions of epochs {truth.committed_in[user]}"
        )

    def _cold(self, cold: ColdReads, user: int) -> Entry | ServiceError:
        outcomes: list[Entry | ServiceError] = []
        cold.submit([user], None, lambda _, outcome: outcomes.append(outcome))
        self.scheduler.wait(lambda: bool(outcomes), None, "wait for visits")
        return outcomes[0]

    def warmer(self) -> None:
        """Renew entries of earlier epochs, some of which would still be hits."""
        client = self._client()
        reads = self.habits.reads(self._server(), self.truth)

        while True:
            self.scheduler.sleep(1.0)
            enough = self.scheduler.random.randint(0, self.truth.epoch)
            with contextlib.suppress(ServiceError):
                grant = client.acquire(SHARD, USERS, enough=enough)
                rows = reads.load(SHARD, sorted(grant.user_ids))
                client.fill(SHARD, grant, [(row.user_id, _entry_of(row)) for row in rows])
                client.release(SHARD, grant, sorted(grant.user_ids - {row.user_id for row in rows}))

    def bridge(self) -> None:
        """Handle events: commit, invalidate the cache, acknowledge. An event is delivered until acknowledged."""
        client = self._client()
        server = self._server()

        while self._events:
            self.scheduler.sleep(self.scheduler.random.random())
            user, number = self._events[0], len(self._events)
            try:
                duplicate = self._apply(server, user, number)
                if self.scheduler.chance(0.5):
                    # The entry is still there: operations may be published before it goes.
                    self.scheduler.sleep(3 * self.scheduler.random.random(), "event committed")
                created = not duplicate and self.truth.version(user) == 1
                if not created and (self.habits.delete_for_duplicates or not duplicate):
                    client.drop_entries(SHARD, [user])
            except UNAVAILABLE:
                self.scheduler.sleep(0.1)
                continue

            self.truth.acknowledged[user] = max(self.truth.acknowledged.get(user, 0), self._versions[number])
            if len(self._events) == number:
                self._events.pop(0)

    def _apply(self, server: Server, user: int, number: int) -> bool:
        """Apply the event. Returns whether it had been applied before."""
        with server.transaction() as transaction:
            transaction.lock(self.truth.locks[user])
            if server.ask("known?", lambda: number in self._versions):
                transaction.end()
                return True

            def applied() -> None:
                self.truth.change(user)
                self._versions[number] = self.truth.version(user)

            transaction.write(applied)
        return False

    def overrider(self) -> None:
        """Change one user's overrides by a call; a call that fails is not repeated."""
        service = OverrideService(Overrides(self._server(), self.truth), self._client(), None, self)  # type: ignore[arg-type]

        while self._overrides:
            user = self._overrides.pop()
            known = self.truth.version(user)
            try:
                service.modify(user, OverrideChanges((), ()), None, timeout_s=30)
            except ServiceError:
                continue

            # At least one more than before; versions that events added meanwhile are acknowledged by the bridge.
            self.truth.acknowledged[user] = max(self.truth.acknowledged.get(user, 0), known + 1)

    def operator(self) -> None:
        """Carry decided operations out, one after the other: commit, publish, report done. Failures are repeated.

        The world has two, which are at the same operation: twins. One that is frozen wakes as a zombie.
        """
        coordinator = self.habits.coordinator(
            cluster="world",
            ledger=Ledger(self._server(), self.truth),  # type: ignore[arg-type]
            participants=[self.habits.shard(self._server(), self.truth)],  # type: ignore[list-item]
            invalidation=self._client(),
            dispatcher=None,  # type: ignore[arg-type]
            fan_out=lambda visit, participants: [visit(one) for one in participants],
            observer=None,  # type: ignore[arg-type]
            crash_points=self,
        )

        while self.truth.acknowledged_operation < len(self.truth.planned):
            wanted = self.truth.planned[self.truth.acknowledged_operation]
            self.scheduler.sleep(self.scheduler.random.random())
            try:
                coordinator.finalize(wanted.id)
            except UNAVAILABLE:
                self.scheduler.sleep(0.1)

    def forgetful(self) -> None:
        """The server loses a key or all keys, has no memory left, or restarts; and time passes, so that leases end."""
        random = self.scheduler.random

        while True:
            self.scheduler.sleep(0.2)
            if not self.scheduler.chance(0.15):
                continue

            what = random.choice(("evict", "evict", "patch", "flush", "empty", "snapshot", "restore", "full", "time"))
            self.scheduler.note(f"the cache: {what}")

            if what in ("evict", "patch"):
                keys = [key for key in sorted(self.redis.values) if what == "evict" or b":p" in key or b":c:" in key]
                if keys:
                    self.redis.evict(random.choice(keys))
            elif what == "flush":
                self.redis.values.clear()
            elif what == "empty":
                self.redis.start({})
            elif what == "snapshot":
                self._snapshot = dict(self.redis.values)
            elif what == "restore":
                self.redis.start(dict(self._snapshot))
            elif what == "full":
                self.redis.full = True
                self.scheduler.sleep(random.random())
                self.redis.full = False
            elif what == "time":
                self.scheduler.now += random.choice((1.0, 11.0, 61.0))

    def reach(self, point: str, **_: object) -> None:
        self.scheduler.pause(point)

    # -- what the cache holds ---------------------------------------------------------------------------------------

    def _look(self) -> None:
        """Check what a read of each user would find now: the whole truth of one moment, as the model knows it."""
        truth, now = self.truth, self.scheduler.now
        shared = (
            self.redis.peek(KEYS.generation(SHARD)),
            self.redis.peek(KEYS.patches(SHARD)),
            len(self.redis.values),
            truth.epoch,
            sum(change.ends_at <= now for change in truth.planned),
        )

        for user in truth.committed_in:
            held = self.redis.peek(KEYS.user(SHARD, user))
            promised = (truth.acknowledged_operation, truth.acknowledged.get(user, 0))
            present = (*shared, held, truth.version(user), promised)
            if self._seen.get(user) == present:
                continue

            self._seen[user] = present
            found = self._stored(user)
            if found is not None:
                self.patched += found.hit == "patched"
                self._judge("a read would see", user, found.segments, found.version, promised, now)

            looks = patch_model.sight(
                generation=generation_of(shared[0], self.redis.run_id) is not None,
                key="" if held is None else held[:1].decode(),
                hit="" if found is None else found.hit,
                answer=None if found is None else (found.epoch, found.version),
                committed=(truth.epoch, truth.version(user)),
                promised=promised,
            )
            if looks not in known_sights():
                raise Violation(f"the model does not know what the cache holds of user {user}: {looks}")

    def _stored(self, user: int) -> Stored | None:
        """What a read of a user finds, by the rules and not by the reader's code; None: a miss."""
        redis, now_us = self.redis, int(self.scheduler.now * 1e6)
        generation = generation_of(redis.peek(KEYS.generation(SHARD)), redis.run_id)
        if generation is None:
            return None
        entry = decode(redis.peek(KEYS.user(SHARD, user)), prefix(generation.nonce), now_us)
        if entry is None:
            return None

        epoch, segments = entry[EPOCH], set(entry[FIRST_SEGMENT:])
        if epoch >= generation.newest:
            return Stored("entry", tuple(sorted(segments)), entry[ROW_VERSION], epoch)

        notes = decode_list(redis.peek(KEYS.patches(SHARD)), generation.nonce)
        if not notes or epoch < notes[0].epoch - 1:
            return None

        number, place = entry[SLOT] >> CHUNK_SHIFT, entry[SLOT] % CHUNK_SLOTS
        for note in notes:
            if note.epoch <= epoch:
                continue
            chunk = decode_chunk(redis.peek(KEYS.chunk(SHARD, note.token, number)))
            if chunk is None or note.valid_until_us <= now_us or _bit(chunk.changed, place):
                return None
            (segments.add if _bit(chunk.members, place) else segments.discard)(note.segment_id)

        return Stored("patched", tuple(sorted(segments)), entry[ROW_VERSION], notes[-1].epoch)

    # -- the run ----------------------------------------------------------------------------------------------------

    def run(self) -> None:
        """Raises Violation."""
        modules: list[Any] = [segsvc.cache.server, segsvc.services.cold_reads, segsvc.twophase.protocol]
        kept = [module.log for module in modules]
        clock = segsvc.cache.reader.time
        for module in modules:
            module.log = Silent()
        segsvc.cache.reader.time = Clock(self.scheduler)  # type: ignore[assignment]

        try:
            self._run()
        finally:
            self.scheduler.close()
            segsvc.cache.reader.time = clock
            for module, log in zip(modules, kept, strict=True):
                module.log = log

    def _run(self) -> None:
        scheduler = self.scheduler
        for name, main in (
            ("front 1", self.front), ("front 2", self.front), ("bridge", self.bridge), ("overrider", self.overrider),
            ("operator 1", self.operator), ("operator 2", self.operator), ("warmer", self.warmer),
            ("server", self.forgetful),
        ):  # fmt: skip
            scheduler.add_process(name, main)

        scheduler.run(STEPS)

        scheduler.end_faults()
        self.redis.full = False
        if not scheduler.run(DRAIN_STEPS, self._at_rest):
            raise Violation("it does not come to rest")

        # Whatever was lost, reads are served, and the cache serves them: no user is a miss for ever.
        scheduler.now += 61.0
        hits, users = self.hits.copy(), list(self.truth.committed_in)
        if not scheduler.run(DRAIN_STEPS, lambda: all(self.hits[user] > hits[user] for user in users)):
            raise Violation("a user is never a hit again")

    def _at_rest(self) -> bool:
        done = self.truth.acknowledged_operation >= len(self.truth.planned)
        return done and not self._events and not self._overrides


def _entry_of(row: LoadedUser) -> Entry:
    return (row.valid_until_us, row.row_version, row.read_time_us, row.epoch, row.slot, *sorted(row.segment_ids))


def _bit(half: bytes | None, place: int) -> int:
    return half[place >> 3] & 1 << (place & 7) if half is not None else 0
