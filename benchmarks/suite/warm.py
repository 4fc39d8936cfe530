"""Filling the cache before the reads, beside a query and a SET for each user."""

from __future__ import annotations

import itertools
import json
import time
from collections.abc import Iterator

import psycopg2
import redis
import sqlalchemy as sa

from benchmarks import rows
from benchmarks.harness import Curve, Result, Sample, benchmark, cpu_of, measure_pair, ratio_at_least
from benchmarks.seed import Shape
from benchmarks.world import World
from segsvc.bootstrap import WARM_REST, WARM_TIMEOUT_S, make_cache
from segsvc.cache.patch_store import PatchStore
from segsvc.cache.reader import CacheReader
from segsvc.cache.warm_notes import WarmNotes
from segsvc.domain.membership import FIRST_SEGMENT
from segsvc.postgres.engine import Databases
from segsvc.postgres.shard.memberships import PostgresMemberships
from segsvc.services.slug_map import SlugMap
from segsvc.services.warming import Warmer

SHAPE = Shape(users=100_000, segments=200, rows=True)
PEER_USERS = 3_000
"""Users in one round of the reference: about a second."""


@benchmark("warm")
def warm(world: World) -> Iterator[Result | Curve]:
    """Entries written per second by the warmer: one shard of 100,000 users, 200 segments at 35 %."""
    with world.installation(SHAPE) as installation:
        settings = installation.settings
        engine = sa.create_engine(settings.shard_dsns[0])
        same = rows.prove_same(engine, SHAPE)
        world.say(f"both hold the same {same:,} memberships")
        engine.dispose()

        servers = {"postgres": world.postgres.pid or 0, "cache": world.cache.pid or 0}
        databases = Databases(settings, "benchmark")
        cache = make_cache(settings, timeout_s=WARM_TIMEOUT_S, rest=WARM_REST)
        client = redis.Redis.from_url(settings.cache_url)
        memberships = PostgresMemberships(databases)
        warmer = Warmer(
            reads=memberships,
            cache=cache,
            notes=WarmNotes(cache),
            slugs=SlugMap(memberships.slugs),
            budget_bytes=settings.cache_warm_budget_bytes,
            patches_max=settings.cache_patches_max,
        )

        dsn = sa.make_url(settings.shard_dsns[0]).set(drivername="postgresql")
        peer = psycopg2.connect(dsn.render_as_string(hide_password=False))
        peer.autocommit = True
        user_ids = itertools.cycle(SHAPE.user_ids(0).tolist())

        def ours() -> Sample:
            client.flushall()
            own = time.process_time()
            with cpu_of(servers) as spent:
                report = warmer.warm_shard(0)
            spent.cpu_s["warmer"] = time.process_time() - own
            assert report.entries == SHAPE.users, report
            return Sample(report.entries / spent.seconds, report.entries, spent.cpu_s)

        def reference() -> Sample:
            client.flushall()
            own = time.process_time()
            with cpu_of(servers) as spent, peer.cursor() as cursor:
                for user_id in itertools.islice(user_ids, PEER_USERS):
                    cursor.execute(rows.USER_SEGMENTS, (user_id,))
                    slugs = [slug for (slug,) in cursor.fetchall()]
                    client.set(f"user:{user_id}", json.dumps(slugs), ex=86_400)
            spent.cpu_s["warmer"] = time.process_time() - own
            assert client.dbsize() == PEER_USERS
            return Sample(PEER_USERS / spent.seconds, PEER_USERS, spent.cpu_s)

        pair = measure_pair(ours, reference)
        ours()
        _prove_hits(CacheReader(cache, SHAPE.shards, patches=PatchStore(int)), peer)
        peer.close()
        cache.close()
        databases.close()
    yield pair.result(
        "warm", "entries/s", ratio_at_least(10),
        note=f"one process each; the reference keeps {same / SHAPE.users:.0f} slugs per user as JSON, without leases",
    )  # fmt: skip


def _prove_hits(reader: CacheReader, peer: psycopg2.extensions.connection) -> None:
    """Check with a sample that the warmer's entries are hits and hold the same segments as the rows.

    Raises:
        AssertionError: an entry is no hit or differs.
    """
    sample = SHAPE.user_ids(0)[:: SHAPE.users // 500].tolist()
    reader.connect()
    with peer.cursor() as cursor:
        for user_id, entry in zip(sample, reader.lookup(sample), strict=True):
            cursor.execute("SELECT segment_id FROM peer.memberships WHERE user_id = %s", (user_id,))
            assert entry is not None, f"user {user_id} is no hit"
            assert sorted(entry[FIRST_SEGMENT:]) == sorted(segment_id for (segment_id,) in cursor.fetchall()), user_id
    reader.close()
