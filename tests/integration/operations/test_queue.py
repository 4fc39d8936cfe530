"""The queue of operations: it is bounded and fair to the segments, and a rollout may replace waiting ones."""

from __future__ import annotations

from collections.abc import Sequence
from concurrent.futures import ThreadPoolExecutor
from uuid import uuid4

import pytest

from segsvc.domain.errors import Reason, ServiceError
from segsvc.domain.operation import Operation, OperationFilter, OperationState, QueueLimits, RequestKey
from segsvc.domain.segment import Rule
from tests.eventually import eventually
from tests.integration.operations.conftest import Rig, roll_out

S = OperationState


@pytest.fixture
def limits(rig: Rig, monkeypatch: pytest.MonkeyPatch) -> QueueLimits:
    """Five operations may wait, and three of one segment."""
    limits = QueueLimits(5, 3)
    monkeypatch.setattr(rig.ledger, "_queue", limits)
    return limits


def queued(rig: Rig) -> int:
    return int(rig.installation.execute(None, "SELECT count(*) AS n FROM operations WHERE state = 'QUEUED'")[0].n)


def started_in_order(rig: Rig, operations: Sequence[Operation]) -> list[Operation]:
    moments = {one.id: rig.operations.get(one.id).start_time for one in operations}
    assert all(moments.values())
    return sorted(operations, key=lambda one: str(moments[one.id]))


def replace(rig: Rig, threshold: int, request: RequestKey | None = None) -> Operation:
    return rig.acceptance.roll_out("checkout", Rule(threshold), etag="", request=request, replace_queued=True)


def test_a_flood_of_one_segment_is_refused_and_other_segments_are_not(rig: Rig, limits: QueueLimits) -> None:
    rig.create()
    rig.create("other")
    in_flight, *waiting = [roll_out(rig, 1000 + n) for n in range(1 + limits.per_segment)]
    assert rig.state(in_flight) is S.PREPARING

    with pytest.raises(ServiceError) as refused:
        roll_out(rig, 5000)
    assert refused.value.reason is Reason.OVERLOADED
    assert refused.value.metadata == {"limit": "3", "slug": "checkout"}
    assert refused.value.retry_after_s
    with pytest.raises(ServiceError):
        rig.acceptance.delete("checkout", etag="", request=None)

    others = [roll_out(rig, 1000, "other") for _ in range(2)]

    with pytest.raises(ServiceError) as full:
        roll_out(rig, 1000, "other")
    assert full.value.reason is Reason.OVERLOADED
    assert full.value.metadata == {"limit": "5"}
    with pytest.raises(ServiceError) as creation:
        rig.create("third")
    assert creation.value.reason is Reason.OVERLOADED

    rig.settle()
    assert {rig.state(one) for one in (in_flight, *waiting, *others)} == {S.DONE}
    rig.check_invariants()


def test_fronts_that_accept_at_once_do_not_pass_the_bound_together(rig: Rig, limits: QueueLimits) -> None:
    rig.create()
    rig.create("other")
    roll_out(rig, 1000)

    def accept(number: int) -> Reason | None:
        try:
            roll_out(rig, 2000 + number, ("checkout", "other")[number % 2])
        except ServiceError as error:
            return error.reason
        return None

    with ThreadPoolExecutor(16) as fronts:
        refusals = list(fronts.map(accept, range(48)))

    assert set(refusals) == {None, Reason.OVERLOADED}
    assert refusals.count(None) == queued(rig) == limits.all
    rig.settle()


def test_a_repeated_request_is_answered_though_the_queue_is_full(rig: Rig, limits: QueueLimits) -> None:
    rig.create()
    key = RequestKey("/RollOut", uuid4(), b"content")
    roll_out(rig, 1000)
    known = rig.acceptance.roll_out("checkout", Rule(2000), etag="", request=key)
    for _ in range(limits.per_segment - 1):
        roll_out(rig, 3000)
    again = rig.acceptance.roll_out("checkout", Rule(2000), etag="", request=key)
    assert again.id == known.id
    rig.settle()


def test_segments_take_turns(rig: Rig) -> None:
    for slug in ("checkout", "second", "third"):
        rig.create(slug)
    flood = [roll_out(rig, 1000 + n) for n in range(5)]
    second = [roll_out(rig, 1000 + n, "second") for n in range(2)]
    third = [roll_out(rig, 1000, "third")]
    rig.settle()
    order = started_in_order(rig, [*flood, *second, *third])
    assert order == [flood[0], second[0], third[0], flood[1], second[1], flood[2], flood[3], flood[4]]


def test_new_segments_take_turns_with_a_flood(rig: Rig) -> None:
    """New segments were never served, and a creation's caller runs it by itself; both take turns all the same."""
    rig.create()
    flood = [roll_out(rig, 1000 + n) for n in range(4)]

    with ThreadPoolExecutor(1) as caller:
        created = caller.submit(rig.create, "new")
        eventually(lambda: queued(rig) == len(flood))
        while not created.done():
            rig.settle()

    [creation] = rig.operations.list(OperationFilter(slug="new"), page_size=9, before_seq=None)
    # The turn of the second rollout is older than the creation: the rollout was waiting when the creation came.
    assert started_in_order(rig, [creation, *flood]) == [flood[0], flood[1], creation, flood[2], flood[3]]


def test_a_rollout_takes_the_place_of_those_that_wait_only_if_it_asks_for_it(rig: Rig, limits: QueueLimits) -> None:
    segment_id = rig.create()
    rig.create("other")
    in_flight, *waiting = [roll_out(rig, 10_000 * n) for n in range(1, 2 + limits.per_segment)]
    other = roll_out(rig, 10_000, "other")

    ends = [rig.operations.watch_end(one.id) for one in waiting]

    key = RequestKey("/RollOut", uuid4(), b"content")
    newest = replace(rig, 70_000, key)

    for one, end in zip(waiting, ends, strict=True):
        ended = end.result(10)
        assert ended.id == one.id
        assert ended.state is S.ABORTED
        assert ended.failure is not None
        assert ended.failure.reason == "OPERATION_ABORTED"
        assert ended.failure.metadata == {"why": "REPLACED", "operation": newest.name}

    assert rig.state(in_flight) is S.PREPARING
    assert replace(rig, 70_000, key).id == newest.id, "a repetition replaces nothing, itself least of all"

    later = roll_out(rig, 80_000)
    assert rig.state(newest) is S.QUEUED, "one that does not ask waits behind it"

    rig.settle()
    assert [rig.state(one) for one in (in_flight, other, newest, later)] == [S.DONE] * 4
    assert rig.installation.members(segment_id) == rig.expected("checkout", 80_000)
    rig.check_invariants()


def test_deletions_and_other_segments_are_never_replaced(rig: Rig) -> None:
    rig.create()
    rig.create("other")
    roll_out(rig, 1000)
    deletion = rig.acceptance.delete("checkout", etag="", request=None)
    other = roll_out(rig, 1000, "other")
    newest = replace(rig, 2000)
    rig.settle()
    assert [rig.state(one) for one in (deletion, other, newest)] == [S.DONE, S.DONE, S.ABORTED]
    rig.check_invariants()


def test_a_full_queue_refuses_before_anything_is_replaced(rig: Rig, limits: QueueLimits) -> None:
    rig.create()
    for slug in ("a", "b"):
        rig.create(slug)
    roll_out(rig, 1000)
    for slug in ("a", "a", "a", "b", "b"):
        roll_out(rig, 1000, slug)

    with pytest.raises(ServiceError) as refused:
        replace(rig, 2000)
    assert refused.value.reason is Reason.OVERLOADED
    assert queued(rig) == limits.all

    rig.settle()
