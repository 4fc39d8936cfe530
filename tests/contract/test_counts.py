"""Statistics and export, compared with the published hash."""

from __future__ import annotations

from collections.abc import Iterator

import pytest
import sqlalchemy as sa
from grpc import StatusCode
from segmentation.v1 import segments_pb2 as pb

from segsvc.domain.bucketing import bucket
from segsvc.postgres import tables
from tests.contract.conftest import FrontUnderTest
from tests.contract.refusals import refused
from tests.eventually import eventually

FIRST = 3_000_000
MANY = (*range(FIRST + 1, FIRST + 44_001, 4), *range(FIRST, FIRST + 800))
"""Enough users on shard 1 for two batches, and some on the other shards."""
BATCH_MAX = 10_000
INCLUDE, EXCLUDE = 1, 2


@pytest.fixture(scope="module")
def population(front: FrontUnderTest) -> set[int]:
    """All users that exist."""
    front.installation.create_users({user_id: {} for user_id in MANY})
    found: set[int] = set()
    for engine in front.installation.databases.shards:
        with engine.connect() as connection:
            found.update(connection.execute(sa.select(tables.users.c.id)).scalars())
    return found


def roll_out(front: FrontUnderTest, slug: str, percent: float) -> None:
    request = pb.RollOutSegmentRequest(slug=slug, rule={"percent": percent})
    assert front.segments.RollOutSegment(request, timeout=20).done


def by_rule(front: FrontUnderTest, slug: str, percent: float, population: set[int]) -> set[int]:
    """The members by the rule, computed here."""
    with front.installation.databases.catalog.connect() as connection:
        stored = connection.execute(sa.select(tables.segments.c.salt).where(tables.segments.c.slug == slug))
        salt = tables.salt_from_db(stored.scalar_one())
    return {user_id for user_id in population if bucket(user_id, salt) < round(percent * 1000)}


def export(front: FrontUnderTest, slug: str, resume_token: str = "") -> Iterator[pb.ExportSegmentUsersResponse]:
    request = pb.ExportSegmentUsersRequest(slug=slug, resume_token=resume_token)
    return front.segments.ExportSegmentUsers(request, timeout=60)


def exported(front: FrontUnderTest, slug: str, resume_token: str = "") -> list[int]:
    return [user_id for batch in export(front, slug, resume_token) for user_id in batch.user_ids]


def statistics(front: FrontUnderTest, slug: str) -> pb.SegmentStatistics:
    return front.segments.GetSegmentStatistics(pb.GetSegmentStatisticsRequest(slug=slug), timeout=10)


def test_statistics_count_now(front: FrontUnderTest, population: set[int]) -> None:
    slug = front.create().slug
    roll_out(front, slug, 12.5)
    members = by_rule(front, slug, 12.5, population)

    found = statistics(front, slug)
    assert found.segment == front.segments.GetSegment(pb.GetSegmentRequest(slug=slug))
    assert found.member_count == found.rule_count == len(members)
    assert (found.included_count, found.excluded_count) == (0, 0)
    assert found.user_count == len(population)
    assert found.member_share == pytest.approx(len(members) / len(population))
    assert [(counts.shard, counts.member_count) for counts in found.shards] == [
        (shard, sum(user_id % 4 == shard for user_id in members)) for shard in range(4)
    ]
    assert found.HasField("read_time")
    assert found.last_operation.startswith("operations/")


def test_statistics_of_a_segment_that_was_never_rolled_out(front: FrontUnderTest, population: set[int]) -> None:
    found = statistics(front, front.create().slug)
    assert (found.member_count, found.rule_count, found.member_share) == (0, 0, 0)
    assert len(found.shards) == 4
    assert found.user_count == len(population)


def test_overrides_are_laid_over_the_rule(front: FrontUnderTest, population: set[int]) -> None:
    slug = front.create().slug
    roll_out(front, slug, 50)
    inside = by_rule(front, slug, 50, population)
    ins, outs = sorted(inside), sorted(population - inside)

    override = front.installation.override
    for user_id in outs[:7]:
        override(user_id, slug, INCLUDE)
    for user_id in ins[:5]:
        override(user_id, slug, EXCLUDE)
    override(outs[10], slug, EXCLUDE)  # out by the rule anyway
    override(ins[10], slug, INCLUDE)  # in by the rule anyway
    override(outs[11], slug, INCLUDE, expired=True)
    override(ins[11], slug, EXCLUDE, expired=True)

    found = statistics(front, slug)
    assert (found.rule_count, found.included_count, found.excluded_count) == (len(inside), 7, 5)
    assert found.member_count == len(inside) + 2
    assert sum(counts.member_count for counts in found.shards) == found.member_count
    assert sorted(exported(front, slug)) == sorted((inside | set(outs[:7])) - set(ins[:5]))


def test_an_export_of_all(front: FrontUnderTest, population: set[int]) -> None:
    slug = front.create().slug
    roll_out(front, slug, 100)

    batches = [list(batch.user_ids) for batch in export(front, slug)]
    assert all(0 < len(batch) <= BATCH_MAX for batch in batches)
    assert len(batches) == 5  # two of shard 1, one of each other shard

    found = [user_id for batch in batches for user_id in batch]
    assert len(found) == len(population)
    assert set(found) == population

    shards = [user_id % 4 for user_id in found]
    assert shards == sorted(shards)
    mine = [user_id for user_id in found if user_id in range(FIRST, FIRST + 44_001) and user_id % 4 == 1]
    assert mine == sorted(mine)  # in the order of their arrival
    assert exported(front, slug) == found


def test_an_export_goes_on_after_any_batch(front: FrontUnderTest, population: set[int]) -> None:
    slug = front.create().slug
    roll_out(front, slug, 90)
    whole = list(export(front, slug))
    for index, batch in enumerate(whole):
        rest = [user_id for later in whole[index + 1 :] for user_id in later.user_ids]
        assert exported(front, slug, batch.resume_token) == rest


def test_an_export_that_is_cut_goes_on(front: FrontUnderTest, population: set[int]) -> None:
    slug = front.create().slug
    roll_out(front, slug, 100)

    stream = export(front, slug)
    seen: list[int] = []
    token = ""
    for batch in stream:
        seen += batch.user_ids
        token = batch.resume_token
        if len(seen) > BATCH_MAX:
            stream.cancel()
            break

    assert set(seen + exported(front, slug, token)) == population


def test_a_sparse_export(front: FrontUnderTest, population: set[int]) -> None:
    slug = front.create().slug
    roll_out(front, slug, 0.2)
    assert set(exported(front, slug)) == by_rule(front, slug, 0.2, population)


def test_an_export_without_members_is_an_empty_stream(front: FrontUnderTest) -> None:
    assert list(export(front, front.create().slug)) == []


def test_a_resume_token_belongs_to_its_segment(front: FrontUnderTest, population: set[int]) -> None:
    slug = front.create().slug
    roll_out(front, slug, 1)
    token = next(export(front, slug)).resume_token
    other = front.create().slug
    front.segments.DeleteSegment(pb.DeleteSegmentRequest(slug=slug), timeout=10)
    front.create(slug)  # the same slug, another segment
    for wrong_slug, wrong in ((other, token), (slug, token), (slug, "garbage")):
        refusal = refused(lambda s=wrong_slug, t=wrong: list(export(front, s, t)))
        assert (refusal.code, refusal.reason) == (StatusCode.INVALID_ARGUMENT, "PAGE_TOKEN_INVALID")
        assert list(refusal.violations) == ["resume_token"]


def test_a_segment_that_is_deleted_while_a_batch_is_read(front: FrontUnderTest, population: set[int]) -> None:
    """The batch shows one moment, at which the segment existed."""
    slug = front.create().slug
    roll_out(front, slug, 100)

    with front.installation.databases.shards[3].begin() as connection:
        # The export has read the last shard's bits, but not yet its directory, when the deletion begins.
        connection.exec_driver_sql("LOCK TABLE directory IN ACCESS EXCLUSIVE MODE")
        stream = export(front, slug)
        seen = [next(stream) for _ in range(4)]
        waiting = "SELECT count(*) FROM pg_locks WHERE NOT granted AND relation = 'directory'::regclass"
        eventually(lambda: connection.exec_driver_sql(waiting).scalar_one() == 1)
        front.segments.DeleteSegment(pb.DeleteSegmentRequest(slug=slug), timeout=10)

    assert sorted(user_id for batch in [*seen, *stream] for user_id in batch.user_ids) == sorted(population)
    token = seen[0].resume_token
    refusal = refused(lambda: list(export(front, slug, token)))
    assert (refusal.code, refusal.reason) == (StatusCode.NOT_FOUND, "SEGMENT_NOT_FOUND")
