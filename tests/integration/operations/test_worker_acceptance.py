"""A worker accepts operations with its own parts: without a front, a watcher of ends or threads for creations."""

from __future__ import annotations

from collections.abc import Iterator
from uuid import uuid4

import pytest

from segsvc.bootstrap import WorkerServices
from segsvc.domain.errors import Reason, ServiceError, broker_unavailable
from segsvc.domain.operation import OperationState, RequestKey
from segsvc.domain.segment import Rule
from segsvc.local.redis import RedisServer
from tests.installation import Installation
from tests.integration.operations.conftest import SHARDS, Messages, Rig


@pytest.fixture
def messages() -> Messages:
    return Messages()


@pytest.fixture
def worker(
    rig: Rig, installation: Installation, cache_server: RedisServer, messages: Messages
) -> Iterator[WorkerServices]:
    settings = installation.settings.model_copy(update={"cache_url": cache_server.url})
    made = WorkerServices(settings, sender=messages)
    yield made
    made.close()


def run_tasks(worker: WorkerServices, messages: Messages) -> None:
    """Do the work of the sent chords' tasks."""
    while messages.sent:
        operation, shards = messages.sent.pop(0)
        for shard in shards:
            worker.coordinator.prepare_shard(operation.id, shard, lambda _: None)
        assert worker.coordinator.finalize(operation.id)


def test_a_worker_accepts_a_rollout_and_it_is_done(rig: Rig, worker: WorkerServices, messages: Messages) -> None:
    rig.create()
    request = RequestKey("RollOutSegment", uuid4(), b"a" * 32)
    accepted = worker.acceptance.roll_out("checkout", Rule(30_000, "!has(user.plan)"), etag="", request=request)
    assert [(sent.id, shards) for sent, shards in messages.sent] == [(accepted.id, list(range(SHARDS)))]

    run_tasks(worker, messages)
    assert rig.state(accepted) is OperationState.DONE
    added = sum(counts.added for counts in rig.operations.get(accepted.id).votes)
    assert added == len(rig.expected("checkout", 30_000))

    # The same request again is answered with the same operation.
    again = worker.acceptance.roll_out("checkout", Rule(30_000, "!has(user.plan)"), etag="", request=request)
    assert (again.id, again.state) == (accepted.id, OperationState.DONE)
    assert not messages.sent
    rig.check_invariants()


def test_a_worker_accepts_a_deletion_and_cancels_it(rig: Rig, worker: WorkerServices) -> None:
    rig.create()
    deletion = worker.acceptance.delete("checkout", etag="", request=None)
    assert worker.acceptance.cancel(deletion.id).state is OperationState.ABORTED
    rig.check_invariants()


def test_without_a_broker_a_worker_accepts_nothing(
    rig: Rig, worker: WorkerServices, messages: Messages, monkeypatch: pytest.MonkeyPatch
) -> None:
    rig.create()

    def no_broker() -> None:
        raise broker_unavailable()

    monkeypatch.setattr(messages, "check", no_broker)
    with pytest.raises(ServiceError) as refused:
        worker.acceptance.roll_out("checkout", Rule(1000), etag="", request=None)
    assert refused.value.reason is Reason.BROKER_UNAVAILABLE
