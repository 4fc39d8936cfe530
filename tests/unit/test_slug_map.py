"""Names of segments: learnt once, never forgotten, and what happens to ids without one."""

from __future__ import annotations

import threading

import pytest

from segsvc.domain.errors import ServiceError, shard_unavailable
from segsvc.services.slug_map import SlugMap


def test_learns_from_the_shard_that_uses_an_id() -> None:
    asked: list[int] = []

    def load(shard: int) -> dict[int, str]:
        asked.append(shard)
        return {5: "five", 6: "a-six"}

    slugs = SlugMap(load, lambda slug: slug.upper().encode())
    assert slugs.unknown([5, 6]) == {5, 6}

    assert slugs.learn(3, [5]) == set()
    assert slugs.learn(2, [6]) == set()
    assert asked == [3]
    assert slugs.encoded == {5: b"FIVE", 6: b"A-SIX"}
    assert slugs.in_slug_order([5, 6]) == [6, 5]
    assert slugs.slug(6) == "a-six"


def test_never_forgets() -> None:
    shards = [{1: "one"}, {2: "two"}]
    slugs = SlugMap(shards.__getitem__)
    slugs.learn(0, [1])
    slugs.learn(1, [2])
    assert slugs.unknown([1, 2]) == set()


def test_many_threads_load_once() -> None:
    loads: list[int] = []
    gate = threading.Event()

    def load(shard: int) -> dict[int, str]:
        loads.append(shard)
        gate.wait(20)
        return {1: "one"}

    slugs = SlugMap(load)
    threads = [threading.Thread(target=slugs.learn, args=(0, [1])) for _ in range(8)]
    for thread in threads:
        thread.start()
    gate.set()
    for thread in threads:
        thread.join(20)

    assert loads == [0]


def test_shard_that_hangs_keeps_no_other_from_being_learnt() -> None:
    gate = threading.Event()

    def load(shard: int) -> dict[int, str]:
        if shard == 0:
            gate.wait(10)
        return {shard + 1: f"s{shard}"}

    slugs = SlugMap(load)
    hanging = threading.Thread(target=slugs.learn, args=(0, [1]))
    hanging.start()
    try:
        assert slugs.learn(1, [2]) == set()
    finally:
        gate.set()
        hanging.join(20)


def test_segment_deleted_between_read_and_name_leads_to_a_new_read() -> None:
    reads = iter([[1, 2], [1]])
    slugs = SlugMap(lambda _: {1: "one"})
    assert slugs.read_named(0, lambda: next(reads), lambda ids: ids) == ([1], set())


def test_bits_without_a_segment_are_left_out_in_the_end() -> None:
    slugs = SlugMap(lambda _: {1: "one"})
    assert slugs.read_named(0, lambda: [1, 2], lambda ids: ids) == ([1, 2], {2})


def test_unreachable_shard_is_an_error() -> None:
    def load(shard: int) -> dict[int, str]:
        raise shard_unavailable(shard)

    with pytest.raises(ServiceError):
        SlugMap(load).learn(0, [1])
