"""A roll-out's chord on workers in containers: undisturbed, with a worker killed, with the broker emptied."""

from __future__ import annotations

import pytest
from pytest_celery import RedisContainer

from segsvc.bootstrap import FrontServices
from segsvc.domain.bucketing import bucket
from segsvc.domain.operation import Operation, OperationState
from segsvc.domain.segment import Rule, SegmentText
from tests.docker.conftest import SHARDS, USERS
from tests.docker.containers import Worker, the_one_that_fired
from tests.installation import Installation

pytestmark = pytest.mark.docker

THRESHOLD = 30_000
END_S = 60.0
PREPARED = "prepared-not-voted"
HELD_SHARD = 1


def start(front: FrontServices, slug: str) -> Operation:
    front.creations.create_segment(slug, SegmentText(), request=None, deadline_s=END_S)
    return front.acceptance.roll_out(slug, Rule(THRESHOLD), etag="", request=None)


def hold(workers: tuple[Worker, Worker]) -> None:
    """The worker that prepares the shard stops before it votes."""
    for worker in workers:
        worker.arm(PREPARED, f"hold shard={HELD_SHARD}")


def assert_done(front: FrontServices, installation: Installation, operation: Operation) -> None:
    """The roll-out ends by itself, on all shards, with the members that the published hash gives."""
    ended = front.operations.watch_end(operation.id).result(END_S)
    assert ended.state is OperationState.DONE
    segment = front.segments.get(operation.plan.slug)
    expected = {user for user in USERS if bucket(user, segment.salt) < THRESHOLD}
    assert installation.members(segment.id) == expected
    assert sum(counts.members for counts in ended.votes) == len(expected)
    assert [installation.prepared(shard) for shard in range(SHARDS)] == [[]] * SHARDS


def test_a_roll_out_is_one_chord(front: FrontServices, installation: Installation) -> None:
    assert_done(front, installation, start(front, "undisturbed"))


def test_a_worker_is_killed_between_prepare_and_vote(
    front: FrontServices, installation: Installation, workers: tuple[Worker, Worker]
) -> None:
    hold(workers)
    operation = start(front, "worker-killed")
    holding, other = the_one_that_fired(workers, PREPARED)
    assert len(installation.prepared(HELD_SHARD)) == 1
    other.disarm(PREPARED)
    holding.kill()
    assert holding.container.status == "exited"
    assert_done(front, installation, operation)


def test_the_broker_is_emptied_during_a_chord(
    front: FrontServices, installation: Installation, workers: tuple[Worker, Worker], broker: RedisContainer
) -> None:
    hold(workers)
    operation = start(front, "broker-emptied")
    the_one_that_fired(workers, PREPARED)
    assert broker.client is not None

    # Messages, results and the chord's counter are gone: only the ledger knows of the operation.
    broker.client.flushall()
    for worker in workers:
        worker.disarm(PREPARED)

    assert_done(front, installation, operation)
