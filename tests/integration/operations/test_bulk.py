"""Bulk reads and writes of a shard's transaction, at sizes that use other code paths than a few blocks."""

from __future__ import annotations

from collections.abc import Iterator

import numpy as np
import pytest

from segsvc.domain import bits
from segsvc.domain.bucketing import bucket
from segsvc.domain.segment import Rule
from segsvc.domain.sharding import BLOCK_BYTES, BLOCK_SLOTS
from segsvc.local.postgres import PostgresServer
from segsvc.postgres.engine import Databases, Pool
from segsvc.postgres.shard.operation_transaction import PostgresShardTransaction
from segsvc.services import shard_work
from tests.installation import Installation, new_installation
from tests.integration.operations.conftest import SHARDS, USERS, Rig

BLOCKS = 200
FIRST = 7
SEGMENT = 1
RANDOM = np.random.default_rng(1)


@pytest.fixture(scope="module")
def one_shard(pg_server: PostgresServer) -> Iterator[tuple[Installation, Databases]]:
    with new_installation(pg_server, shards=1) as installation:
        databases = Databases(installation.settings, "test", Pool(1))
        yield installation, databases
        databases.close()


def stored(installation: Installation, segment_id: int) -> dict[int, tuple[bytes, str]]:
    """Bits and row version, by block."""
    rows = installation.execute(
        0, "SELECT block, bits, ctid::text AS version FROM memberships WHERE segment_id = :id", id=segment_id
    )
    return {int(str(row.block)): (bytes(row.bits), str(row.version)) for row in rows}  # type: ignore[call-overload]


@pytest.mark.parametrize("changed", [0, 1, 63, 64, 65, 101, 150, BLOCKS])
def test_exactly_the_new_bits_are_stored(one_shard: tuple[Installation, Databases], changed: int) -> None:
    installation, databases = one_shard
    installation.execute(0, "DELETE FROM memberships")

    old = RANDOM.integers(0, 256, (BLOCKS, BLOCK_BYTES), dtype=np.uint8)
    old[::5] = 0

    new = old.copy()
    which = RANDOM.permutation(BLOCKS)[:changed]
    new[which] = RANDOM.integers(0, 256, (changed, BLOCK_BYTES), dtype=np.uint8)
    new[which[::3]] = 0

    others = bits.pack(np.ones((1, BLOCK_SLOTS), dtype=np.bool_))

    with databases.shard_tx(0) as connection:
        tx = PostgresShardTransaction(connection, 0)
        tx.write_segment_bits(SEGMENT, FIRST, bits.empty(BLOCKS), old)
        # Rows beside the range, and a row of another segment in it.
        tx.write_segment_bits(SEGMENT, FIRST - 1, bits.empty(1), others)
        tx.write_segment_bits(SEGMENT, FIRST + BLOCKS, bits.empty(1), others)
        tx.write_segment_bits(SEGMENT + 1, FIRST + 3, bits.empty(1), others)

    before = stored(installation, SEGMENT)

    with databases.shard_tx(0) as connection:
        tx = PostgresShardTransaction(connection, 0)
        tx.write_segment_bits(SEGMENT, FIRST, old, new)
        assert np.array_equal(tx.segment_bits(SEGMENT, FIRST, BLOCKS), new)

    after = stored(installation, SEGMENT)
    expected = {FIRST + block: new[block].tobytes() for block in range(BLOCKS) if new[block].any()}
    expected |= {FIRST - 1: others.tobytes(), FIRST + BLOCKS: others.tobytes()}
    assert {block: found for block, (found, _) in after.items()} == expected

    if changed <= BLOCKS // 2:  # few changes: unchanged rows are not written again
        touched = {FIRST + int(block) for block in which}
        assert {b: row for b, row in after.items() if b not in touched} == {
            b: row for b, row in before.items() if b not in touched
        }
    assert list(stored(installation, SEGMENT + 1)) == [FIRST + 3]


def test_a_condition_is_asked_of_a_shard_in_parts(rig: Rig, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(shard_work, "CONDITION_BLOCKS_MAX", 1)
    assert len(USERS) > SHARDS * BLOCK_SLOTS, "more than one part"
    for shard in range(SHARDS):
        rig.installation.execute(shard, "UPDATE users SET attributes = '{\"odd\": true}' WHERE id % 2 = 1")

    try:
        segment_id = rig.create()
        rig.acceptance.roll_out("checkout", Rule(40_000, "user.odd"), etag="", request=None)
        rig.deliver()
        segment = rig.ledger.segment("checkout")
        assert segment is not None
        expected = {user for user in USERS if user % 2 and bucket(user, segment.salt) < 40_000}
        assert rig.installation.members(segment_id) == expected
    finally:
        for shard in range(SHARDS):
            rig.installation.execute(shard, "UPDATE users SET attributes = '{}'")
