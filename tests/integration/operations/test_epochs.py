"""What PostgreSQL knows of a bulk change for the cache: the epoch that it begins, who changed, and its patch."""

from __future__ import annotations

from collections.abc import Callable, Iterator

import numpy as np
import pytest

from segsvc.domain.events import CreateUser, DeleteUser, UpdateUser
from segsvc.domain.operation import Operation, OperationFilter, OperationKind, OperationState
from segsvc.domain.override import Effect
from segsvc.domain.patch import Patch
from segsvc.local.postgres import PostgresServer
from segsvc.postgres.shard import patches
from segsvc.postgres.shard.maintenance import PostgresMaintainedShards
from segsvc.postgres.shard.memberships import PostgresMemberships
from segsvc.postgres.shard.patches import PostgresPatches
from tests.installation import Installation
from tests.integration.operations.changing_users import apply, changing_installation, override
from tests.integration.operations.conftest import SHARDS, Rig, roll_out

USERS = range(1, 3001)


@pytest.fixture(scope="module")
def installation_with_users(pg_server: PostgresServer) -> Iterator[Installation]:
    with changing_installation(pg_server) as made:
        made.add_users(USERS)
        yield made


@pytest.fixture(autouse=True)
def epoch_0(installation: Installation) -> None:
    for shard in range(SHARDS):
        installation.execute(shard, "DELETE FROM shard_epoch")
        installation.execute(shard, "DELETE FROM changed_slots")


def epochs(rig: Rig) -> list[int]:
    """The epoch of each shard, as a read of a user finds it."""
    reads = PostgresMemberships(rig.databases)
    return [reads.load(shard, [SHARDS * 900 + shard])[0].epoch for shard in range(SHARDS)]


def notes(rig: Rig, shard: int) -> list[tuple[int, list[int]]]:
    """(epoch, slots) of each note, oldest first."""
    rows = rig.installation.execute(shard, "SELECT epoch, slots FROM changed_slots ORDER BY xid")
    return [(int(str(row.epoch)), np.frombuffer(bytes(row.slots), dtype=">i4").tolist()) for row in rows]  # type: ignore[call-overload]


def slot_of(rig: Rig, user: int) -> int:
    [row] = PostgresMemberships(rig.databases).load(user % SHARDS, [user])
    return row.slot


def patch_of(rig: Rig, shard: int, operation: Operation) -> Patch:
    patch = PostgresPatches(rig.databases).read(shard, operation)
    assert patch is not None
    return patch


def delete(rig: Rig, slug: str = "checkout") -> Operation:
    return rig.acceptance.delete(slug, etag="", request=None)


# -- epochs ---------------------------------------------------------------------------------------------------------


def test_rollouts_and_deletions_begin_an_epoch_on_each_shard_and_creations_do_not(rig: Rig) -> None:
    rig.create()
    assert epochs(rig) == [0] * SHARDS

    roll_out(rig, 30_000)
    assert epochs(rig) == [0] * SHARDS, "it is not committed"
    rig.settle()
    assert epochs(rig) == [1] * SHARDS

    rig.create("other")
    delete(rig)
    rig.settle()

    assert epochs(rig) == [2] * SHARDS
    for shard in range(SHARDS):
        fences = rig.installation.execute(shard, "SELECT kind, epoch FROM applied_operations ORDER BY apply_time")
        assert [tuple(row) for row in fences] == [(3, None), (1, 1), (3, None), (2, 2)]


def test_an_aborted_operation_begins_no_epoch(rig: Rig) -> None:
    rig.create()
    operation = roll_out(rig, 30_000)
    rig.prepare(operation, 0)
    rig.acceptance.cancel(operation.id)
    assert epochs(rig) == [0] * SHARDS

    roll_out(rig, 40_000)
    rig.settle()
    assert epochs(rig) == [1] * SHARDS


def test_a_prepared_transaction_that_was_lost_is_done_again_and_begins_its_epoch_once(
    rig: Rig, arm: Callable[[str, str], None]
) -> None:
    rig.create()
    arm("decided", "fail")
    operation = roll_out(rig, 30_000)
    rig.deliver()
    assert rig.state(operation) is OperationState.COMMITTED
    lost = rig.coordinator.participants[1]
    lost.rollback_prepared(rig.coordinator.gid(operation.id, 1))
    arm("decided", "")

    rig.settle()
    lost.redo(operation)

    assert epochs(rig) == [1] * SHARDS
    assert patch_of(rig, 1, operation).epoch == 1


def test_a_block_and_its_users_have_one_epoch(rig: Rig) -> None:
    rig.create()
    roll_out(rig, 30_000)
    rig.settle()
    with PostgresMemberships(rig.databases).warm_session(1) as session:
        assert session is not None
        [block] = session.read([0])
    assert block.epoch == 1


# -- who changed ----------------------------------------------------------------------------------------------------


def test_each_change_of_a_user_is_noted_under_the_present_epoch_and_a_creation_is_not(rig: Rig) -> None:
    rig.create()
    apply(rig, CreateUser(3003, "{}"), CreateUser(3006, "{}"))
    assert notes(rig, 0) == []

    slots = [slot_of(rig, user) for user in (3, 6, 9, 3003)]
    apply(rig, UpdateUser(3, 2, "{}"), UpdateUser(6, 2, "{}"), UpdateUser(3, 1, "{}"), CreateUser(3009, "{}"))
    roll_out(rig, 30_000)
    rig.settle()
    override(rig, 9, Effect.INCLUDE)
    apply(rig, UpdateUser(6, 3, "{}"), DeleteUser(3003))
    apply(rig, UpdateUser(6, 3, "{}"), DeleteUser(3003))

    found = [(epoch, sorted(slots)) for epoch, slots in notes(rig, 0)]
    assert found == [(0, sorted(slots[:2])), (1, [slots[2]]), (1, sorted([slots[1], slots[3]]))]


def test_notes_that_no_patch_can_need_are_forgotten(rig: Rig) -> None:
    rig.create()
    for n in range(3):
        apply(rig, UpdateUser(12, 10 + n, "{}"))
        roll_out(rig, 10_000 * (n + 1))
        rig.settle()
    apply(rig, UpdateUser(12, 20, "{}"))
    assert [epoch for epoch, _ in notes(rig, 0)] == [0, 1, 2, 3]
    shards = PostgresMaintainedShards(rig.databases)
    ttl_s = {"request_ttl_s": 1000, "tombstone_ttl_s": 1000, "fence_ttl_s": 1000, "note_ttl_s": 1000}

    shards.forget(0, **ttl_s)
    assert [epoch for epoch, _ in notes(rig, 0)] == [2, 3], "those of the next patch, and of the last one"

    rig.installation.execute(0, "UPDATE changed_slots SET note_time = now() - interval '1001 s' WHERE epoch = 3")
    shards.forget(0, **ttl_s)
    assert [epoch for epoch, _ in notes(rig, 0)] == [2]


# -- patches --------------------------------------------------------------------------------------------------------


@pytest.mark.parametrize("at_once", [1, 2, 1000])
def test_a_patch_has_the_segments_members_and_everybody_who_changed(
    rig: Rig, monkeypatch: pytest.MonkeyPatch, at_once: int
) -> None:
    monkeypatch.setattr(patches, "BLOCKS_AT_ONCE", at_once)
    monkeypatch.setattr(patches, "NOTES_AT_ONCE", at_once)
    monkeypatch.setattr(patches, "_NOTES_AT_ONCE_MAX", at_once)
    version = 100 * at_once
    rig.create()
    rig.create("other")
    roll_out(rig, 50_000)
    apply(rig, UpdateUser(30, version, "{}"))
    rig.settle()
    for n, user in enumerate((33, 36, 33, 39)):
        apply(rig, UpdateUser(user, version + n, "{}"))
    override(rig, 42, Effect.INCLUDE)
    override(rig, 45, Effect.EXCLUDE)
    override(rig, 48, Effect.INCLUDE, "other")
    override(rig, 51, Effect.INCLUDE, ends_in_s=3600)

    operation = roll_out(rig, 20_000)
    rig.settle()
    override(rig, 54, Effect.EXCLUDE)
    patch = patch_of(rig, 0, operation)

    assert (patch.epoch, patch.segment_id, patch.valid_until_us) == (2, operation.plan.segment_id, None)
    changed = [slot_of(rig, user) for user in (33, 36, 39, 42, 45, 48, 51, 54)]
    assert patch.changed.tolist() == sorted(changed), "those of epoch 0 are not among them"
    assert patch.members is not None
    flags = np.unpackbits(patch.members.ravel(), bitorder="little")
    mine = PostgresMemberships(rig.databases).load(0, range(3, 3001, 3))
    assert {row.user_id for row in mine if flags[row.slot]} == {
        row.user_id for row in mine if operation.plan.segment_id in row.segment_ids
    }
    assert flags[[slot_of(rig, user) for user in (42, 45, 51)]].tolist() == [1, 0, 1]
    assert patch.slots <= flags.size < patch.slots + 1024
    assert not flags[patch.slots :].any()


def test_a_deletions_patch_says_only_who_changed(rig: Rig) -> None:
    rig.create()
    roll_out(rig, 50_000)
    rig.settle()
    apply(rig, UpdateUser(60, 500, "{}"))
    operation = delete(rig)
    rig.settle()
    patch = patch_of(rig, 0, operation)
    assert (patch.epoch, patch.members, patch.changed.tolist()) == (2, None, [slot_of(rig, 60)])


def test_there_is_no_patch_before_the_commit_nor_after_the_next_operation_nor_of_a_creation(
    rig: Rig, arm: Callable[[str, str], None]
) -> None:
    rig.create()
    arm("before-commit-prepared", "fail shard=0")
    first = roll_out(rig, 50_000)
    rig.deliver()
    read = PostgresPatches(rig.databases).read
    assert read(0, first) is None
    arm("before-commit-prepared", "")
    rig.settle()
    assert read(0, first) is not None

    rig.create("other")
    creation = next(one for one in rig.operations.list(OperationFilter(), page_size=1, before_seq=None))
    assert creation.plan.kind is OperationKind.CREATE
    assert read(0, creation) is None
    assert read(0, first) is not None, "a creation changes no list"

    second = roll_out(rig, 60_000)
    rig.settle()
    assert read(0, first) is None
    assert patch_of(rig, 0, second).epoch == 2
