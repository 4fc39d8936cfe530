"""A small installation, written row by row from the definitions, not with the service's own code."""

from __future__ import annotations

import itertools
from collections.abc import Iterable
from dataclasses import dataclass, field
from datetime import UTC, datetime, timedelta
from typing import Any
from uuid import UUID, uuid4

import sqlalchemy as sa

from segsvc.cache.client import CacheClient
from segsvc.config import Settings
from segsvc.domain.bucketing import bucket
from segsvc.domain.membership import NEVER_US
from segsvc.domain.operation import OperationKind, OperationPlan, OperationState
from segsvc.domain.segment import Policy, Rule, SegmentState
from segsvc.postgres import tables

SHARDS = 2
BLOCK = 1024


@dataclass
class SegmentRow:
    id: int
    slug: str
    salt: int
    rule: Rule | None = None
    frozen_slot: dict[int, int] = field(default_factory=dict)
    uid: UUID = field(default_factory=uuid4)


def age(user: int) -> int:
    """The one attribute of each user."""
    return user * 7 % 40


class World:
    """Users 1 … 3000, some of them deleted; every kind of segment; overrides; past operations."""

    def __init__(self, settings: Settings) -> None:
        self.settings = settings
        self.catalog = sa.create_engine(settings.catalog_dsn, poolclass=sa.NullPool)
        self.shards = [sa.create_engine(dsn, poolclass=sa.NullPool) for dsn in settings.shard_dsns]

        self.users: list[list[int]] = [[user for user in range(1, 3001) if user % SHARDS == s] for s in range(SHARDS)]
        self.deleted = {10, 11, 2048}

        self.segments = [
            SegmentRow(7, "checkout", 0x0123456789ABCDEF, Rule(30_000)),
            SegmentRow(8, "beta", 2**64 - 1, Rule(100_000)),
            SegmentRow(9, "alpha", 5, Rule(0)),
            SegmentRow(10, "unrolled", 6),
            SegmentRow(11, "frozen", 77, Rule(50_000, "", Policy.FROZEN), {0: 1200, 1: -1}),
            SegmentRow(12, "adults", 78, Rule(60_000, "user.age >= 18")),
            SegmentRow(13, "kept", 79, Rule(60_000, "user.age >= 18", Policy.FROZEN), {0: 1400, 1: 1400}),
        ]

        now = datetime.now(UTC)
        # Each is (user, segment, 1 to include or 2 to exclude, end).
        self.overrides: list[tuple[int, int, int, datetime | None]] = [
            (20, 10, 1, None),
            (21, 8, 2, now + timedelta(hours=1)),
            (22, 8, 2, now - timedelta(hours=1)),
            (23, 9, 1, now + timedelta(hours=1)),
        ]

        self.operations: list[dict[str, Any]] = []
        self.fences: list[set[UUID]] = [set() for _ in range(SHARDS)]

    # -- what the definitions say -----------------------------------------------------------------------------------

    def slots(self, shard: int) -> dict[int, int]:
        """Slots of the users who exist, by user."""
        return {user: slot for slot, user in enumerate(self.users[shard]) if user not in self.deleted}

    def by_rule(self, segment: SegmentRow, shard: int, user: int, slot: int) -> bool:
        if segment.rule is None:
            return False

        if segment.rule.policy is Policy.FROZEN and slot > segment.frozen_slot[shard]:
            return False

        if segment.rule.condition and age(user) < 18:
            return False

        return bucket(user, segment.salt) < segment.rule.threshold

    def listed(self, user: int) -> tuple[int, ...]:
        """Ids of a user's segments, in the order of their slugs."""
        shard = user % SHARDS
        slot = self.slots(shard)[user]
        now = datetime.now(UTC)

        effects = {segment: effect for who, segment, effect, until in self.overrides
                   if who == user and (until is None or until > now)}  # fmt: skip

        return tuple(
            segment.id
            for segment in sorted(self.segments, key=lambda segment: segment.slug)
            if effects.get(segment.id, 1 if self.by_rule(segment, shard, user, slot) else 2) == 1
        )

    # -- writing it -------------------------------------------------------------------------------------------------

    def add_operation(
        self,
        kind: OperationKind,
        segment: SegmentRow,
        state: OperationState,
        *,
        fenced_on: Iterable[int] | None = None,
        rule: Rule | None = None,
        age_s: float = 100.0,
    ) -> UUID:
        """Add an operation to the history; ``write`` writes it."""
        operation_id = uuid4()
        plan = OperationPlan(kind, segment.slug, segment.id, segment.uid, segment.salt, rule=rule)
        started = datetime.now(UTC) - timedelta(seconds=age_s)

        self.operations.append(
            {
                "id": operation_id,
                "kind": kind,
                "slug": segment.slug,
                "segment_id": segment.id,
                "plan": plan.to_json(),
                "state": state.name,
                "start_time": started,
                "deadline": started + timedelta(seconds=120),
                "commit_time": started if state in (OperationState.COMMITTED, OperationState.DONE) else None,
                "end_time": started if state.final else None,
            }
        )

        if fenced_on is None:
            fenced_on = range(SHARDS) if state in (OperationState.COMMITTED, OperationState.DONE) else ()
        for shard in fenced_on:
            self.fences[shard].add(operation_id)

        return operation_id

    def write(self) -> None:
        """Replace the whole contents of the databases."""
        with self.catalog.begin() as connection:
            connection.execute(sa.text("TRUNCATE segments, operations, votes, progress, requests, audit"))

            now = datetime.now(UTC)
            for segment in self.segments:
                connection.execute(
                    sa.insert(tables.segments).values(
                        id=segment.id,
                        slug=segment.slug,
                        uid=segment.uid,
                        salt=tables.salt_to_db(segment.salt),
                        display_name="",
                        description="",
                        labels={},
                        state=SegmentState.ACTIVE,
                        etag="e",
                        create_time=now,
                        update_time=now,
                        **_rule_columns(segment.rule),
                    )
                )

            if self.operations:
                connection.execute(sa.insert(tables.operations), self.operations)

        for shard in range(SHARDS):
            self._write_shard(shard)

    def _write_shard(self, shard: int) -> None:
        slots = self.slots(shard)
        bits: dict[tuple[int, int], bytearray] = {}
        counts = dict.fromkeys((segment.id for segment in self.segments), 0)

        for segment in self.segments:
            for user, slot in slots.items():
                if self.by_rule(segment, shard, user, slot):
                    row = bits.setdefault((slot // BLOCK, segment.id), bytearray(BLOCK // 8))
                    row[slot % BLOCK // 8] |= 1 << (slot % 8)
                    counts[segment.id] += 1

        directory = {block: bytearray(BLOCK * 8) for block in range(-(-len(self.users[shard]) // BLOCK))}
        for user, slot in slots.items():
            at = slot % BLOCK * 8
            directory[slot // BLOCK][at : at + 8] = user.to_bytes(8, "little")

        with self.shards[shard].begin() as connection:
            connection.execute(
                sa.text(
                    "TRUNCATE users, directory, memberships, segments, overrides, deleted_users, applied_operations, "
                    "shard_epoch, changed_slots"
                )
            )
            connection.execute(
                sa.update(tables.shard_state).values(next_slot=len(self.users[shard]), user_count=len(slots))
            )

            insert = connection.execute

            insert(
                sa.insert(tables.users),
                [
                    {"id": user, "slot": slot, "attributes": {"age": age(user)}, "version": 0}
                    for user, slot in slots.items()
                ],
            )

            insert(sa.insert(tables.directory), [{"block": b, "user_ids": bytes(r)} for b, r in directory.items()])

            insert(
                sa.insert(tables.memberships),
                [{"block": b, "segment_id": s, "bits": bytes(r)} for (b, s), r in bits.items()],
            )

            insert(
                sa.insert(tables.shard_segments),
                [
                    {
                        "id": segment.id,
                        "slug": segment.slug,
                        "salt": tables.salt_to_db(segment.salt),
                        "rule_count": counts[segment.id],
                        "frozen_slot": segment.frozen_slot.get(shard),
                        **_rule_columns(segment.rule),
                    }
                    for segment in self.segments
                ],
            )

            overrides = [
                {"user_id": user, "segment_id": segment, "effect": effect, "expire_time": until}
                for user, segment, effect, until in self.overrides
                if user % SHARDS == shard
            ]
            insert(sa.insert(tables.overrides), overrides)

            gone = [{"id": user, "version": 0} for user in self.deleted if user % SHARDS == shard]
            insert(sa.insert(tables.deleted_users), gone)

            if self.fences[shard]:
                fences = [{"operation_id": fence, "kind": 1} for fence in self.fences[shard]]
                insert(sa.insert(tables.applied_operations), fences)

    def fill(self, cache: CacheClient) -> None:
        """Cache every user as a read of the shard does."""
        for shard in range(SHARDS):
            cache.drop_generations([shard])
            self.fill_users(cache, {user: self.listed(user) for user in self.slots(shard)})

    def fill_users(self, cache: CacheClient, lists: dict[int, tuple[int, ...]], *, epoch: int = 0) -> None:
        """Cache these users with these segments, right or wrong, as read in this epoch."""
        for shard, users in itertools.groupby(
            sorted(lists, key=lambda user: user % SHARDS), lambda user: user % SHARDS
        ):
            slots = self.slots(shard)
            rows = [(user, (NEVER_US, 0, 1, epoch, slots.get(user, 0), *lists[user])) for user in users]
            grant = cache.acquire(shard, [user for user, _ in rows])
            assert len(grant.user_ids) == len(rows)
            assert cache.fill(shard, grant, rows) == len(rows)

    def on_shard(self, shard: int, statement: str, **values: Any) -> None:
        with self.shards[shard].begin() as connection:
            assert connection.execute(sa.text(statement), values).rowcount, "the fault changed nothing"

    def on_catalog(self, statement: str, **values: Any) -> None:
        with self.catalog.begin() as connection:
            assert connection.execute(sa.text(statement), values).rowcount, "the fault changed nothing"


def _rule_columns(rule: Rule | None) -> dict[str, Any]:
    return {
        "rule_threshold": rule.threshold if rule else None,
        "rule_condition": rule.condition if rule else None,
        "rule_policy": rule.policy if rule else None,
    }
