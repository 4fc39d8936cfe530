"""A rollout evaluates its rule before it takes the shard's lock. Who changes in between gets the right bit."""

from __future__ import annotations

import json
import random
import threading
from collections.abc import Callable, Iterator
from concurrent.futures import ThreadPoolExecutor
from contextlib import contextmanager, suppress
from pathlib import Path

import numpy as np
import pytest

from segsvc.bootstrap import make_rule_costs
from segsvc.domain.bucketing import bucket
from segsvc.domain.errors import LockTimeout
from segsvc.domain.events import CreateUser, DeleteUser, UpdateUser, UserEvent
from segsvc.domain.operation import Operation, OperationState, ShardCounts, ShardProgress
from segsvc.domain.override import Effect
from segsvc.domain.segment import Policy, Rule
from segsvc.domain.user_fold import UserRow
from segsvc.fan_out import ThreadFanOut
from segsvc.local.postgres import PostgresServer
from segsvc.postgres.catalog.segments import PostgresSegmentCatalog
from segsvc.postgres.locks import SHARD_LOCK
from segsvc.postgres.shard.operation_transaction import PostgresShardSnapshots, PostgresShardTransaction
from segsvc.postgres.shard.user_transaction import PostgresUserStore
from segsvc.services import shard_work
from segsvc.services.preview import PreviewService
from segsvc.services.segments import SegmentService
from segsvc.services.user_bits import evaluate_again
from tests.eventually import eventually
from tests.installation import Installation
from tests.integration.operations.changing_users import apply, changing_installation, override
from tests.integration.operations.conftest import SHARDS, Rig

ADULT = "user.age >= 18"
SHARD = 0
USERS = range(3, 6000, 3)
"""All of shard 0."""

Arm = Callable[[str, str], None]


@pytest.fixture(scope="module")
def installation_with_users(pg_server: PostgresServer) -> Iterator[Installation]:
    with changing_installation(pg_server) as made:
        yield made


@pytest.fixture(autouse=True)
def users(rig: Rig) -> None:
    """Users of shard 0 aged 10 to 29, and no other ones."""
    for table in ("users", "directory", "deleted_users", "changed_slots", "shard_epoch"):
        rig.installation.execute(SHARD, f"DELETE FROM {table}")
    rig.installation.execute(SHARD, "UPDATE shard_state SET next_slot = 0, user_count = 0")
    apply(rig, *(CreateUser(user, aged(10 + user % 20)) for user in USERS))


def aged(age: int, **more: object) -> str:
    return json.dumps({"age": age, **more})


def roll_out(rig: Rig, rule: Rule, slug: str = "checkout") -> Operation:
    return rig.acceptance.roll_out(slug, rule, etag="", request=None)


def members_by_rule(rig: Rig, rule: Rule, slug: str = "checkout") -> set[int]:
    """Who is in the segment, by the definition: attributes as they are now, and the published hash."""
    segment = rig.ledger.segment(slug)
    assert segment is not None
    rows = rig.installation.execute(SHARD, "SELECT id, attributes FROM users")
    return {
        row.id  # type: ignore[misc]
        for row in rows
        if (not rule.condition or row.attributes["age"] >= 18)  # type: ignore[index]
        and bucket(row.id, segment.salt) < rule.threshold  # type: ignore[arg-type]
    }


def votes(rig: Rig, operation: Operation) -> ShardCounts:
    """What shard 0 has voted."""
    [counts] = [counts for counts in rig.operations.get(operation.id).votes if counts.shard == SHARD]
    return counts


@contextmanager
def held(rig: Rig, arm: Arm, failpoint_dir: Path, operation: Operation) -> Iterator[None]:
    """Hold the operation's task on shard 0 between its evaluation and the lock, for as long as the block lasts; then
    carry the operation to its end."""
    fired = failpoint_dir / "evaluated-not-locked.fired"
    fired.unlink(missing_ok=True)
    arm("evaluated-not-locked", f"hold shard={SHARD}")
    with ThreadPoolExecutor(1) as thread:
        task = thread.submit(rig.prepare, operation, SHARD)
        try:
            eventually(fired.exists)
            yield
        finally:
            arm("evaluated-not-locked", "")
        task.result()
    rig.settle()
    assert rig.state(operation) is OperationState.DONE


# -- who changes between the evaluation and the lock ----------------------------------------------------------------


@pytest.mark.parametrize("rule", [Rule(100_000, ADULT), Rule(50_000, ADULT), Rule(50_000)], ids=str)
def test_who_changes_after_the_evaluation_gets_the_right_bit(
    rig: Rig, arm: Arm, failpoint_dir: Path, rule: Rule
) -> None:
    segment_id = rig.create()
    rig.create("other")
    operation = roll_out(rig, rule)
    young, old = [u for u in USERS if u % 20 < 8][:200], [u for u in USERS if u % 20 >= 8][:200]

    with held(rig, arm, failpoint_dir, operation):
        apply(rig, *(UpdateUser(user, 1, aged(40)) for user in young[:100]))
        apply(rig, *(UpdateUser(user, 1, aged(5)) for user in old[:100]))
        apply(rig, UpdateUser(old[0], 2, aged(50)))
        apply(rig, *(DeleteUser(user) for user in (*young[90:110], *old[90:110])))
        apply(rig, *(CreateUser(user, aged(15 + user % 6)) for user in range(6000, 12_000, 3)))
        apply(rig, *(UpdateUser(user, 1, aged(33)) for user in range(6000, 6300, 3)), DeleteUser(6003))
        override(rig, old[150], Effect.EXCLUDE)
        override(rig, young[150], Effect.INCLUDE)

    expected = members_by_rule(rig, rule)
    assert rig.installation.members(segment_id) == expected
    found = votes(rig, operation)
    by_override = {young[150]} | (expected - {old[150]}) if young[150] not in expected else expected - {old[150]}
    assert (found.members, found.added, found.removed) == (len(by_override), len(by_override) - 1, 0)
    [row] = rig.installation.execute(SHARD, "SELECT rule_count FROM segments WHERE slug = 'checkout'")
    assert row.rule_count == len(expected)


def test_the_counts_are_those_of_a_preview(rig: Rig, arm: Arm, failpoint_dir: Path) -> None:
    rig.create()
    rule = Rule(60_000, "user.age >= 18 || user.nickname == 'x'")
    operation = roll_out(rig, rule)
    with held(rig, arm, failpoint_dir, operation):
        apply(rig, UpdateUser(3, 1, aged(44)), DeleteUser(6), CreateUser(6000, aged(44)), CreateUser(6003, aged(4)))
        segments = SegmentService(PostgresSegmentCatalog(rig.databases, rig.databases))
        fan_out = ThreadFanOut(SHARDS)
        preview = PreviewService(
            segments,
            PostgresShardSnapshots(rig.databases),
            make_rule_costs(rig.installation.settings, rig.databases),
            fan_out,
        ).count("checkout", rule)
        fan_out.close()

    assert votes(rig, operation) == preview.counts[SHARD]
    assert votes(rig, operation).absent_attributes == ("nickname",)


def test_an_attribute_that_comes_after_the_evaluation_is_not_called_absent(
    rig: Rig, arm: Arm, failpoint_dir: Path
) -> None:
    rig.create()
    operation = roll_out(rig, Rule(60_000, "user.age >= 18 || user.nickname == 'x' || user.colour == 'y'"))
    with held(rig, arm, failpoint_dir, operation):
        apply(rig, UpdateUser(3, 1, aged(4, nickname="z")))
    assert votes(rig, operation).absent_attributes == ("colour",)


def test_a_frozen_rule_has_the_users_who_came_before_the_lock(rig: Rig, arm: Arm, failpoint_dir: Path) -> None:
    segment_id = rig.create()
    rule = Rule(100_000, ADULT, Policy.FROZEN)
    operation = roll_out(rig, rule)
    with held(rig, arm, failpoint_dir, operation):
        apply(rig, CreateUser(6000, aged(44)), CreateUser(6003, aged(4)))
    expected = members_by_rule(rig, rule)
    apply(rig, CreateUser(6006, aged(44)))

    assert rig.installation.members(segment_id) == expected
    assert 6000 in expected
    [row] = rig.installation.execute(SHARD, "SELECT frozen_slot FROM segments WHERE slug = 'checkout'")
    assert row.frozen_slot == len(USERS) + 1


@pytest.mark.parametrize("again_s", [shard_work.AGAIN_S, -1.0], ids=["once", "several times"])
def test_a_change_that_is_not_committed_at_the_evaluation_is_found_under_the_lock(
    rig: Rig, arm: Arm, failpoint_dir: Path, monkeypatch: pytest.MonkeyPatch, again_s: float
) -> None:
    monkeypatch.setattr(shard_work, "AGAIN_S", again_s)
    segment_id = rig.create()
    rule = Rule(100_000, ADULT)
    operation = roll_out(rig, rule)

    user = next(user for user in USERS if user % 20 < 8)
    noted, commit = threading.Event(), threading.Event()

    def change() -> None:
        with PostgresUserStore(rig.databases).transaction(SHARD, timeout_s=None) as tx:
            tx.lock()
            stored = tx.find([user])[user]
            tx.update([UserRow(user, stored.slot, 1, aged(80))])
            evaluate_again(tx, np.array([stored.slot]), np.array([user]))
            noted.set()
            assert commit.wait(30)

    with ThreadPoolExecutor(1) as thread:
        changing = thread.submit(change)
        assert noted.wait(30)
        # A later transaction is committed and noted before it, so a position that is only a number would be beyond it.
        override(rig, USERS[700], Effect.INCLUDE)
        with held(rig, arm, failpoint_dir, operation):
            commit.set()
            changing.result()

    assert user in members_by_rule(rig, rule)
    assert rig.installation.members(segment_id) == members_by_rule(rig, rule)


# -- what waits -----------------------------------------------------------------------------------------------------


def test_events_go_on_while_a_condition_is_evaluated(rig: Rig, monkeypatch: pytest.MonkeyPatch) -> None:
    segment_id = rig.create()
    rule = Rule(100_000, ADULT)
    operation = roll_out(rig, rule)
    asked, answer = threading.Event(), threading.Event()
    ask = PostgresShardTransaction.condition_slots

    def slow(self: PostgresShardTransaction, *args: object) -> object:
        found = ask(self, *args)  # type: ignore[arg-type]
        asked.set()
        assert answer.wait(30)
        return found

    monkeypatch.setattr(PostgresShardTransaction, "condition_slots", slow)
    with ThreadPoolExecutor(1) as thread:
        task = thread.submit(rig.prepare, operation, SHARD)
        assert asked.wait(30)

        # Each of these waits for the shard's lock for 0.3 s at most.
        apply(rig, UpdateUser(3, 1, aged(44)), CreateUser(6000, aged(44)))
        override(rig, 9, Effect.INCLUDE)
        locks = rig.installation.execute(
            SHARD, "SELECT mode FROM pg_locks WHERE locktype = 'advisory' AND objid = :key", key=SHARD_LOCK
        )
        answer.set()
        task.result()

    assert locks == []
    rig.settle()
    assert rig.installation.members(segment_id) == members_by_rule(rig, rule)


def test_a_long_evaluation_shows_that_it_goes_on(rig: Rig, monkeypatch: pytest.MonkeyPatch) -> None:
    """Recovery takes a silent task for lost: it would send more and more tasks that do the same work."""
    monkeypatch.setattr(shard_work, "CONDITION_BLOCKS_FIRST", 1)
    monkeypatch.setattr(shard_work, "CONDITION_S", 1e-9)
    rig.create()
    operation = roll_out(rig, Rule(100_000, ADULT))
    reports: list[ShardProgress] = []
    rig.coordinator.prepare_shard(operation.id, SHARD, reports.append)
    assert len([report for report in reports if report.blocks_done == 0]) >= 2, "one for each of the shard's blocks"
    rig.settle()


def test_all_bits_are_right_after_rollouts_in_a_storm_of_events(rig: Rig, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(shard_work, "AGAIN_S", 0.0)
    monkeypatch.setattr(shard_work, "SLOTS_AT_ONCE", 7)
    segments = {slug: rig.create(slug) for slug in ("one", "two")}
    rules: dict[str, Rule] = {}
    over = threading.Event()

    def storm(seed: int) -> int:
        rng = random.Random(seed)
        applied = 0
        while not over.is_set():
            version = 1_000_000 * seed + applied
            user = rng.choice(USERS)
            events: list[UserEvent] = [
                UpdateUser(user, version, aged(rng.randrange(10, 30))),
                CreateUser(9000 + 3 * rng.randrange(1000), aged(rng.randrange(10, 30))),
            ]
            if rng.random() < 0.2:
                events.append(DeleteUser(rng.choice(USERS)))
            # A rollout keeps them out while its shards are prepared: the sender tries again.
            eventually(lambda events=events: in_time(lambda: apply(rig, *events)))
            applied += 1
        return applied

    def in_time(step: Callable[[], None]) -> bool:
        with suppress(LockTimeout):
            step()
            return True
        return False

    with ThreadPoolExecutor(2) as threads:
        storms = [threads.submit(storm, seed) for seed in (1, 2)]
        try:
            for n in range(8):
                slug = ("one", "two")[n % 2]
                rules[slug] = Rule(20_000 * (1 + n % 5), ADULT if n % 3 else "")
                operation = roll_out(rig, rules[slug], slug)
                eventually(lambda: in_time(rig.settle))
                assert rig.state(operation) is OperationState.DONE
        finally:
            over.set()
        applied = sum(each.result() for each in storms)

    assert applied
    for slug, segment_id in segments.items():
        assert rig.installation.members(segment_id) == members_by_rule(rig, rules[slug], slug), slug


def test_work_that_was_lost_is_done_again_with_its_condition(rig: Rig, arm: Arm) -> None:
    segment_id = rig.create()
    rule = Rule(70_000, ADULT)
    arm("decided", "fail")
    operation = roll_out(rig, rule)
    rig.deliver()
    assert rig.state(operation) is OperationState.COMMITTED
    rig.coordinator.participants[SHARD].rollback_prepared(rig.coordinator.gid(operation.id, SHARD))
    apply(rig, UpdateUser(3, 1, aged(44)), CreateUser(6000, aged(44)), DeleteUser(12))
    arm("decided", "")

    rig.settle()

    assert rig.state(operation) is OperationState.DONE
    assert rig.installation.members(segment_id) == members_by_rule(rig, rule)
