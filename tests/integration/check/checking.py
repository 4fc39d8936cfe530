"""Runs the checker, and makes the faults that more than one test file needs."""

from __future__ import annotations

import re

import sqlalchemy as sa

from segsvc.bootstrap import Check
from segsvc.config import Settings
from segsvc.services.check.check import Checker
from segsvc.services.check.report import Report
from tests.integration.check.world import World

SETTLE_S = 0.3
ABSENT = "00000000-0000-4000-8000-000000000000"
"""An operation that no ledger knows."""


def run(service: Check, settings: Settings, *, cache: bool = True) -> Report:
    """Run the check as ``segsvc check`` does, but with less patience for the cache."""
    checker = Checker(
        service.reads,
        service.reader if cache else None,
        patches=service.inspector if cache else None,
        notes_kept_s=3600,
        cluster=settings.cluster,
        shard_count=settings.shard_count,
        fence_ttl_s=settings.fence_ttl_s,
        settle_s=SETTLE_S,
        slugs=service.slugs,
    )
    return checker.run()


def texts(report: Report) -> list[str]:
    return [ageless(str(difference)) for difference in report.differences]


def ageless(text: str) -> str:
    """The text without the age of a prepared transaction, which depends on the machine's load."""
    return re.sub(r"is prepared for \d+ s", "is prepared", text)


def flip(world: World, shard: int, segment: int, user: int) -> None:
    slot = world.slots(shard)[user]
    world.on_shard(
        shard,
        "UPDATE memberships SET bits = set_bit(bits, :bit, 1 - get_bit(bits, :bit)) "
        "WHERE block = :block AND segment_id = :segment",
        bit=slot % 1024, block=slot // 1024, segment=segment,
    )  # fmt: skip


def prepare(world: World, gid: str) -> None:
    with world.shards[1].connect() as connection:
        connection.execute(sa.text("UPDATE shard_state SET next_slot = next_slot"))
        assert connection.connection.driver_connection is not None
        connection.exec_driver_sql(f"PREPARE TRANSACTION '{gid}'")


def finish(world: World, gid: str) -> None:
    with world.shards[1].connect().execution_options(isolation_level="AUTOCOMMIT") as connection:
        connection.exec_driver_sql(f"ROLLBACK PREPARED '{gid}'")
