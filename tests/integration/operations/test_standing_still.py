"""Processes stop while they hold a lock: callers that need it must retry, and the lock is taken away."""

from __future__ import annotations

import contextlib
from dataclasses import replace

import pytest
import sqlalchemy as sa

from segsvc.domain.errors import Reason, ServiceError
from segsvc.domain.operation import Operation, OperationState
from segsvc.postgres.engine import Databases, Pool
from segsvc.postgres.locks import SHARD_LOCK
from tests.eventually import eventually
from tests.integration.operations.conftest import Rig, roll_out

VOTING = "SELECT state FROM operations WHERE id = :id FOR SHARE"
"""The first statement of a vote."""


def expire(rig: Rig, operation: Operation) -> None:
    rig.installation.execute(None, "UPDATE operations SET deadline = clock_timestamp() WHERE id = :id", id=operation.id)


def test_recovery_comes_again_for_an_operation_whose_row_is_held(rig: Rig) -> None:
    rig.create()
    operation = roll_out(rig, 10_000)
    rig.messages.sent.clear()
    expire(rig, operation)

    engine = sa.create_engine(rig.installation.settings.catalog_dsn, poolclass=sa.NullPool)
    with engine.begin() as voter:
        voter.execute(sa.text(VOTING), {"id": operation.id})
        with pytest.raises(ServiceError) as caught:
            rig.coordinator.recover()
        assert caught.value.reason is Reason.OVERLOADED
        assert rig.state(operation) is OperationState.PREPARING

    rig.coordinator.recover()
    assert rig.state(operation) is OperationState.ABORTED


def test_a_process_that_hangs_in_its_vote_loses_the_row(rig: Rig) -> None:
    rig.create()
    operation = roll_out(rig, 10_000)
    rig.messages.sent.clear()
    expire(rig, operation)
    frozen = Databases(rig.installation.settings, "test", Pool(1, catalog_idle_s=0.3))

    def aborted() -> bool:
        with contextlib.suppress(ServiceError):  # the row is held
            rig.coordinator.recover()
        return rig.state(operation) is OperationState.ABORTED

    def stand_still() -> None:
        with frozen.catalog_tx() as voter:
            voter.execute(sa.text(VOTING), {"id": operation.id})
            eventually(aborted)

    with pytest.raises(ServiceError) as caught:
        stand_still()
    assert caught.value.reason is Reason.CATALOG_UNAVAILABLE
    frozen.close()


def test_work_that_is_done_again_waits_for_its_turn(rig: Rig) -> None:
    rig.create()
    operation = roll_out(rig, 10_000)
    engine = sa.create_engine(rig.installation.settings.shard_dsns[0], poolclass=sa.NullPool)
    with engine.begin() as events:
        events.execute(sa.select(sa.func.pg_advisory_xact_lock_shared(SHARD_LOCK)))
        with pytest.raises(ServiceError) as caught:
            rig.coordinator.participants[0].redo(operation)
    assert (caught.value.reason, caught.value.metadata["shard"]) == (Reason.SHARD_UNAVAILABLE, "0")
    rig.deliver()


def test_a_cancellation_stands_though_the_next_cannot_be_started(rig: Rig, monkeypatch: pytest.MonkeyPatch) -> None:
    rig.create()
    operation = roll_out(rig, 10_000)

    def refuse() -> None:
        raise ServiceError(Reason.CATALOG_UNAVAILABLE, "the catalog cannot be reached now")

    with monkeypatch.context() as patched:
        patched.setattr(rig.ledger, "start_next", refuse)
        assert rig.acceptance.cancel(operation.id).state is OperationState.ABORTED
    rig.settle()
    assert rig.state(operation) is OperationState.ABORTED


def test_an_operation_that_ends_between_two_looks_stops_no_recovery(rig: Rig, monkeypatch: pytest.MonkeyPatch) -> None:
    rig.create()
    operation = roll_out(rig, 10_000)
    seen = rig.ledger.open_operations()
    rig.deliver()
    ended = rig.ledger.get(operation.id)
    assert ended is not None
    assert ended.state is OperationState.DONE
    monkeypatch.setattr(rig.ledger, "open_operations", lambda: [replace(one, operation=ended) for one in seen])
    rig.coordinator.recover()
