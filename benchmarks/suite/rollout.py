"""Rollouts: one shard's work beside rows, the whole call beside the work, conditions beside the filter."""

from __future__ import annotations

import itertools
import os
import time
from collections.abc import Generator, Iterator, Sequence

import sqlalchemy as sa

from benchmarks import rows
from benchmarks.bulk import BARE_COUNT, OnAllShards, Service, ShardWork, elapsed, pid_of, service, two_phase
from benchmarks.harness import (
    Curve,
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
from segsvc.domain.segment import Rule, ShardSegment
from segsvc.postgres import tables
from tests.installation import Installation

ONE_SHARD = Shape(users=250_000, segments=200, rows=True)
MILLION = Shape(users=250_000, segments=200, shards=4)
TEN_MILLION = Shape(users=2_500_000, segments=200, shards=4)
SMALL = Shape(users=25_000, segments=200, shards=4)
AT_ONCE, CALLS = 8, 4
"""Pieces of work, and calls, in one sample: the kernel counts CPU in steps of 10 ms."""

PEER_ROLL_OUT = """
    INSERT INTO peer.memberships (user_id, segment_id)
    SELECT id, %(segment)s FROM peer.users WHERE (hashint8extended(id, %(segment)s) & 1048575) < %(share)s * 1048576
"""
"""PostgreSQL's own hash: ours in SQL would cost the reference more than its rows."""


@benchmark("rollout_shard")
def rollout_shard(world: World) -> Iterator[Result | Curve]:
    """One shard's part of a rollout to 30 %, 250,000 users and 200 live segments, two-phase commit included."""
    with world.installation(ONE_SHARD) as installation:
        engine = sa.create_engine(installation.settings.shard_dsns[0])
        same = rows.prove_same(engine, ONE_SHARD)
        world.say(f"both hold the same {same:,} memberships")
        pids = {"client": os.getpid(), "postgres": pid_of(world.postgres)}
        next_id = iter(range(1000, 100_000))
        with ShardWork(installation.settings) as work:

            def ours() -> Sample:
                segments = [_new_segment(installation, next(next_id)) for _ in range(AT_ONCE)]
                with cpu_of(pids) as spent:
                    counts = [work.roll_out(0, segment, Rule(30_000)) for segment in segments]
                assert all(0.29 < c.members / ONE_SHARD.users < 0.31 for c in counts), counts
                return Sample(spent.seconds / AT_ONCE * 1000, AT_ONCE, spent.cpu_s)

            def reference() -> Sample:
                segment = next(next_id)
                with cpu_of(pids) as spent, engine.connect() as connection:
                    found = connection.exec_driver_sql(PEER_ROLL_OUT, {"segment": segment, "share": 0.3}).rowcount
                    two_phase(connection, f"peer-{segment}")
                assert 0.29 < found / ONE_SHARD.users < 0.31, found
                return Sample(spent.seconds * 1000, 1, spent.cpu_s)

            pair = measure_pair(ours, reference)
        engine.dispose()
    yield pair.result(
        "rollout_shard", "ms", ratio_at_least(30), times_better=True,
        note="the reference chooses its users by PostgreSQL's hash, which is cheaper for it than ours would be",
    )  # fmt: skip


@benchmark("rollout_end_to_end")
def rollout_end_to_end(world: World) -> Iterator[Result | Curve]:
    """A RollOutSegment call over 0.1, 1 and 10 million users on 4 shards."""
    million = yield from _million(world)
    points = [(1.0, million)]
    for millions, shape in ((0.1, SMALL), (10.0, TEN_MILLION)):
        with world.installation(shape) as installation, service(world, installation) as running:
            series = measure(lambda running=running, shape=shape: _calls(running, shape, [30, 60]))  # type: ignore[misc]
            memory_mb = running.worker_memory_mb()
        points.append((millions, series.median))
    yield Result(
        "rollout_end_to_end.ten_million", series.median, "ms", million, series.median / million, ratio_at_most(12),
        spread=series.spread, cpu_us_per_call=series.cpu_us_per_call, note="the reference is the call over 1 million",
    )  # fmt: skip
    yield Result("rollout_end_to_end.seconds", series.median / 1000, "s", goal=value_at_most(2))
    yield Result(
        "rollout_end_to_end.memory", memory_mb, "MB", goal=value_at_most(300),
        note="the most that a process of the operations worker had resident at 10 million users, libraries included",
    )  # fmt: skip
    yield Curve(
        "rollout", "A RollOutSegment call over all users", "million users", "ms",
        {"4 shards on this machine": sorted(points)}, logarithmic=True,
    )  # fmt: skip


def _million(world: World) -> Generator[Result, None, float]:
    """The call over a million users beside its parts; gives the call's median."""
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
    """A call for each percentage; every one changes some bits of every block."""
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
    with (
        world.installation(MILLION) as installation,
        service(world, installation) as running,
        OnAllShards(installation.settings) as shards,
    ):
        slug = MILLION.rules[0][0].slug
        matched = sum(shards.numbers(BARE_COUNT))
        percents = itertools.cycle((60, 30))

        def roll_out() -> Sample:
            with cpu_of(running.pids) as spent:
                for _ in range(CALLS):
                    answer = running.client.roll_out(slug, next(percents), CONDITION)
                    assert answer.matched_count == matched, (answer.matched_count, matched)
            return Sample(spent.seconds * 1000 / CALLS, CALLS, spent.cpu_s)

        def preview() -> Sample:
            with cpu_of(running.pids) as spent:
                for _ in range(CALLS):
                    answer = running.client.preview(slug, next(percents), CONDITION)
                    assert answer.matched_count == matched, (answer.matched_count, matched)
            return Sample(spent.seconds * 1000 / CALLS, CALLS, spent.cpu_s)

        def reference() -> Sample:
            with cpu_of({"postgres": running.pids["postgres"]}) as spent:
                for _ in range(CALLS):
                    assert sum(shards.numbers(BARE_COUNT)) == matched
            return Sample(spent.seconds * 1000 / CALLS, CALLS, spent.cpu_s)

        called, previewed = measure_pair(roll_out, reference), measure_pair(preview, reference)
    yield called.result("rollout_condition", "ms", ratio_at_most(1.5))
    yield previewed.result("rollout_condition.preview", "ms", ratio_at_most(1.5))


def _new_segment(installation: Installation, segment_id: int) -> ShardSegment:
    """A segment that shard 0 knows and nobody is in."""
    segment = ShardSegment(segment_id, f"new-{segment_id}", salt=segment_id, rule=None, rule_count=0)
    installation.execute(
        0,
        "INSERT INTO segments (id, slug, salt) VALUES (:id, :slug, :salt)",
        id=segment.id, slug=segment.slug, salt=tables.salt_to_db(segment.salt),
    )  # fmt: skip
    return segment
