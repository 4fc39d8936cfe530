"""Which tasks beat's request for warming starts."""

from __future__ import annotations

from typing import Any

import pytest

import tasks.warming
from segsvc.config import Settings
from segsvc.domain.errors import LockTimeout, shard_unavailable

DSN = "postgresql+psycopg2://nowhere/shard"


def test_one_task_a_shard_which_expires_when_the_next_is_due(monkeypatch: pytest.MonkeyPatch) -> None:
    settings = Settings(_env_file=None, shard_dsns=(DSN,), warm_interval_s=2.5)  # type: ignore[call-arg]
    sent: list[dict[str, Any]] = []

    class Services:
        shard_count = 3  # in force; a doubling may have begun since the settings were read

    monkeypatch.setattr(tasks.warming, "load_settings", lambda: settings)
    monkeypatch.setattr(tasks.warming, "runtime", Services)
    monkeypatch.setattr(tasks.warming.warm_shard, "apply_async", lambda **options: sent.append(options))
    tasks.warming.warm_all()
    assert sent == [{"kwargs": {"shard": shard}, "expires": 2.5} for shard in range(3)]


@pytest.mark.parametrize("error", [shard_unavailable(1), LockTimeout()])
def test_outage_is_left_to_the_next_run(monkeypatch: pytest.MonkeyPatch, error: Exception) -> None:
    warmed: list[int] = []

    class Services:
        shard_count = 2

        class warming:  # noqa: N801
            @staticmethod
            def warm_shard(shard: int) -> None:
                warmed.append(shard)
                raise error

    monkeypatch.setattr(tasks.warming, "runtime", Services)
    tasks.warming.warm_shard(shard=1)
    tasks.warming.warm_shard(shard=2)  # of a process that knows more shards
    assert warmed == [1]
