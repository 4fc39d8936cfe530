"""Reads that the cache cannot answer: with an empty cache, and just after a rollout."""

from __future__ import annotations

import statistics
import threading
import time
from collections.abc import Iterator
from contextlib import closing

import sqlalchemy as sa

from benchmarks import reading, rows
from benchmarks.harness import (
    Curve,
    Result,
    Sample,
    benchmark,
    measure_pair,
    ratio_at_least,
    ratio_at_most,
    value_at_most,
)
from benchmarks.load import GET_USER_SEGMENTS, Body, Load, LoadReport
from benchmarks.seed import Shape
from benchmarks.world import World
from segsvc.demo.client import Client

COLD = Shape(users=5_000, segments=1_000, shards=4, rows=True)
"""20,000 users in 350 segments each on average."""
COLD_CALLS = 2_000
"""Calls of a round. Each user is read once in a round, so that every call is a miss."""
SINGLE_CALLS = 300
COMPARED = 200

ROLLED_OUT = Shape(users=25_000, segments=57, shards=4)
"""100,000 users with 20 segments each on average."""
ROLLOUT_RATE = 1_000
"""Reads per second, evenly over all users. After a rollout, nearly all reads are the first of their user, so misses.
The rate is low enough that two cores, which also do the rollout and the warming, can serve all reads as misses."""
ROLLOUT_SECONDS = 4.0
ROLLOUT_AFTER_S = 0.5


@benchmark("read_cold")
def read_cold(world: World) -> Iterator[Result | Curve]:
    """GetUserSegments with an empty cache and 1000 segments, beside rows read by a plain servicer."""
    with world.installation(COLD) as installation:
        settings = installation.settings
        for shard, dsn in enumerate(settings.shard_dsns):
            engine = sa.create_engine(dsn)
            memberships = rows.prove_same(engine, COLD)
            world.say(f"shard {shard}: the same {memberships:,} memberships in bits and in rows")
            engine.dispose()

        bodies = [Body.single(user) for user in reading.shuffled_users(COLD)]
        with (
            reading.front(world, settings) as front,
            reading.peer(world, "plain", *settings.shard_dsns, settings=settings) as plain,
            Load(front.address, GET_USER_SEGMENTS, bodies) as ours,
            Load(plain.address, GET_USER_SEGMENTS, bodies) as theirs,
            Load(front.address, GET_USER_SEGMENTS, bodies, connections=1) as our_single,
            Load(plain.address, GET_USER_SEGMENTS, bodies, connections=1) as their_single,
        ):
            reading.require_same_answers(front.address, plain.address, reading.shuffled_users(COLD)[:COMPARED])

            def cold(load: Load, calls: int, in_flight: int, server: reading.Server = front) -> Sample:
                world.empty_cache()
                return reading.calls_per_second(load, server, calls=calls, in_flight=in_flight)

            pair = measure_pair(lambda: cold(ours, COLD_CALLS, 64), lambda: cold(theirs, COLD_CALLS, 64, plain))
            single = measure_pair(
                lambda: cold(our_single, SINGLE_CALLS, 1), lambda: cold(their_single, SINGLE_CALLS, 1, plain)
            )
    yield pair.result("read_cold", "calls/s", ratio_at_least(1), note="64 calls in flight; ours also fill the cache")
    yield single.of("p50_ms").result("read_cold.p50", "ms", value_at_most(2), note="one call at a time")


@benchmark("read_after_rollout")
def read_after_rollout(world: World) -> Iterator[Result | Curve]:
    """Reads at a steady rate while a rollout over all users commits, beside the same without it."""
    with world.stack(ROLLED_OUT) as stack, closing(Client.of(stack.settings)) as client:
        user_ids = reading.shuffled_users(ROLLED_OUT)
        bodies = [Body.single(user) for user in user_ids]
        percents = [20.0, 50.0]
        took_ms: list[float] = []

        def rollout() -> None:
            time.sleep(ROLLOUT_AFTER_S)
            begun = time.monotonic()
            client.roll_out("segment-0001", percents[0])
            took_ms.append((time.monotonic() - begun) * 1000)
            percents.reverse()

        def read(load: Load) -> Sample:
            reading.await_cached(stack.settings, user_ids)
            return _sample(load.run(seconds=ROLLOUT_SECONDS, rate=ROLLOUT_RATE))

        def read_beside_rollout(load: Load) -> Sample:
            reading.await_cached(stack.settings, user_ids)
            thread = threading.Thread(target=rollout)
            thread.start()
            report = load.run(seconds=ROLLOUT_SECONDS, rate=ROLLOUT_RATE)
            thread.join()
            return _sample(report)

        with Load(stack.settings.grpc_address, GET_USER_SEGMENTS, bodies) as load:
            pair = measure_pair(lambda: read_beside_rollout(load), lambda: read(load))
    yield pair.result(
        "read_after_rollout",
        "ms",
        ratio_at_most(3),
        note=f"p99 over {ROLLOUT_SECONDS:g} s of {ROLLOUT_RATE:,} reads/s; no call failed; "
        f"the rollouts took {statistics.median(took_ms):.0f} ms (median)",
        more={"p50_ms": pair.ours.of("p50_ms").median, "max_ms": pair.ours.of("max_ms").median, "rollouts_ms": took_ms},
    )


def _sample(report: LoadReport) -> Sample:
    if report.failed:
        raise RuntimeError(f"{report.failed} of {report.calls} reads failed")
    more = {"p50_ms": report.percentile_ms(50), "max_ms": report.percentile_ms(100)}
    return Sample(report.percentile_ms(99), report.calls, more=more)
