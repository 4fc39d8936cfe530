"""A cache and shards that record every step, for the tests of cold reads."""

from __future__ import annotations

import threading
from collections.abc import Callable, Iterator, Sequence
from dataclasses import dataclass, field

import pytest

from segsvc.domain.errors import Reason, ServiceError, cache_unavailable
from segsvc.domain.membership import NEVER_US, Entry, Grant, LoadedUser
from segsvc.services.cold_reads import ColdReads, Limits, Outcome
from segsvc.services.slug_map import SlugMap
from tests.eventually import eventually

WAIT_S = 10.0


@dataclass
class FakeWorld:
    """A cache and shards that record every step, and stop or fail where a test has set it."""

    steps: list[tuple[object, ...]] = field(default_factory=list)
    users: set[int] = field(default_factory=lambda: set(range(1, 1000)))
    version: int = 0
    refused: set[int] = field(default_factory=set)
    cache_down: bool = False
    failures: dict[int, Exception] = field(default_factory=dict)
    hold: dict[int, threading.Event] = field(default_factory=dict)

    def acquire(self, shard: int, user_ids: Sequence[int]) -> Grant:
        self.steps.append(("acquire", shard, tuple(user_ids)))
        if self.cache_down:
            raise cache_unavailable()
        return Grant(b"nonce", b"token", frozenset(user_ids) - self.refused)

    def load(self, shard: int, user_ids: Sequence[int], *, timeout_s: float | None = None) -> list[LoadedUser]:
        version = self.version  # the snapshot
        self.steps.append(("load", shard, tuple(user_ids), timeout_s))
        if shard in self.hold:
            assert self.hold[shard].wait(WAIT_S)
        if shard in self.failures:
            raise self.failures[shard]
        return [LoadedUser(u, 9, version, 123, NEVER_US, (2, 1), epoch=3) for u in user_ids if u in self.users]

    def fill(self, shard: int, grant: Grant, rows: Sequence[tuple[int, Entry]]) -> int:
        self.steps.append(("fill", shard, tuple(user_id for user_id, _ in rows)))
        if self.cache_down:
            raise cache_unavailable()
        return len(rows)

    def release(self, shard: int, grant: Grant, user_ids: Sequence[int]) -> None:
        self.steps.append(("release", shard, tuple(user_ids)))

    def named(self, kind: str) -> list[tuple[object, ...]]:
        return [step for step in self.steps if step[0] == kind]


class Answers:
    def __init__(self) -> None:
        self.all: list[tuple[int, Outcome]] = []

    def __call__(self, user_id: int, outcome: Outcome) -> None:
        self.all.append((user_id, outcome))

    def wait(self, count: int) -> list[tuple[int, Outcome]]:
        eventually(lambda: len(self.all) >= count)
        return self.all

    def reasons(self) -> list[Reason | None]:
        return [outcome.reason if isinstance(outcome, ServiceError) else None for _, outcome in self.all]


@pytest.fixture
def world() -> FakeWorld:
    return FakeWorld()


@pytest.fixture
def answers() -> Answers:
    return Answers()


@pytest.fixture
def make(world: FakeWorld) -> Iterator[Callable[..., ColdReads]]:
    made: list[ColdReads] = []

    def build(**limits: float) -> ColdReads:
        bounds = {"waiting_max": 1000, "threads": 1, "statement_s": 2.0, "stalled_s": 5.0, **limits}
        cold = ColdReads(
            reads=world,
            cache=world,
            slugs=SlugMap(lambda _: {1: "b", 2: "c"}),
            shard_count=4,
            limits=Limits(**bounds),  # type: ignore[arg-type]
        )
        made.append(cold)
        return cold

    yield build
    for event in world.hold.values():
        event.set()
    for cold in made:
        cold.close(WAIT_S)
