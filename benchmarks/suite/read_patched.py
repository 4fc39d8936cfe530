"""Reads beside rollouts that patch the cache: how many stay hits, how long they take, and what a patch costs a hit."""

from __future__ import annotations

import contextlib
import itertools
import json
import statistics
import threading
import time
import urllib.request
from collections.abc import Callable, Iterator, Mapping, Sequence
from dataclasses import dataclass, field

import psutil
import redis
from confluent_kafka import Producer
from prometheus_client.parser import text_string_to_metric_families

from benchmarks import reading
from benchmarks.bulk import pid_of, service
from benchmarks.harness import (
    Curve,
    Result,
    Sample,
    benchmark,
    measure_pair,
    ratio_at_most,
    rounds_wanted,
    suspended,
    value_at_least,
)
from benchmarks.load import GET_USER_SEGMENTS, Body, Load, LoadReport
from benchmarks.seed import Shape
from benchmarks.suite.read import COMPARED, IN_FLIGHT
from benchmarks.suite.read import SHAPE as READ_HIT
from benchmarks.world import World
from segsvc.bootstrap import make_cache
from segsvc.cache import entry as entries
from segsvc.config import Settings
from segsvc.demo.client import Client
from segsvc.domain.events import UPDATE_TOPIC
from segsvc.domain.membership import EPOCH
from segsvc.domain.sharding import shard_of
from segsvc.local.redis import CACHE_CONFIG, RedisServer
from segsvc.local.stack import LocalStack

SHAPE = Shape(users=250_000, segments=57, shards=4)
"""A million users with 20 segments each on average."""
READERS = 64
SECONDS = 30.0
ROUNDS = 3
ROLLOUT_EVERY_S = 2.0
UPDATES_PER_S = 500
UPDATED_SHARE = 0.05
"""Share of the users whom events change. The readers leave them out: a changed user's next read is a miss, as it must
be."""
WINDOW_S = 1.0
"""The share of hits is taken in every second: a second of misses must not hide in half a minute of hits."""
SAMPLED = 20
"""One user in twenty is looked up to see whether the cache is warm."""
ROLLOUTS_WEIGHED = 5
SETTLED_BYTES = 1000
"""In half a second: less than any change of a user or of a segment sends to the cache."""
PATCHES = 8


# -- the load -------------------------------------------------------------------------------------------------------


@dataclass(slots=True)
class Beside:
    """What went on beside the reads of a round."""

    hits: list[tuple[int, int]] = field(default_factory=list)
    """(hits, reads) of each second."""
    rollouts_ms: list[float] = field(default_factory=list)
    updates: int = 0
    errors: list[Exception] = field(default_factory=list)


class Bench:
    """The whole stack with all users cached, and what may go on beside the reads."""

    def __init__(self, stack: LocalStack) -> None:
        self._stack = stack
        self.settings = settings = stack.settings
        self._client = Client.of(settings)
        self._producer = Producer({"bootstrap.servers": settings.kafka_bootstrap_servers, "linger.ms": 5})
        self._segments = itertools.cycle(segment.slug for segment, _ in SHAPE.rules)
        self._percents = itertools.cycle(p for p in (20.0, 50.0, 35.0) for _ in SHAPE.rules)
        self._version = itertools.count(1)

        users = reading.shuffled_users(SHAPE)
        updated = int(len(users) * UPDATED_SHARE)
        self._updated = itertools.cycle(users[:updated])
        self.user_ids = users[updated:]

    def close(self) -> None:
        self._producer.flush(10)
        self._client.close()

    def await_warm(self) -> None:
        reading.await_cached(self.settings, self.user_ids[::SAMPLED], timeout_s=300.0)

    @contextlib.contextmanager
    def without_warmer(self) -> Iterator[None]:
        """Let the warming worker stand still inside the block."""
        (warmer,) = [part.pid for part in self._stack.status() if part.name == "worker-warming" and part.pid]
        processes = [psutil.Process(warmer), *psutil.Process(warmer).children(recursive=True)]
        with suspended(processes):
            yield

    def beside(self, ended: threading.Event, *, rollouts: bool) -> tuple[Beside, list[threading.Thread]]:
        """Start what goes on beside the reads until ``ended``."""
        done = Beside()
        tasks: list[Callable[[Beside, threading.Event], None]] = [self._update, self._count_hits]
        if rollouts:
            tasks.append(self._roll_out)

        def run(task: Callable[[Beside, threading.Event], None]) -> None:
            try:
                task(done, ended)
            except Exception as error:  # noqa: BLE001  # raised again by the caller
                done.errors.append(error)

        threads = [threading.Thread(target=run, args=(task,)) for task in tasks]
        for thread in threads:
            thread.start()
        return done, threads

    def roll_out_next(self) -> None:
        """A rollout of the next segment, which changes about a third of the users' lists."""
        self._client.roll_out(next(self._segments), next(self._percents))

    def _roll_out(self, done: Beside, ended: threading.Event) -> None:
        due = time.monotonic()
        while not ended.wait(max(0.0, due - time.monotonic())):
            due += ROLLOUT_EVERY_S
            begun = time.monotonic()
            self.roll_out_next()
            done.rollouts_ms.append((time.monotonic() - begun) * 1000)

    def _update(self, done: Beside, ended: threading.Event) -> None:
        begun = time.monotonic()
        while not ended.wait(0.05):
            due = int((time.monotonic() - begun) * UPDATES_PER_S)
            while done.updates < due:
                user_id = next(self._updated)
                version = next(self._version)
                attributes = {"country": "RU", "platform": "web", "age": 18 + version % 50}
                value = json.dumps({"user_id": user_id, "version": version, "attributes": attributes})
                self._producer.produce(UPDATE_TOPIC, value, str(user_id).encode())
                done.updates += 1
            self._producer.poll(0)
        self._producer.flush(10)

    def _count_hits(self, done: Beside, ended: threading.Event) -> None:
        before = self.reads()
        while not ended.wait(WINDOW_S):
            now = self.reads()
            hits = now["hit"] - before["hit"]
            done.hits.append((hits, hits + sum(now[s] - before[s] for s in ("miss", "bypass", "error"))))
            before = now

    def reads(self) -> Mapping[str, int]:
        """The front's counts of users looked up, by the source of the answer."""
        with urllib.request.urlopen(f"http://{self.settings.metrics_address}/metrics", timeout=10) as answer:
            families = text_string_to_metric_families(answer.read().decode())
            counts = {
                sample.labels["source"]: int(sample.value)
                for family in families
                if family.name == "segsvc_reads"
                for sample in family.samples
                if sample.name == "segsvc_reads_total"
            }
        return {source: counts.get(source, 0) for source in ("hit", "miss", "bypass", "error")}


@benchmark("read_through_rollout")
def read_through_rollout(world: World) -> Iterator[Result | Curve]:
    """Reads at half the peak rate while a rollout of another segment commits every 2 s, beside the same without any."""
    with world.stack(SHAPE) as stack, contextlib.closing(Bench(stack)) as bench:
        bench.await_warm()
        bodies = [Body.single(user) for user in bench.user_ids]
        with Load(stack.settings.grpc_address, GET_USER_SEGMENTS, bodies, connections=READERS) as load:
            load.run(seconds=1.0, in_flight=READERS)
            rate = _answered(load.run(seconds=3.0, in_flight=READERS)).per_second / 2
            world.say(f"{READERS} readers at {rate:,.0f} calls/s")
            rounds: list[Beside] = []

            def read(*, rollouts: bool) -> Sample:
                bench.await_warm()
                ended = threading.Event()
                done, threads = bench.beside(ended, rollouts=rollouts)
                try:
                    report = load.run(seconds=SECONDS, rate=rate)
                finally:
                    ended.set()
                    for thread in threads:
                        thread.join()

                if done.errors:
                    raise done.errors[0]
                _answered(report)
                if rollouts:
                    rounds.append(done)
                hits = sum(hits for hits, _ in done.hits) / sum(reads for _, reads in done.hits)
                more = {"hits": hits, "p50_ms": report.percentile_ms(50), "max_ms": report.percentile_ms(100)}
                return Sample(report.percentile_ms(99), report.calls, more=more)

            pair = measure_pair(
                lambda: read(rollouts=True),
                lambda: read(rollouts=False),
                rounds=min(ROUNDS, rounds_wanted()),
                warm_up=False,
            )
        weighed = _weigh(bench)

    rollouts_ms = [ms for done in rounds for ms in done.rollouts_ms]
    yield pair.result(
        "read_through_rollout", "ms", ratio_at_most(1.5),
        note=f"p99 at {rate:,.0f} reads/s and {UPDATES_PER_S} updates/s, no call failed; {len(rollouts_ms)} rollouts "
        f"took {statistics.median(rollouts_ms):.0f} ms (median), {max(rollouts_ms):.0f} ms at most",
        more={"p50_ms": pair.ours.of("p50_ms").median, "max_ms": pair.ours.of("max_ms").median},
    )  # fmt: skip
    worst = min(hits / reads for done in rounds for hits, reads in done.hits if reads)
    yield Result(
        "read_through_rollout.hits", 100 * worst, "%", 100 * pair.reference.of("hits").median, goal=value_at_least(99),
        note=f"of the worst second; of all reads {100 * pair.ours.of('hits').median:.3f} %. Users whom events change "
        "are not read",
    )  # fmt: skip
    both_halves = SHAPE.users * SHAPE.shards / 8 * 2
    yield Result(
        "read_through_rollout.bytes", weighed, "bytes", both_halves, weighed / both_halves, ratio_at_most(1.2),
        note="that a rollout sends to the cache; the reference is two bits a user: a member or not, changed or not. "
        "The warmer stands still meanwhile",
    )  # fmt: skip


def _answered(report: LoadReport) -> LoadReport:
    """Raises RuntimeError if a call failed."""
    if report.failed:
        raise RuntimeError(f"{report.failed} of {report.calls} reads failed")
    return report


def _weigh(bench: Bench) -> float:
    """Bytes that the cache's server receives for a rollout, with updates, without reads and without the warmer: what it
    receives in a time with rollouts, less what it receives in the same time without."""
    bench.await_warm()
    with redis.Redis.from_url(bench.settings.cache_url) as client:

        def settled() -> int:
            """What the server has received, once it receives next to nothing any more."""
            before = 0
            while True:
                now = int(client.info("stats")["total_net_input_bytes"])
                if now - before < SETTLED_BYTES:
                    return now
                before = now
                time.sleep(0.5)

        def received(*, rollouts: bool) -> int:
            with bench.without_warmer():
                before = settled()
                ended = threading.Event()
                done, threads = bench.beside(ended, rollouts=False)
                begun = time.monotonic()
                for number in range(ROLLOUTS_WEIGHED):
                    if rollouts:
                        bench.roll_out_next()
                    time.sleep(max(0.0, begun + (number + 1) * ROLLOUT_EVERY_S - time.monotonic()))
                ended.set()
                for thread in threads:
                    thread.join()
                if done.errors:
                    raise done.errors[0]
                return settled() - before

        without = [received(rollouts=False) for _ in range(ROUNDS)]
        along = [received(rollouts=True) for _ in range(ROUNDS)]
    return (statistics.median(along) - statistics.median(without)) / ROLLOUTS_WEIGHED


# -- a hit under patches --------------------------------------------------------------------------------------------


@benchmark("read_hit_patched")
def read_hit_patched(world: World) -> Iterator[Result | Curve]:
    """GetUserSegments of cached users whose entries are eight rollouts old, beside entries of the newest epoch."""
    fresh = RedisServer("fresh-cache", world.mark / "fresh-cache", CACHE_CONFIG, mark=world.mark)
    with world.installation(READ_HIT) as installation, contextlib.ExitStack() as undo:
        user_ids = reading.shuffled_users(READ_HIT)
        reading.warm(installation.settings)
        reading.require_cached(installation.settings, user_ids)
        # No warmer runs: the entries stay as they are, and eight patches are published over them.
        with service(world, installation) as running:
            for segment, _ in READ_HIT.rules[:PATCHES]:
                running.client.roll_out(segment.slug, 60.0)
        reading.require_cached(installation.settings, user_ids)

        behind = _epochs_behind(installation.settings, user_ids[:COMPARED])
        if behind != {PATCHES}:
            raise RuntimeError(f"the entries are {behind} rollouts old")

        # The same shards in another cache, filled after the rollouts: nothing is to be laid over its entries.
        fresh.start()
        undo.callback(fresh.purge)
        current = installation.settings.model_copy(update={"cache_url": fresh.url})
        reading.warm(current)
        reading.require_cached(current, user_ids)

        old = undo.enter_context(reading.front(world, installation.settings, name="front-old"))
        new = undo.enter_context(reading.front(world, current, name="front-new"))
        new = reading.Server(new.address, {**new.pids, "cache": pid_of(fresh)}, new.settings)
        reading.require_same_answers(old.address, new.address, user_ids[:COMPARED])

        bodies = [Body.single(user) for user in user_ids]
        with (
            Load(old.address, GET_USER_SEGMENTS, bodies) as ours,
            Load(new.address, GET_USER_SEGMENTS, bodies) as theirs,
        ):
            pair = measure_pair(
                lambda: reading.calls_per_second(ours, old, in_flight=IN_FLIGHT),
                lambda: reading.calls_per_second(theirs, new, in_flight=IN_FLIGHT),
            )
    ours_us, theirs_us = pair.ours.cpu_us_per_call["total"], pair.reference.cpu_us_per_call["total"]
    yield pair.result("read_hit_patched", "calls/s", None, note=f"{PATCHES} patches are laid over each entry")
    yield Result("read_hit_patched.cpu", ours_us, "µs", theirs_us, ours_us / theirs_us, ratio_at_most(1.25))


def _epochs_behind(settings: Settings, user_ids: Sequence[int]) -> set[int]:
    """How many bulk changes the stored entries of these users are behind the newest one of their shard."""
    cache = make_cache(settings)
    found = set()
    for user_id in user_ids:
        shard = shard_of(user_id, settings.shard_count)
        with cache.connection(shard) as connection:
            value, stored = connection.run("MGET", cache.keys.generation(shard), cache.keys.user(shard, user_id))
            generation = entries.generation_of(value, connection.run_id)
        assert generation is not None
        entry = entries.decode(stored, entries.prefix(generation.nonce), time.time_ns() // 1000)
        assert entry is not None
        found.add(generation.newest - entry[EPOCH])
    cache.close()
    return found
