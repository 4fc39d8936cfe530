"""Members are read batch by batch, while the causes of their membership change."""

from __future__ import annotations

from collections.abc import Sequence

import pytest
import sqlalchemy as sa

from segsvc.domain.errors import Reason, ServiceError
from segsvc.postgres.catalog.segments import PostgresSegmentCatalog
from segsvc.postgres.shard import members as reading
from segsvc.postgres.shard.members import PostgresMemberReader
from segsvc.services import export as exporting
from segsvc.services.export import ExportService
from segsvc.services.segments import SegmentService
from tests.integration.operations.conftest import SHARDS, USERS, Rig, roll_out


def service(rig: Rig) -> ExportService:
    return ExportService(SegmentService(PostgresSegmentCatalog(rig.databases)), PostgresMemberReader(rig.databases))


def exported(rig: Rig, slug: str = "checkout") -> list[int]:
    found: list[int] = []
    own = service(rig)
    cursor = own.start(slug)
    while (step := own.next(cursor)) is not None:
        batch, cursor = step
        found += batch.user_ids
    return found


def test_constant_members_are_exported(rig: Rig, monkeypatch: pytest.MonkeyPatch) -> None:
    """The user is a member by an override at first, then by the rule as well, then by the rule alone."""
    segment_id = rig.create()
    roll_out(rig, 10_000)
    rig.settle()

    in_by_rule = rig.expected("checkout", 10_000)
    by_hand = next(user for user in USERS if user % SHARDS == 0 and user not in in_by_rule)
    rig.installation.execute(
        0,
        "INSERT INTO overrides (user_id, segment_id, effect) VALUES (:user, :segment, 1)",
        user=by_hand,
        segment=segment_id,
    )

    select_overrides = reading.select_overrides
    changed = False

    def change_before(connection: sa.Connection, segment: int, after: int, end: int) -> Sequence[tuple[int, int]]:
        nonlocal changed
        if not changed:  # the bits of shard 0 have been read
            changed = True
            roll_out(rig, 100_000)
            rig.settle()
            rig.installation.execute(0, "DELETE FROM overrides")
        return select_overrides(connection, segment, after, end)

    monkeypatch.setattr(reading, "select_overrides", change_before)

    members = exported(rig)
    assert changed
    assert by_hand in members


def test_a_segment_that_is_deleted_between_two_batches(rig: Rig, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(exporting, "BATCH_USERS_MAX", 500)
    rig.create()
    roll_out(rig, 100_000)
    rig.settle()

    own = service(rig)
    step = own.next(own.start("checkout"))
    assert step is not None
    batch, cursor = step
    assert len(batch.user_ids) == 500

    rig.acceptance.delete("checkout", etag="", request=None)
    rig.settle()

    with pytest.raises(ServiceError) as refused:
        own.next(cursor)
    assert refused.value.reason is Reason.SEGMENT_NOT_FOUND
