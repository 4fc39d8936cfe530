"""An installation whose users the tests of a module change, and events and overrides that change them."""

from __future__ import annotations

from collections.abc import Sequence
from contextlib import AbstractContextManager
from datetime import UTC, datetime, timedelta

from segsvc.domain.events import UserEvent
from segsvc.domain.override import Effect, OverrideChanges, WantedOverride
from segsvc.failpoints import NoFailpoints
from segsvc.local.postgres import PostgresServer
from segsvc.postgres.shard.overrides import PostgresOverrideStore
from segsvc.postgres.shard.user_transaction import PostgresUserStore
from segsvc.services.ingestion import Ingestion
from tests.installation import Installation, new_installation
from tests.integration.operations.conftest import SHARDS, Rig


def changing_installation(pg_server: PostgresServer) -> AbstractContextManager[Installation]:
    """As the other modules' one, but without users, and they need not stay the same."""
    return new_installation(
        pg_server, shards=SHARDS, redispatch_quiet_s=0.001, operation_deadline_s=30, lock_timeout_s=0.3
    )


class NoCache:
    """A cache without entries."""

    def drop_entries(self, shard: int, user_ids: Sequence[int]) -> None:
        """There are none."""


def apply(rig: Rig, *events: UserEvent) -> None:
    """Apply events of one shard, as one batch."""
    ingestion = Ingestion(PostgresUserStore(rig.databases), NoCache(), NoFailpoints())
    report = ingestion.apply_batch(events[0].user_id % SHARDS, events)
    assert not report.dead


def override(rig: Rig, user: int, effect: Effect, slug: str = "checkout", ends_in_s: float | None = None) -> None:
    """Put a user in or out of a segment."""
    end = None if ends_in_s is None else datetime.now(UTC) + timedelta(seconds=ends_in_s)
    changes = OverrideChanges(put=(WantedOverride(slug, effect, end),), clear=())
    changed = PostgresOverrideStore(rig.databases).modify(user, changes, None, lambda: None, timeout_s=None)
    assert changed is not None
