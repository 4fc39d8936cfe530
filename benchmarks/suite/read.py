"""Reads of cached users: a hit's cost, beside the library alone (the lower bound) and beside the tutorials' way."""

from __future__ import annotations

import contextlib
import json
import os
import secrets
from collections.abc import Callable, Iterator, Mapping
from dataclasses import dataclass

import redis
from segmentation.v1 import membership_pb2 as pb

from benchmarks import reading
from benchmarks.harness import (
    Curve,
    Result,
    Sample,
    benchmark,
    measure_pair,
    ratio_at_least,
    ratio_at_most,
    value_at_least,
    value_at_most,
)
from benchmarks.load import BATCH_GET_USER_SEGMENTS, GET_USER_SEGMENTS, Body, Load
from benchmarks.peers import tutorial
from benchmarks.seed import Shape
from benchmarks.world import World
from segsvc.access.tokens import digest_of

SHAPE = Shape(users=25_000, segments=57, shards=4)
"""100,000 users with 20 segments each on average, and all lists different."""
IN_FLIGHT = 64
CURVE_IN_FLIGHT = (4, 16, 64, 256)
COMPARED = 500
"""Users whose answers are compared before anything is timed."""
BATCH_USERS = 100
TOKENS = 20
"""Tokens that the front knows where calls need one."""
CORES_FOR_TWO = 4
"""One core for each front process, one for the cache, one for the load."""


@dataclass(frozen=True, slots=True)
class Warm:
    """A front with all its users in the cache."""

    server: reading.Server
    user_ids: list[int]


@contextlib.contextmanager
def warm_front(world: World, *, processes: int = 1) -> Iterator[Warm]:
    with world.installation(SHAPE) as installation:
        user_ids = reading.shuffled_users(SHAPE)
        reading.warm(installation.settings)
        reading.require_cached(installation.settings, user_ids)
        with reading.front(world, installation.settings, processes=processes) as server:
            yield Warm(server, user_ids)


@benchmark("read_hit")
def read_hit(world: World) -> Iterator[Result | Curve]:
    """GetUserSegments of cached users from one front process, beside its library alone."""
    with warm_front(world) as warm:
        answers = reading.answers_of(warm.server.address, warm.user_ids[:COMPARED])
        average = SHAPE.segments * SHAPE.percent / 100
        user_id = min(answers, key=lambda user: abs(len(answers[user]) - average))
        with reading.stub(warm.server.address) as client:
            typical = client.GetUserSegments(pb.GetUserSegmentsRequest(user_id=user_id)).SerializeToString()
        bodies = [Body.single(user) for user in warm.user_ids]

        unchecked = [Body.single(user, checked=False) for user in warm.user_ids]

        with (
            reading.peer(world, "constant", typical.hex(), settings=warm.server.settings) as constant,
            Load(warm.server.address, GET_USER_SEGMENTS, bodies) as ours,
            Load(constant.address, GET_USER_SEGMENTS, unchecked) as theirs,
        ):
            pair = measure_pair(
                lambda: reading.calls_per_second(ours, warm.server, in_flight=IN_FLIGHT),
                lambda: reading.calls_per_second(theirs, constant, in_flight=IN_FLIGHT),
            )
            curve = _by_load(
                {
                    "cached reads": lambda n: reading.calls_per_second(ours, warm.server, in_flight=n),
                    "a constant answer": lambda n: reading.calls_per_second(theirs, constant, in_flight=n),
                }
            )
    yield curve

    yield pair.result("read_hit", "calls/s", ratio_at_least(0.8))
    yield pair.of("p99_ms").result("read_hit.p99", "ms", ratio_at_most(1.5))
    yield Result("read_hit.calls", pair.ours.median, "calls/s", goal=value_at_least(25_000), spread=pair.ours.spread)
    yield Result("read_hit.cpu", pair.ours.cpu_us_per_call["total"], "µs", goal=value_at_most(45))


@benchmark("read_hit_token")
def read_hit_token(world: World) -> Iterator[Result | Curve]:
    """GetUserSegments of cached users with a token, beside the same without authentication."""
    token = secrets.token_urlsafe(32)
    known = world.folder / "tokens.json"
    known.write_text(
        json.dumps(
            [
                {"name": f"caller-{number}", "sha256": digest_of(text).hex(), "roles": ["gateway"]}
                for number, text in enumerate([*(secrets.token_urlsafe(32) for _ in range(TOKENS - 1)), token])
            ]
        )
    )
    with warm_front(world) as warm:
        guarded = warm.server.settings.model_copy(update={"auth": ("tokens",), "auth_tokens_file": known.resolve()})
        bodies = [Body.single(user) for user in warm.user_ids]
        with (
            reading.front(world, guarded, name="front-with-tokens") as server,
            Load(server.address, GET_USER_SEGMENTS, bodies, token=token) as ours,
            Load(warm.server.address, GET_USER_SEGMENTS, bodies) as theirs,
        ):
            pair = measure_pair(
                lambda: reading.calls_per_second(ours, server, in_flight=IN_FLIGHT),
                lambda: reading.calls_per_second(theirs, warm.server, in_flight=IN_FLIGHT),
            )

    ours_us, theirs_us = pair.ours.cpu_us_per_call["total"], pair.reference.cpu_us_per_call["total"]
    yield pair.result("read_hit_token", "calls/s", None)
    yield Result("read_hit_token.cpu", ours_us, "µs", theirs_us, ours_us / theirs_us, ratio_at_most(1.1))


def _by_load(servers: Mapping[str, Callable[[int], Sample]]) -> Curve:
    """Throughput by number of calls in flight. Batches grow with the load, so a call costs less under more load."""
    points = {name: [(float(calls), ask(calls).value) for calls in CURVE_IN_FLIGHT] for name, ask in servers.items()}
    return Curve(
        "read_hit", "GetUserSegments, one front process", "calls in flight", "calls/s", points, logarithmic=True
    )


@benchmark("read_hit_peer")
def read_hit_peer(world: World) -> Iterator[Result | Curve]:
    """GetUserSegments of cached users, beside grpcio's asyncio and redis-py's asyncio."""
    with warm_front(world) as warm:
        _fill_tutorial(world, warm)

        bodies = [Body.single(user) for user in warm.user_ids]
        with (
            reading.peer(world, "tutorial", world.cache.url, settings=warm.server.settings) as plain,
            Load(warm.server.address, GET_USER_SEGMENTS, bodies) as ours,
            Load(plain.address, GET_USER_SEGMENTS, bodies) as theirs,
        ):
            reading.require_same_answers(warm.server.address, plain.address, warm.user_ids[:COMPARED])
            pair = measure_pair(
                lambda: reading.calls_per_second(ours, warm.server, in_flight=IN_FLIGHT),
                lambda: reading.calls_per_second(theirs, plain, in_flight=IN_FLIGHT),
            )
    yield pair.result("read_hit_peer", "calls/s", ratio_at_least(8))

    ours_us, theirs_us = pair.ours.cpu_us_per_call["total"], pair.reference.cpu_us_per_call["total"]
    yield Result("read_hit_peer.cpu", ours_us, "µs", theirs_us, theirs_us / ours_us, ratio_at_least(8))


def _fill_tutorial(world: World, warm: Warm) -> None:
    """Write the lists that our front returns into the cache of the tutorial's server."""
    with reading.stub(warm.server.address) as client, redis.Redis.from_url(world.cache.url) as cache:
        for first in range(0, len(warm.user_ids), 1000):
            answer = client.BatchGetUserSegments(
                pb.BatchGetUserSegmentsRequest(user_ids=warm.user_ids[first : first + 1000])
            )
            cache.mset(
                {
                    tutorial.key_of(result.user_segments.user_id): json.dumps(list(result.user_segments.slugs))
                    for result in answer.results
                }
            )


@benchmark("read_batch")
def read_batch(world: World) -> Iterator[Result | Curve]:
    """BatchGetUserSegments with 100 users per call, beside one call per user."""
    with warm_front(world) as warm:
        users = warm.user_ids
        batches = [Body.batch(users[first : first + BATCH_USERS]) for first in range(0, len(users), BATCH_USERS)]

        with (
            Load(warm.server.address, BATCH_GET_USER_SEGMENTS, batches) as ours,
            Load(warm.server.address, GET_USER_SEGMENTS, [Body.single(user) for user in users]) as theirs,
        ):
            pair = measure_pair(
                lambda: reading.users_per_second(ours, warm.server, BATCH_USERS, in_flight=8),
                lambda: reading.calls_per_second(theirs, warm.server, in_flight=IN_FLIGHT),
            )
    yield pair.result("read_batch", "users/s", ratio_at_least(10), note="CPU time is per user")


@benchmark("read_processes")
def read_processes(world: World) -> Iterator[Result | Curve]:
    """Two front processes on one port, beside one process."""
    with warm_front(world) as warm:
        bodies = [Body.single(user) for user in warm.user_ids]
        # The kernel spreads connections over the processes; with a few dozen, both get about the same number. Each
        # process has as many calls in flight as the single one: fewer calls would make smaller batches.
        with (
            reading.front(world, warm.server.settings, name="front-2", processes=2) as two,
            Load(two.address, GET_USER_SEGMENTS, bodies, connections=32) as ours,
            Load(warm.server.address, GET_USER_SEGMENTS, bodies, connections=16) as theirs,
        ):
            pair = measure_pair(
                lambda: reading.calls_per_second(ours, two, in_flight=2 * IN_FLIGHT),
                lambda: reading.calls_per_second(theirs, warm.server, in_flight=IN_FLIGHT),
            )

    ours_us, theirs_us = pair.ours.cpu_us_per_call["total"], pair.reference.cpu_us_per_call["total"]
    load_us = pair.ours.of("load_cpu_us").median
    cores = os.cpu_count() or 1
    note = (
        f"a call costs {ours_us:.0f} µs here and {load_us:.0f} µs in the load: the limit of {cores} cores is "
        f"{1e6 * cores / (ours_us + load_us):,.0f} calls/s, for any number of processes"
    )
    if cores < CORES_FOR_TWO:
        note += f"; the goal of 1.6 × holds from {CORES_FOR_TWO} cores on"

    goal = ratio_at_least(1.6) if cores >= CORES_FOR_TWO else None
    yield pair.result("read_processes", "calls/s", goal, note=note)
    yield Result("read_processes.cpu", ours_us, "µs", theirs_us, ours_us / theirs_us, ratio_at_most(1.05))
