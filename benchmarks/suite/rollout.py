"""Rollouts: one shard's work beside rows, the whole call beside the work, conditions beside a plain SQL filter."""

from __future__ import annotations

import itertools
import threading
import time
from collections.abc import Callable, Generator, Iterator, Sequence
from concurrent.futures import ThreadPoolExecutor
from typing import Self

import sqlalchemy as sa

from benchmarks import rows
from benchmarks.bulk import (
    BARE_COUNT,
    OnAllShards,
    Service,
    ShardWork,
    elapsed,
    here_and,
    new_segment,
    pid_of,
    service,
    two_phase,
)
from benchmarks.harness import (
    Curve,
    Pair,
    Pids,
    Result,
    Sample,
    benchmark,
    cpu_of,
    measure,
    measure_pair,
    ratio_at_least,
    ratio_at_most,
    value_at_most,
)
from benchmarks.seed import CONDITION, Shape
from benchmarks.world import World
from segsvc.bootstrap import make_rule_costs
from segsvc.domain.events import UpdateUser
from segsvc.domain.segment import Rule
from segsvc.failpoints import failpoints
from segsvc.postgres.engine import Databases, Pool
from segsvc.postgres.shard.user_transaction import PostgresUserStore
from segsvc.services.ingestion import Ingestion

ONE_SHARD = Shape(users=250_000, segments=200, rows=True)
MILLION = Shape(users=250_000, segments=200, shards=4)
TEN_MILLION = Shape(users=2_500_000, segments=200, shards=4)
LARGE_SHARD = Shape(users=2_500_000, segments=8)
SMALL = Shape(users=25_000, segments=200, shards=4)
AT_ONCE, CALLS = 8, 4
"""Rollouts of a shard, and calls, in one sample: the kernel counts CPU time in steps of 10 ms."""

PEER_ROLL_OUT = """
    INSERT INTO peer.memberships (user_id, segment_id)
    SELECT id, %(segment)s FROM peer.users WHERE (hashint8extended(id, %(segment)s) & 1048575) < %(share)s * 1048576
"""
"""It uses PostgreSQL's own hash: our hash in SQL would cost the reference more than its rows."""


@benchmark("rollout_shard")
def rollout_shard(world: World) -> Iterator[Result | Curve]:
    """One shard's part of a rollout to 30 %, 250,000 users and 200 live segments, two-phase commit included."""
    with world.installation(ONE_SHARD) as installation:
        engine = sa.create_engine(installation.settings.shard_dsns[0])
        same = rows.prove_same(engine, ONE_SHARD)
        world.say(f"both hold the same {same:,} memberships")
        pids = {"postgres": pid_of(world.postgres)}
        with ShardWork(installation.settings) as work:

            def ours() -> Sample:
                segments = [new_segment(installation) for _ in range(AT_ONCE)]
                with here_and(pids) as spent:
                    counts = [work.roll_out(0, segment, Rule(30_000)) for segment in segments]
                assert all(0.29 < c.members / ONE_SHARD.users < 0.31 for c in counts), counts
                return Sample(spent.seconds / AT_ONCE * 1000, AT_ONCE, spent.cpu_s)

            def reference() -> Sample:
                segment = new_segment(installation).id
                with here_and(pids) as spent, engine.connect() as connection:
                    found = connection.exec_driver_sql(PEER_ROLL_OUT, {"segment": segment, "share": 0.3}).rowcount
                    two_phase(connection, f"peer-{segment}")
                assert 0.29 < found / ONE_SHARD.users < 0.31, found
                return Sample(spent.seconds * 1000, 1, spent.cpu_s)

            pair = measure_pair(ours, reference)
        engine.dispose()
    yield pair.result(
        "rollout_shard", "ms", ratio_at_least(30), times_better=True,
        note="the reference selects its users by PostgreSQL's hash, which is cheaper for it than our hash would be",
    )  # fmt: skip


@benchmark("rollout_end_to_end")
def rollout_end_to_end(world: World) -> Iterator[Result | Curve]:
    """A RollOutSegment call over 0.1, 1 and 10 million users on 4 shards."""
    million = yield from _million(world)
    points = [(1.0, million)]
    for millions, shape in ((0.1, SMALL), (10.0, TEN_MILLION)):
        with world.installation(shape) as installation, service(world, installation) as running:
            series = measure(lambda running=running, shape=shape: _calls(running, shape, [30, 60]))  # type: ignore[misc]
            called = _under_condition(running, shape, 1)[0] if shape is TEN_MILLION else None
            memory_mb = running.worker_memory_mb()
        points.append((millions, series.median))

    yield Result(
        "rollout_end_to_end.ten_million", series.median, "ms", million, series.median / million, ratio_at_most(12),
        spread=series.spread, cpu_us_per_call=series.cpu_us_per_call, note="the reference is the call over 1 million",
    )  # fmt: skip
    if called is not None:
        yield called.result("rollout_end_to_end.condition", "ms", ratio_at_most(1.5), note="10 million users")
    yield Result("rollout_end_to_end.seconds", series.median / 1000, "s", goal=value_at_most(2))
    yield Result(
        "rollout_end_to_end.memory", memory_mb, "MB", goal=value_at_most(300),
        note="peak resident memory of a process of the operations worker at 10 million users, libraries included",
    )  # fmt: skip
    yield Curve(
        "rollout", "A RollOutSegment call over all users", "million users", "ms",
        {"4 shards on this machine": sorted(points)}, logarithmic=True,
    )  # fmt: skip


def _million(world: World) -> Generator[Result, None, float]:
    """Measure the call over a million users beside its parts. Returns the call's median."""
    with world.installation(MILLION) as installation, service(world, installation) as running:
        segment = MILLION.rules[1][0]
        percents = itertools.cycle((60, 30))
        with ShardWork(running.settings) as work:

            def reference() -> Sample:
                begun = time.perf_counter()
                for _ in range(CALLS):
                    rule = Rule(next(percents) * 1000)
                    for shard in range(MILLION.shards):
                        work.roll_out(shard, segment, rule)
                works_ms = elapsed(begun) / CALLS

                begun = time.perf_counter()
                for _ in range(CALLS):
                    running.empty_chord()
                chord_ms = elapsed(begun) / CALLS

                return Sample(works_ms + chord_ms, CALLS, more={"work": works_ms, "chord": chord_ms})

            pair = measure_pair(lambda: _calls(running, MILLION, [60, 30, 60, 30]), reference)
    work_ms, chord_ms = pair.reference.of("work").median, pair.reference.of("chord").median
    yield pair.result(
        "rollout_end_to_end", "ms", ratio_at_most(2), more={"work_ms": work_ms, "chord_ms": chord_ms},
        note=f"the reference is {work_ms:.1f} ms for four shards one after the other, "
        f"and {chord_ms:.1f} ms for a chord of four tasks that do nothing",
    )  # fmt: skip
    return pair.ours.median


def _calls(running: Service, shape: Shape, percents: Sequence[int]) -> Sample:
    """One call for each percentage; every call changes some bits of every block."""
    segment = shape.rules[0][0]
    users = shape.users * shape.shards
    with cpu_of(running.pids) as spent:
        answers = [running.client.roll_out(segment.slug, percent) for percent in percents]
    for answer, percent in zip(answers, percents, strict=True):
        found = answer.segment.member_count / users
        assert abs(found - percent / 100) < 0.01, (found, percent)
    return Sample(spent.seconds * 1000 / len(percents), len(percents), spent.cpu_s)


@benchmark("rollout_condition")
def rollout_condition(world: World) -> Iterator[Result | Curve]:
    """A rollout under a condition over 1 million users, and its preview, beside the bare filter in SQL."""
    with world.installation(MILLION) as installation, service(world, installation) as running:
        called, previewed = _under_condition(running, MILLION, CALLS)
    yield called.result(
        "rollout_condition", "ms", ratio_at_most(1.5),
        note="chord, commit and the writing of bits cost the same as without a condition: see rollout_end_to_end",
    )  # fmt: skip
    yield previewed.result("rollout_condition.preview", "ms", ratio_at_most(1.5))


def _under_condition(running: Service, shape: Shape, calls: int) -> tuple[Pair, Pair]:
    """The call and its preview, each beside the count by the bare filter on all shards at once."""
    slug = shape.rules[0][0].slug
    percents = itertools.cycle((60, 30))
    with OnAllShards(running.settings) as shards:
        matched = sum(shards.numbers(BARE_COUNT))

        def timed(call: Callable[[], int], pids: Pids) -> Sample:
            with cpu_of(pids) as spent:
                found = [call() for _ in range(calls)]
            assert found == [matched] * calls, (found, matched)
            return Sample(spent.seconds * 1000 / calls, calls, spent.cpu_s)

        def roll_out() -> Sample:
            return timed(lambda: running.client.roll_out(slug, next(percents), CONDITION).matched_count, running.pids)

        def preview() -> Sample:
            return timed(lambda: running.client.preview(slug, next(percents), CONDITION).matched_count, running.pids)

        def reference() -> Sample:
            return timed(lambda: sum(shards.numbers(BARE_COUNT)), {"postgres": running.pids["postgres"]})

        return measure_pair(roll_out, reference), measure_pair(preview, reference)


COSTLY = (
    " || ".join(f'user.country.contains("{n}x") || user.platform.endsWith("{n}y")' for n in range(8))
    + " || user.age >= 18"
)
"""Its cost is well within the bound, and what it says of a user depends on its last part."""


@benchmark("rollout_lock")
def rollout_lock(world: World) -> Iterator[Result | Curve]:
    """The longest wait of a user event while a rule with a costly condition is rolled out on its shard."""
    with world.installation(LARGE_SHARD) as installation:
        settings = installation.settings
        databases = Databases(settings, "bench", Pool(2))
        cost = make_rule_costs(settings, databases).measured(COSTLY, timeout_s=None)
        world.say(f"the condition costs {cost.alone_us:.1f} of {settings.condition_cost_max_us:.0f} µs a user")
        with ShardWork(settings) as work, Updates(databases, LARGE_SHARD) as updates:

            def ours() -> Sample:
                segment = new_segment(installation)
                updates.longest_s = 0.0
                began = time.perf_counter()
                counts = work.roll_out(0, segment, Rule(30_000, COSTLY))
                whole_ms = elapsed(began)
                assert 0.25 < counts.members / counts.matched < 0.35, counts
                return Sample(updates.longest_s * 1000, 1, {}, more={"rollout": whole_ms})

            series = measure(ours)
            applied = updates.applied
        databases.close()

    yield Result(
        "rollout_lock", series.median, "ms", goal=value_at_most(500), spread=series.spread,
        note=f"longest wait of {applied:,} updates, each a batch of its own; the rollout of a rule of "
        f"{cost.rollout_us:.1f} µs a user took {series.of('rollout').median / 1000:.1f} s",
        more={"rollout_ms": series.of("rollout").median, "condition_us": cost.rollout_us},
    )  # fmt: skip


class Updates:
    """A thread that updates one user of shard 0 after the other, and remembers the longest time that it took."""

    def __init__(self, databases: Databases, shape: Shape) -> None:
        self._ingestion = Ingestion(PostgresUserStore(databases), _NoCache(), failpoints(None))
        self._shape = shape
        self._over = threading.Event()
        self._thread = ThreadPoolExecutor(1)
        self.longest_s = 0.0
        self.applied = 0

    def __enter__(self) -> Self:
        self._running = self._thread.submit(self._run)
        return self

    def __exit__(self, *_: object) -> None:
        self._over.set()
        self._running.result()
        self._thread.shutdown()

    def _run(self) -> None:
        while not self._over.wait(0.005):
            user_id = self._shape.user_id(0, self.applied * 7919 % self._shape.users)
            event = UpdateUser(user_id, time.time_ns(), '{"country":"RU","age":1}')
            began = time.perf_counter()
            self._ingestion.apply_batch(0, [event])
            self.longest_s = max(self.longest_s, time.perf_counter() - began)
            self.applied += 1


class _NoCache:
    def drop_entries(self, shard: int, user_ids: Sequence[int]) -> None:
        """No user is cached."""
