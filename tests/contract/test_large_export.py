"""A million members: exported in bounded memory, cut off, and continued."""

from __future__ import annotations

from collections.abc import Iterator
from pathlib import Path

import psutil
import pytest
import redis
from segmentation.v1 import segments_pb2 as pb

from segsvc.local.postgres import PostgresServer
from segsvc.local.redis import RedisServer
from tests import installation as plain
from tests.contract.conftest import FrontUnderTest, running_front
from tests.contract.installation import Installation
from tests.eventually import eventually

USERS = 1_000_000
GROWTH_MAX_BYTES = 64 << 20
"""More than the batches in transit need; the ids alone are 8 MB, or 40 MB as Python's numbers."""


@pytest.fixture(scope="module", params=["native", "grpcio"])
def large_front(
    request: pytest.FixtureRequest,
    pg_server: PostgresServer,
    cache_server: RedisServer,
    tmp_path_factory: pytest.TempPathFactory,
) -> Iterator[FrontUnderTest]:
    made = Installation(f"large-{request.param}", pg_server, cache_server)
    made.create()
    redis.Redis.from_url(cache_server.url).flushall()
    plain.Installation(made.settings(), pg_server).add_users(range(1, USERS + 1))

    with running_front(request.param, made, tmp_path_factory.mktemp("large")) as front:
        eventually(front.serving)
        yield front
    made.databases.close()


@pytest.mark.long
def test_an_export_of_a_million_takes_little_memory_and_goes_on_after_a_cut(large_front: FrontUnderTest) -> None:
    front = large_front
    slug = front.create().slug
    request = pb.RollOutSegmentRequest(slug=slug, rule={"percent": 100})
    assert front.segments.RollOutSegment(request, timeout=60).done

    def export(token: str = "") -> Iterator[pb.ExportSegmentUsersResponse]:
        asked = pb.ExportSegmentUsersRequest(slug=slug, resume_token=token)
        return front.segments.ExportSegmentUsers(asked, timeout=300)

    for _ in export():  # once, so that all that is loaded and kept for ever is loaded now
        pass

    process = psutil.Process(front.process.pid)
    before = process.memory_info().rss
    most = before
    whole: list[int] = []
    tokens: list[tuple[int, str]] = []
    for batch in export():
        assert len(batch.user_ids) <= 10_000
        whole += batch.user_ids
        tokens.append((len(whole), batch.resume_token))
        most = max(most, process.memory_info().rss)

    assert set(whole) == set(range(1, USERS + 1))
    assert len(whole) == USERS
    assert most - before < GROWTH_MAX_BYTES, f"{(most - before) >> 20} MiB"

    seen, token = tokens[len(tokens) // 3]
    cut = export(token)
    rest = list(next(cut).user_ids)
    cut.cancel()
    assert rest == whole[seen : seen + len(rest)]
    assert [user for batch in export(token) for user in batch.user_ids] == whole[seen:]


@pytest.mark.long
def test_a_reader_that_does_not_read_holds_nothing_up(large_front: FrontUnderTest, tmp_path: Path) -> None:
    front = large_front
    slug = front.create().slug
    assert front.segments.RollOutSegment(pb.RollOutSegmentRequest(slug=slug, rule={"percent": 100}), timeout=60).done

    process = psutil.Process(front.process.pid)
    before = process.memory_info().rss

    slow = [front.segments.ExportSegmentUsers(pb.ExportSegmentUsersRequest(slug=slug), timeout=60) for _ in range(4)]
    for stream in slow:
        next(stream)

    # A deletion waits for no reader.
    assert front.segments.DeleteSegment(pb.DeleteSegmentRequest(slug=slug), timeout=20).done
    assert process.memory_info().rss - before < GROWTH_MAX_BYTES
    for stream in slow:
        stream.cancel()
