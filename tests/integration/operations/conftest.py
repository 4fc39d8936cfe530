"""The commit protocol on real PostgreSQL; the test itself delivers the messages."""

from __future__ import annotations

from collections.abc import Callable, Iterator, Sequence
from dataclasses import replace
from pathlib import Path

import pytest

from segsvc.bootstrap import OperationParts, make_rule_costs
from segsvc.domain.bucketing import bucket
from segsvc.domain.errors import cache_unavailable
from segsvc.domain.operation import Operation, OperationState, ShardProgress
from segsvc.domain.patch import Patch
from segsvc.domain.segment import Rule, SegmentText
from segsvc.failpoints import FailpointError
from segsvc.fan_out import ThreadFanOut
from segsvc.local.postgres import PostgresServer
from segsvc.postgres.engine import Databases, Pool
from segsvc.services.acceptance import Acceptance
from segsvc.services.creations import Creations
from segsvc.services.end_watcher import OperationEndWatcher
from segsvc.services.operations import OperationService
from segsvc.twophase.ports import Published
from tests.installation import Installation, new_installation

USERS = range(1, 6001)
SHARDS = 3


class Messages:
    """A dispatcher whose messages the test delivers, loses or delivers twice."""

    def __init__(self) -> None:
        self.sent: list[tuple[Operation, list[int]]] = []

    def dispatch(self, operation: Operation, shards: Sequence[int]) -> None:
        self.sent.append((operation, list(shards)))

    def check(self) -> None:
        """The broker is always reachable."""


class Generations:
    """Remembers which patches were published, and which generations were dropped."""

    entries_gone_after_s = 3600.0

    def __init__(self) -> None:
        self.written: list[tuple[int, Patch]] = []
        self.published: list[int] = []
        """Shards of the patches that were appended."""
        self.dropped: list[int] = []
        self.error: Exception | None = None
        self.away: set[int] = set()
        """Shards whose cache is out of reach."""
        self.full = False
        """No memory for patches."""

    def _answer(self, shards: Sequence[int]) -> None:
        if self.error is not None:
            raise self.error
        if not self.away.isdisjoint(shards):
            raise cache_unavailable()

    def write_patch(self, shard: int, patch: Patch) -> bytes:
        self._answer([shard])
        if self.full:
            raise cache_unavailable()
        self.written.append((shard, patch))
        return b"token"

    def append_patch(self, shard: int, patch: Patch, token: bytes) -> Published:
        self._answer([shard])
        self.published.append(shard)
        return Published.APPENDED

    def drop_generations(self, shards: Sequence[int]) -> None:
        self._answer(shards)
        self.dropped += shards


class Rig:
    """The protocol as one process has it, with methods to drive it."""

    def __init__(self, installation: Installation, databases: Databases) -> None:
        self.installation = installation
        self.messages = Messages()
        self.cache = Generations()
        self.databases = databases

        self.parts = OperationParts(installation.settings, self.databases, self.cache, self.messages)
        self.ledger = self.parts.ledger
        self.coordinator = self.parts.coordinator
        self.watcher = OperationEndWatcher(self.ledger)

        self._creation_fan_out = ThreadFanOut(installation.shard_count)
        shards = range(installation.shard_count)

        self.operations = OperationService(store=self.ledger, watcher=self.watcher, shards=shards)
        self.acceptance = Acceptance(
            store=self.ledger,
            coordinator=self.coordinator,
            broker=self.messages,
            costs=make_rule_costs(installation.settings, databases),
        )
        self.creations = Creations(
            store=self.ledger,
            acceptance=self.acceptance,
            operations=self.operations,
            coordinator=self.coordinator,
            shards=shards,
            fan_out=self._creation_fan_out,
        )

    def close(self) -> None:
        self.watcher.close()
        self._creation_fan_out.close()
        self.parts.fan_out.close()

    def prepare(self, operation: Operation, shard: int) -> None:
        self.coordinator.prepare_shard(operation.id, shard, _ignore)

    def deliver(self) -> None:
        """Run the sent messages in order. A failpoint's failure loses the rest of its message and ends the run."""

        while self.messages.sent:
            operation, shards = self.messages.sent.pop(0)
            try:
                for shard in shards:
                    self.prepare(operation, shard)
                self.coordinator.finalize(operation.id)
            except FailpointError:
                return

    def settle(self) -> None:
        """Recover and deliver until nothing is open."""
        for _ in range(50):
            self.coordinator.recover()
            self.deliver()
            if not self.ledger.open_operations():
                return
        raise AssertionError(f"still open: {self.ledger.open_operations()}")

    def state(self, operation: Operation) -> OperationState:
        return self.operations.get(operation.id).state

    def create(self, slug: str = "checkout") -> int:
        """Create a segment. Returns its id."""
        return self.creations.create_segment(slug, SegmentText(), request=None, deadline_s=10).id

    def expected(self, slug: str, threshold: int) -> set[int]:
        """Members by the published hash."""
        segment = self.ledger.segment(slug)
        assert segment is not None
        return {user for user in USERS if bucket(user, segment.salt) < threshold}

    def check_invariants(self) -> None:
        """An operation has fences on all shards if COMMITTED or DONE, else on none; nothing is prepared."""
        shards = range(self.installation.shard_count)
        fences = [
            {row.operation_id for row in self.installation.execute(s, "SELECT operation_id FROM applied_operations")}
            for s in shards
        ]

        operations = self.installation.execute(None, "SELECT id, state FROM operations")
        for row in operations:
            fenced = [row.id in on_shard for on_shard in fences]
            assert all(fenced) if row.state in ("COMMITTED", "DONE") else not any(fenced), (row, fenced)

        assert [self.installation.prepared(shard) for shard in shards] == [[]] * len(shards)

        segments = self.installation.execute(None, "SELECT id, rule_threshold FROM segments WHERE state <> 0")
        for shard in shards:
            copies = self.installation.execute(shard, "SELECT id, rule_threshold FROM segments")
            assert sorted(map(tuple, copies)) == sorted(map(tuple, segments))


def roll_out(rig: Rig, threshold: int, slug: str = "checkout") -> Operation:
    return rig.acceptance.roll_out(slug, Rule(threshold), etag="", request=None)


def _ignore(_: ShardProgress) -> None:
    pass


@pytest.fixture
def failpoint_dir(tmp_path: Path) -> Path:
    folder = tmp_path / "failpoints"
    folder.mkdir()
    return folder


@pytest.fixture
def arm(failpoint_dir: Path) -> Callable[[str, str], None]:
    """Arm a failpoint: ``arm("voted", "fail shard=1")``; an empty action disarms it."""

    def set_action(point: str, action: str) -> None:
        if action:
            (failpoint_dir / point).write_text(action)
        else:
            (failpoint_dir / point).unlink()

    return set_action


@pytest.fixture(scope="module")
def installation_with_users(pg_server: PostgresServer) -> Iterator[Installation]:
    """An installation with the users of all tests of a module: no operation changes them."""
    with new_installation(
        pg_server,
        shards=SHARDS,
        # Recovery need not wait for quiet, so that the test controls its steps.
        redispatch_quiet_s=0.001,
        operation_deadline_s=30,
        lock_timeout_s=0.3,
    ) as made:
        made.add_users(USERS)
        before = made.users_digest()
        yield made
        assert made.users_digest() == before


@pytest.fixture(scope="module")
def databases(installation_with_users: Installation) -> Iterator[Databases]:
    made = Databases(installation_with_users.settings, "test", Pool(6))
    yield made
    made.close()


@pytest.fixture
def installation(installation_with_users: Installation, failpoint_dir: Path) -> Iterator[Installation]:
    """An installation with users and nothing else, and with the test's own failpoints."""
    settings = installation_with_users.settings.model_copy(update={"failpoint_dir": failpoint_dir})
    yield replace(installation_with_users, settings=settings)

    left = installation_with_users.roll_back_prepared()
    installation_with_users.forget_operations()
    assert not left, f"left prepared: {left}"


@pytest.fixture
def rig(installation: Installation, databases: Databases) -> Iterator[Rig]:
    made = Rig(installation, databases)
    yield made
    made.close()
