"""Deletions, bytes on disk and statistics, each beside a reference with one row per membership."""

from __future__ import annotations

from collections.abc import Iterator

import sqlalchemy as sa

from benchmarks import rows
from benchmarks.bulk import OnAllShards, ShardWork, here_and, load_peer_segment, new_segment, pid_of, service, two_phase
from benchmarks.harness import Curve, Result, Sample, benchmark, cpu_of, measure_pair, ratio_at_least, rounds_wanted
from benchmarks.suite.rollout import ONE_SHARD, TEN_MILLION
from benchmarks.world import World
from segsvc.domain.segment import Rule, ShardSegment
from tests.installation import Installation

DELETED = 200_000
AT_ONCE = 16
"""Deletions in one sample: the kernel counts CPU in steps of 10 ms."""
STATISTICS_AT_ONCE = 50


@benchmark("delete_shard")
def delete_shard(world: World) -> Iterator[Result | Curve]:
    """One shard's part of deleting a segment of 200,000 of its 250,000 users, two-phase commit included."""
    with world.installation(ONE_SHARD) as installation:
        engine = sa.create_engine(installation.settings.shard_dsns[0])
        pids = {"postgres": pid_of(world.postgres)}
        samples = rounds_wanted() + 1
        with ShardWork(installation.settings) as work:
            # All segments that will be deleted are made and written to disk before the first measurement: a deletion
            # mostly waits for the disk, and would also wait for earlier writes.
            world.say(f"rolling out {samples * (AT_ONCE + 1)} segments")
            mine = [[_rolled_out(installation, work) for _ in range(AT_ONCE)] for _ in range(samples)]
            theirs = [_rolled_out(installation, work) for _ in range(samples)]
            members = [load_peer_segment(engine, segment.id, ONE_SHARD) for segment, _ in theirs]
            installation.execute(0, "CHECKPOINT")

            def ours() -> Sample:
                segments = mine.pop()
                with here_and(pids) as spent:
                    removed = [work.delete(0, segment).removed for segment, _ in segments]
                assert removed == [count for _, count in segments], removed
                return Sample(spent.seconds * 1000 / AT_ONCE, AT_ONCE, spent.cpu_s)

            def reference() -> Sample:
                (segment, _), expected = theirs.pop(), members.pop()
                with here_and(pids) as spent, engine.connect() as connection:
                    removed = connection.exec_driver_sql(
                        "DELETE FROM peer.memberships WHERE segment_id = %s", (segment.id,)
                    ).rowcount
                    two_phase(connection, f"peer-{segment.id}")
                assert removed == expected, (removed, expected)
                return Sample(spent.seconds * 1000, 1, spent.cpu_s)

            pair = measure_pair(ours, reference)
        engine.dispose()
    yield pair.result(
        "delete_shard", "ms", ratio_at_least(30), times_better=True,
        note="a checkpoint separates the rollouts from the deletions, as for a segment that has existed for a while; "
        "the work of VACUUM after the reference's deletion is not in its time",
    )  # fmt: skip


def _rolled_out(installation: Installation, work: ShardWork) -> tuple[ShardSegment, int]:
    """A segment with about 200,000 members, and the exact number."""
    segment = new_segment(installation)
    members = work.roll_out(0, segment, Rule(DELETED * 100_000 // ONE_SHARD.users)).members
    assert abs(members / DELETED - 1) < 0.01, members
    return segment, members


@benchmark("storage")
def storage(world: World) -> Iterator[Result | Curve]:
    """Bytes on disk of 200 segments × 250,000 users at 35 %, indexes included."""
    with world.installation(ONE_SHARD) as installation:
        engine = sa.create_engine(installation.settings.shard_dsns[0])
        memberships = rows.prove_same(engine, ONE_SHARD)
        engine.dispose()

        def size_mb(*tables: str) -> float:
            (row,) = installation.execute(
                0, "SELECT sum(pg_total_relation_size(t::regclass)) AS n FROM unnest(CAST(:t AS text[])) t", t=[*tables]
            )
            return int(str(row.n)) / 1e6

        by_bits, directory = size_mb("memberships"), size_mb("directory")
        by_rows = size_mb("peer.memberships")
    yield Result(
        "storage", by_bits, "MB", by_rows, by_rows / by_bits, ratio_at_least(100),
        note=f"{memberships:,} memberships; the directory of user ids, which bits need and rows do not, "
        f"is {directory:.1f} MB more, for all segments together",
        more={"directory_mb": directory, "with_directory_ratio": by_rows / (by_bits + directory)},
    )  # fmt: skip


@benchmark("statistics")
def statistics(world: World) -> Iterator[Result | Curve]:
    """GetSegmentStatistics at 10 million users on 4 shards, beside COUNT over the rows of all shards at once."""
    segment = TEN_MILLION.rules[0][0]
    with world.installation(TEN_MILLION) as installation, service(world, installation) as running:
        world.say("loading the rows of one segment")
        members = 0
        for dsn in installation.settings.shard_dsns:
            engine = sa.create_engine(dsn)
            with engine.begin() as connection:
                connection.exec_driver_sql(rows.SCHEMA)
            members += load_peer_segment(engine, segment.id, TEN_MILLION)
            with engine.connect().execution_options(isolation_level="AUTOCOMMIT") as connection:
                connection.exec_driver_sql(rows.INDEXES)
                connection.exec_driver_sql("VACUUM (ANALYZE) peer.memberships")
            engine.dispose()

        count = "SELECT count(*) FROM peer.memberships WHERE segment_id = %s"
        with OnAllShards(installation.settings) as shards:

            def ours() -> Sample:
                with cpu_of(running.pids) as spent:
                    for _ in range(STATISTICS_AT_ONCE):
                        assert running.client.statistics(segment.slug).member_count == members
                return Sample(spent.seconds * 1000 / STATISTICS_AT_ONCE, STATISTICS_AT_ONCE, spent.cpu_s)

            def reference() -> Sample:
                with cpu_of({"postgres": running.pids["postgres"]}) as spent:
                    assert sum(shards.numbers(count, segment.id)) == members
                return Sample(spent.seconds * 1000, 1, spent.cpu_s)

            pair = measure_pair(ours, reference)
    yield pair.result(
        "statistics", "ms", ratio_at_least(10), times_better=True,
        note=f"the reference's table holds only this segment's {members:,} rows, which is all that the count reads; "
        "the reference is a statement, without a service in front of it",
    )  # fmt: skip
