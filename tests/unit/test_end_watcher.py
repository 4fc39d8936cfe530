"""Waiting for operations to end, on a ledger that can fail."""

from __future__ import annotations

import threading
from collections.abc import Iterator, Sequence
from contextlib import contextmanager
from dataclasses import dataclass
from typing import Any, cast
from uuid import UUID, uuid4

import pytest

from segsvc.domain.errors import catalog_unavailable
from segsvc.domain.operation import Operation
from segsvc.services.end_watcher import OperationEndWatcher
from tests.eventually import eventually


@dataclass(frozen=True)
class Ended:
    id: UUID


class Store:
    """First raises each of its failures, then finds what has ended."""

    def __init__(self, *failures: Exception) -> None:
        self.failures = list(failures)
        self.ended: list[UUID] = []
        self.looks = 0
        self.told = threading.Event()

    @contextmanager
    def listening(self) -> Iterator[Store]:
        yield self

    def final_among(self, operation_ids: Sequence[UUID]) -> Sequence[Operation]:
        self.looks += 1
        if self.failures:
            raise self.failures.pop()
        return [cast(Operation, Ended(each)) for each in operation_ids if each in self.ended]

    def await_end(self, seconds: float) -> None:
        self.told.wait(seconds)
        self.told.clear()


@pytest.fixture
def quick(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(OperationEndWatcher, "_OUTAGE_POLL_S", 0.001)


@pytest.mark.usefixtures("quick")
@pytest.mark.parametrize("failure", [catalog_unavailable(), RuntimeError("a fault of ours")])
def test_waiting_calls_learn_of_the_end_after_a_failure(failure: Exception) -> None:
    store = Store(failure)
    watcher = OperationEndWatcher(store)

    try:
        one, other = uuid4(), uuid4()
        never: Any = watcher.watch(other)
        store.ended.append(one)
        assert watcher.watch(one).result(timeout=20).id == one
        assert not never.done()
    finally:
        watcher.close()

    assert never.cancelled()


def test_a_notified_end_is_read_at_once(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(OperationEndWatcher, "_POLL_S", 60.0)
    store = Store()
    watcher = OperationEndWatcher(store)
    operation = uuid4()
    future = watcher.watch(operation)
    eventually(lambda: store.looks == 1)

    store.ended.append(operation)
    store.told.set()

    assert future.result(timeout=20).id == operation
    store.told.set()  # otherwise the watcher would wait for its minute
    watcher.close()


def test_without_waiting_calls_the_watcher_reads_nothing() -> None:
    store = Store()
    watcher = OperationEndWatcher(store)
    watcher.close()
    assert store.looks == 0
