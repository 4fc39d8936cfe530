"""Everything that a shard holds about its users, read at once and checked against the shard's invariants."""

from __future__ import annotations

import json
from dataclasses import dataclass

import numpy as np
import sqlalchemy as sa

from segsvc.domain.bucketing import bucket
from segsvc.domain.sharding import BLOCK_SLOTS
from segsvc.postgres import tables
from segsvc.postgres.engine import Databases


@dataclass(frozen=True)
class User:
    slot: int
    version: int
    row_version: int
    attributes: object


@dataclass(frozen=True)
class ShardView:
    users: dict[int, User]
    tombstones: dict[int, int]
    members: dict[int, set[int]]
    next_slot: int


def view(databases: Databases, shard: int) -> ShardView:
    """Read a shard and check its invariants."""
    with databases.shard_tx(shard) as connection:
        rows = connection.execute(
            sa.text("SELECT id, slot, version, row_version, attributes::text AS attributes FROM users")
        ).all()
        users = {row.id: User(row.slot, row.version, row.row_version, json.loads(row.attributes)) for row in rows}
        tombstones = dict(connection.execute(sa.text("SELECT id, version FROM deleted_users")).tuples().all())
        state = connection.execute(sa.select(tables.shard_state)).one()
        directory = {
            row.block: np.frombuffer(row.user_ids, dtype="<i8")
            for row in connection.execute(sa.select(tables.directory))
        }
        bits = {
            (row.block, row.segment_id): np.unpackbits(np.frombuffer(row.bits, dtype=np.uint8), bitorder="little")
            for row in connection.execute(sa.select(tables.memberships))
        }
        segments = connection.execute(sa.select(tables.shard_segments)).all()
        overridden = set(connection.execute(sa.select(tables.overrides.c.user_id)).scalars())

    assert not users.keys() & tombstones.keys()
    assert state.user_count == len(users)
    assert all(0 <= user.slot < state.next_slot for user in users.values())
    assert overridden <= users.keys()
    blocks = -(-state.next_slot // BLOCK_SLOTS)
    assert sorted(directory) == list(range(blocks))
    assert all(ids.size == BLOCK_SLOTS for ids in directory.values())
    in_directory = {
        int(user_id): block * BLOCK_SLOTS + slot
        for block, ids in directory.items()
        for slot, user_id in enumerate(ids)
        if user_id
    }
    assert in_directory == {user_id: user.slot for user_id, user in users.items()}
    assert all(row.any() for row in bits.values()), "a row of zeros is not kept"

    at_slot = {user.slot: user_id for user_id, user in users.items()}
    members: dict[int, set[int]] = {segment.id: set() for segment in segments}
    for (block, segment_id), row in bits.items():
        members[segment_id] |= {at_slot[block * BLOCK_SLOTS + int(slot)] for slot in np.flatnonzero(row)}
    for segment in segments:
        assert segment.rule_count == len(members[segment.id])
        if segment.rule_policy == 1 and not segment.rule_condition:
            salt = tables.salt_from_db(segment.salt)
            assert members[segment.id] == {
                user_id for user_id in users if bucket(user_id, salt) < segment.rule_threshold
            }
    return ShardView(users, tombstones, members, state.next_slot)
