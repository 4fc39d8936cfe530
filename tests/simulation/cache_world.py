"""One run of the cache protocol: readers, loads, writers and bulk changes on the cache's own code, under the scheduler.

The real parts are ``CacheReader``, ``CacheClient``, ``ColdReads`` except its threads, and ``OverrideService``.
PostgreSQL is a dictionary whose every statement and commit is a step; Redis is ``MemoryRedis``.
"""

from __future__ import annotations

import contextlib
import threading
from collections.abc import Callable, Iterable, Sequence
from dataclasses import dataclass, field
from functools import cache
from typing import Final, TypeVar

import segsvc.cache.server
import segsvc.services.cold_reads
from segsvc.cache.client import CacheClient
from segsvc.cache.entry import decode, nonce_of, prefix
from segsvc.cache.keys import Keys
from segsvc.cache.patch_store import PatchStore
from segsvc.cache.reader import CacheReader
from segsvc.domain.errors import ServiceError, shard_unavailable
from segsvc.domain.membership import FIRST_SEGMENT, NEVER_US, ROW_VERSION, Entry, LoadedUser
from segsvc.domain.override import OverrideChanges, UserOverrides
from segsvc.services.cold_reads import ColdReads, Limits, _Shard
from segsvc.services.overrides import OverrideService
from tests.simulation import cache_model
from tests.simulation.commit_world import UNAVAILABLE, Silent
from tests.simulation.database import Lock, Server
from tests.simulation.memory_redis import MemoryConnection, MemoryRedis
from tests.simulation.scheduler import FaultRates, Scheduler, Violation

T = TypeVar("T")
SHARD = 0
USERS = (1, 2)
LATE_USER = 2
"""Created during the run, without a word to the cache."""
STEPS = 400
DRAIN_STEPS = 3000


@dataclass
class Truth:
    """What is committed, and which part of it has been acknowledged."""

    users: dict[int, int] = field(default_factory=dict)
    operation: int = 0
    acknowledged: dict[int, int] = field(default_factory=dict)
    acknowledged_operation: int = 0
    locks: dict[int, Lock] = field(default_factory=lambda: {user: Lock() for user in USERS})
    """Locks of the users' rows: events and overrides of one user run one after the other."""


@cache
def known_sights() -> frozenset[cache_model.Sight]:
    """The sights that the model can reach. One load shows as much as two, and one user version as much as many."""
    return cache_model.explore(cache_model.Rules(), cache_model.Bounds(loads=1, versions=1, operations=1)).sights


KEYS: Final = Keys(b"0")


class SimulatedClient(CacheClient):
    """The real client on connections to the server in memory."""

    RETRY_S = 0.0

    def __init__(self, scheduler: Scheduler, server: MemoryRedis) -> None:
        super().__init__(
            "redis://memory",
            find_keys=lambda: KEYS,
            timeout_s=0.0,
            ttl_s=86_400,
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


class Reads:
    """The shard, for loads. Implements ``services.cold_reads.UserReads``."""

    def __init__(self, server: Server, truth: Truth) -> None:
        self._server = server
        self._truth = truth

    def load(self, shard: int, user_ids: Sequence[int], *, timeout_s: float | None = None) -> Sequence[LoadedUser]:
        def select() -> list[LoadedUser]:
            truth = self._truth
            return [
                LoadedUser(user, 0, truth.users[user], 0, NEVER_US, (truth.operation,), truth.operation)
                for user in user_ids
                if user in truth.users
            ]

        rows = self._server.ask("SELECT", select)
        self._server.scheduler.dawdle("SELECT answered")
        return rows


class Overrides:
    """The shard, for overrides. Implements ``services.overrides.OverrideStore``."""

    shard_count = 1

    def __init__(self, server: Server, truth: Truth) -> None:
        self._server = server
        self._truth = truth

    def modify(
        self,
        user_id: int,
        changes: OverrideChanges,
        request: object,
        before_commit: Callable[[], None],
        *,
        timeout_s: float | None,
    ) -> UserOverrides | None:
        truth = self._truth

        with self._server.transaction() as transaction:
            transaction.lock(truth.locks[user_id])
            if user_id not in truth.users:
                transaction.end()

                return None
            transaction.write(lambda: _raise_version(truth, user_id))
            before_commit()
        return UserOverrides((), 0, ())

    def page(self, user_id: int, after: str, limit: int, *, timeout_s: float | None) -> None:
        """Not called here."""


def _raise_version(truth: Truth, user: int) -> None:
    truth.users[user] = truth.users.get(user, 0) + 1


@dataclass(frozen=True)
class Habits:
    """What a mutant replaces."""

    redis: type[MemoryRedis] = MemoryRedis
    client: type[SimulatedClient] = SimulatedClient
    cold_reads: type[SimulatedColdReads] = SimulatedColdReads
    delete_for_duplicates: bool = True
    drop_before_commit: bool = False


class CacheWorld:
    def __init__(
        self, seed: int, habits: Habits | None = None, *, rates: FaultRates | None = None, verbose: bool = False
    ) -> None:
        self.scheduler = Scheduler(seed, rates or FaultRates(), verbose)
        self.habits = habits or Habits()

        self.redis = self.habits.redis(lambda: self.scheduler.now)
        self.truth = Truth(users={user: 1 for user in USERS if user != LATE_USER})

        self._snapshot = dict(self.redis.values)
        self.hits = 0
        self.reads = 0

        random = self.scheduler.random
        self._events = [random.choice(USERS) for _ in range(random.choice((0, 1, 2, 3)))]
        self._operations = random.choice((0, 1, 2))
        self._overrides = [random.choice(USERS) for _ in range(random.choice((0, 1, 2)))]

        self._versions: dict[int, int] = {}
        """By event: the version that the event gave its user."""
        self._seen: dict[int, tuple[object, ...]] = {}

        self.scheduler.after_step = self._look

    def _server(self) -> Server:
        return Server(self.scheduler, "shard", lambda: shard_unavailable(SHARD))

    # -- the cast ---------------------------------------------------------------------------------------------------

    def front(self) -> None:
        """Run two tasks that read and two that load, with one client of their own."""
        client = self.habits.client(self.scheduler, self.redis)
        cold = self.habits.cold_reads(Reads(self._server(), self.truth), client)
        for n in range(2):
            self.scheduler.spawn(f"{self.scheduler.current_name} load {n}", lambda: cold.work(self.scheduler))
        self.scheduler.spawn(f"{self.scheduler.current_name} second", lambda: self._read(client, cold))
        self._read(client, cold)

    def _read(self, client: CacheClient, cold: ColdReads) -> None:
        reader = CacheReader(client, 1, patches=PatchStore(int))
        while True:
            self.scheduler.sleep(0.05)

            user = self.scheduler.random.choice(USERS)
            known = self.truth.acknowledged.get(user, 0)
            known_operation = self.truth.acknowledged_operation

            entry: Entry | None = None
            with contextlib.suppress(ServiceError):
                reader.connect()
                [entry] = reader.lookup([user])

            if entry is not None:
                self.hits += 1
            else:
                outcome = self._cold(cold, user)
                if isinstance(outcome, ServiceError):
                    if outcome.reason.text == "USER_NOT_FOUND" and known:
                        raise Violation(f"user {user} was acknowledged and is not found")
                    continue
                entry = outcome

            self.reads += 1
            version, operation = entry[ROW_VERSION], entry[FIRST_SEGMENT]

            if version < known:
                raise Violation(f"a read saw version {version} of user {user}, {known} had been acknowledged")
            if operation < known_operation:
                raise Violation(f"a read saw operation {operation}, {known_operation} had been reported done")
            if version > self.truth.users[user] or operation > self.truth.operation:
                raise Violation("a read saw what was never true")

    def _cold(self, cold: ColdReads, user: int) -> Entry | ServiceError:
        outcomes: list[Entry | ServiceError] = []
        cold.submit([user], None, lambda _, outcome: outcomes.append(outcome))
        self.scheduler.wait(lambda: bool(outcomes), None, "wait for visits")
        return outcomes[0]

    def bridge(self) -> None:
        """Handle events: commit, invalidate the cache, acknowledge. An event is delivered until acknowledged."""
        client = self.habits.client(self.scheduler, self.redis)
        server = self._server()

        while self._events:
            user, number = self._events[0], len(self._events)
            try:
                duplicate = self._apply(server, user, number)
                created = not duplicate and self.truth.users[user] == 1
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
                _raise_version(self.truth, user)
                self._versions[number] = self.truth.users[user]

            transaction.write(applied)
        return False

    def overrider(self) -> None:
        """Change one user's overrides by a call; a call that fails is not repeated."""
        client = self.habits.client(self.scheduler, self.redis)
        service = OverrideService(Overrides(self._server(), self.truth), client, None, self)  # type: ignore[arg-type]

        while self._overrides:
            user = self._overrides.pop()
            known = self.truth.users.get(user, 0)
            try:
                service.modify(user, OverrideChanges((), ()), None, timeout_s=30)
            except ServiceError:
                continue

            # At least one more than before; versions that events added meanwhile are acknowledged by the bridge.
            self.truth.acknowledged[user] = max(self.truth.acknowledged.get(user, 0), known + 1)

    def operator(self) -> None:
        """Make bulk changes: commit on the shard, drop the generation, report it done. Failures are repeated."""
        client = self.habits.client(self.scheduler, self.redis)
        server = self._server()

        while self.truth.acknowledged_operation < self._operations:
            wanted = self.truth.acknowledged_operation + 1
            try:
                if self.habits.drop_before_commit:
                    client.drop_generations([SHARD])
                server.order("COMMIT PREPARED", lambda n=wanted: self._commit_operation(n))  # type: ignore[misc]
                if not self.habits.drop_before_commit:
                    client.drop_generations([SHARD])
            except ServiceError:
                self.scheduler.sleep(0.1)
                continue

            self.truth.acknowledged_operation = wanted

    def _commit_operation(self, number: int) -> None:
        self.truth.operation = max(self.truth.operation, number)

    def forgetful(self) -> None:
        """The server loses a key or all keys, or it restarts; and time passes, so that leases end."""
        random = self.scheduler.random

        while True:
            self.scheduler.sleep(0.2)
            if not self.scheduler.chance(0.3):
                continue

            what = random.choice(("evict", "evict", "flush", "empty", "snapshot", "restore", "time"))
            self.scheduler.note(f"the cache: {what}")

            if what == "evict" and self.redis.values:
                self.redis.evict(random.choice(sorted(self.redis.values)))
            elif what == "flush":
                self.redis.values.clear()
            elif what == "empty":
                self.redis.start({})
            elif what == "snapshot":
                self._snapshot = dict(self.redis.values)
            elif what == "restore":
                self.redis.start(dict(self._snapshot))
            elif what == "time":
                self.scheduler.now += random.choice((1.0, 11.0, 61.0))

    def reach(self, point: str, **_: object) -> None:
        self.scheduler.pause(point)

    def _look(self) -> None:
        """Check that the model knows each user's present sight: what the cache holds, beside what is committed."""
        g, truth = self.redis.peek(KEYS.generation(SHARD)), self.truth
        nonce = nonce_of(g, self.redis.run_id)

        for user, version in truth.users.items():
            held = self.redis.peek(KEYS.user(SHARD, user))
            promised = (truth.acknowledged_operation, truth.acknowledged.get(user, 0))
            now = (nonce, held, truth.operation, version, promised)
            if self._seen.get(user) == now:
                continue

            self._seen[user] = now
            entry = decode(held, None if nonce is None else prefix(nonce), int(self.scheduler.now * 1e6))

            looks = cache_model.sight(
                generation=nonce is not None,
                key="" if held is None else held[:1].decode(),
                value=None if entry is None else (entry[FIRST_SEGMENT], entry[ROW_VERSION]),
                committed=(truth.operation, version),
                promised=promised,
            )

            if looks not in known_sights():
                raise Violation(f"the model does not know what the cache holds of user {user}: {looks}")

    # -- the run ----------------------------------------------------------------------------------------------------

    def run(self) -> None:
        """Raises Violation."""
        modules = (segsvc.cache.server, segsvc.services.cold_reads)
        kept = [module.log for module in modules]
        for module in modules:
            module.log = Silent()  # type: ignore[assignment]

        try:
            self._run()
        finally:
            self.scheduler.close()
            for module, log in zip(modules, kept, strict=True):
                module.log = log

    def _run(self) -> None:
        scheduler = self.scheduler
        for name, main in (
            ("front 1", self.front), ("front 2", self.front), ("bridge", self.bridge), ("overrider", self.overrider),
            ("operator", self.operator), ("server", self.forgetful),
        ):  # fmt: skip
            scheduler.add_process(name, main)

        scheduler.run(STEPS)

        scheduler.end_faults()
        if not scheduler.run(DRAIN_STEPS, self._at_rest):
            raise Violation("it does not come to rest")

        # Whatever was lost, reads are served, and the cache serves them: no key is stuck for ever.
        scheduler.now += 61.0
        hits = self.hits
        if not scheduler.run(DRAIN_STEPS, lambda: self.hits > hits + 1):
            raise Violation("nothing is ever a hit again")

    def _at_rest(self) -> bool:
        return not self._events and not self._overrides and self.truth.acknowledged_operation >= self._operations
