"""What a header task tries again itself, and what it leaves to recovery."""

from __future__ import annotations

from typing import Any
from uuid import uuid4

import pytest

import tasks.app
import tasks.operations
from segsvc.domain.errors import LockTimeout, Reason, ServiceError, shard_unavailable
from segsvc.domain.installation import Installation


@pytest.mark.parametrize(
    ("error", "runs"),
    [
        (shard_unavailable(1), 6),
        (LockTimeout(), 6),
        # A retry would hold the shard's lock and the process for as long again, while recovery waits for a process.
        (ServiceError(Reason.DEADLINE_EXCEEDED, "the database did not answer in time"), 1),
    ],
)
def test_how_often_a_shard_is_tried(monkeypatch: pytest.MonkeyPatch, error: Exception, runs: int) -> None:
    tried: list[int] = []

    class Services:
        shard_count = 2

        class coordinator:  # noqa: N801
            @staticmethod
            def prepare_shard(_operation_id: Any, shard: int, _on_progress: Any) -> None:
                tried.append(shard)
                raise error

        class ledger:  # noqa: N801
            put_progress = staticmethod(lambda *_: None)

    monkeypatch.setattr(tasks.operations, "runtime", Services)
    monkeypatch.setattr(tasks.app, "installation_of", lambda _: Installation("test", uuid4()))
    monkeypatch.setattr(tasks.operations.prepare_shard, "send_event", lambda *_, **__: None)
    ended = tasks.operations.prepare_shard.apply(
        kwargs={"operation_id": str(uuid4()), "shard": 1, "title": "roll out x"}
    )

    assert tried == [1] * runs
    assert ended.get() == tasks.operations.HEADER_RESULT
