"""A waiter learns of an operation's end by the notification, not by its next poll."""

from __future__ import annotations

import pytest

from segsvc.domain.errors import Reason
from segsvc.domain.operation import Failure, OperationState
from segsvc.services.end_watcher import OperationEndWatcher
from tests.eventually import eventually
from tests.integration.operations.conftest import Rig, roll_out

LOOKED = "SELECT count(*) AS n FROM pg_stat_activity WHERE state = 'idle' AND query LIKE 'SELECT id FROM operations%'"


@pytest.fixture
def seldom(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(OperationEndWatcher, "_POLL_S", 6.0)


@pytest.mark.usefixtures("seldom")
@pytest.mark.parametrize("end", [OperationState.DONE, OperationState.ABORTED])
def test_the_end_is_notified(rig: Rig, end: OperationState) -> None:
    rig.create()
    operation = roll_out(rig, 30_000)
    future = rig.watcher.watch(operation.id)

    # The watcher has polled, found nothing, and waits: so only the notification can wake it in time.
    eventually(lambda: rig.installation.execute(None, LOOKED)[0].n == 1)
    assert not future.done()

    if end is OperationState.DONE:
        rig.deliver()
    else:
        rig.coordinator.abort(operation.id, Failure(Reason.OPERATION_ABORTED.text, "a test", {}))

    assert future.result(timeout=20).state is end


def test_a_connection_that_listened_goes_back_as_it_was(rig: Rig) -> None:
    with rig.ledger.listening():
        pass
    rig.create()
    # A pooled connection would not read the notification, and the pool would treat the connection as dead.
    with rig.databases.catalog_autocommit() as connection:
        listening = connection.exec_driver_sql("SELECT pg_listening_channels()").all()
    assert listening == []
