"""A failure at every point of the protocol, for every kind of operation: recovery ends it on all shards or on none."""

from __future__ import annotations

from collections.abc import Callable

import pytest

from segsvc.domain.operation import OperationState
from segsvc.domain.segment import Rule, SegmentText
from segsvc.failpoints import FailpointError
from tests.integration.operations.conftest import Rig

COMMITTED_AT_LAST = (
    "accepted-not-answered",
    "started",
    "started-not-dispatched",
    "evaluated-not-locked",
    "locked-not-prepared",
    "worked-not-prepared",
    "prepare-answered",
    "prepared-not-voted",
    "vote-not-committed",
    "voted",
    "before-decision",
    "decision-not-committed",
    "decided",
    "before-commit-prepared",
    "after-commit-prepared",
    "committed-not-invalidated",
    "patch-read-not-written",
    "patch-written-not-appended",
    "patch-appended",
    "invalidated-not-done",
    "done-next-not-started",
)
BY_SHARD = {
    "evaluated-not-locked",
    "locked-not-prepared",
    "worked-not-prepared",
    "prepare-answered",
    "prepared-not-voted",
    "vote-not-committed",
    "voted",
    "before-commit-prepared",
    "after-commit-prepared",
    "patch-read-not-written",
    "patch-written-not-appended",
    "patch-appended",
}


CASES = [
    (point, kind)
    for point in COMMITTED_AT_LAST
    for kind in ("create", "roll_out", "delete")
    # The RPC that creates a segment carries the creation out itself: it has no moment between its start and a dispatch.
    if (point, kind) != ("started-not-dispatched", "create")
    # A creation makes no list outdated: there is nothing to publish.
    and not (point.startswith("patch-") and kind == "create")
]


@pytest.mark.parametrize(("point", "kind"), CASES)
def test_a_crash_before_the_end_delays_it(rig: Rig, arm: Callable[[str, str], None], point: str, kind: str) -> None:
    slug = "checkout"
    if kind != "create":
        segment_id = rig.create()
        rig.acceptance.roll_out(slug, Rule(20_000), etag="", request=None)
        rig.deliver()

    arm(point, "fail shard=1" if point in BY_SHARD else "fail")

    try:
        if kind == "create":
            rig.creations.create_segment(slug, SegmentText(), request=None, deadline_s=10)
        elif kind == "roll_out":
            rig.acceptance.roll_out(slug, Rule(60_000), etag="", request=None)
        else:
            rig.acceptance.delete(slug, etag="", request=None)
        rig.deliver()
    except FailpointError:
        pass
    else:
        # The delivery of messages hides the failure, as a dying worker does.
        assert rig.installation.settings.failpoint_dir is not None
        assert (rig.installation.settings.failpoint_dir / f"{point}.fired").exists()

    arm(point, "")
    rig.settle()

    [newest, *_] = rig.installation.execute(None, "SELECT state FROM operations ORDER BY seq DESC")
    assert newest.state == OperationState.DONE.name
    rig.check_invariants()

    if kind == "roll_out":
        assert rig.installation.members(segment_id) == rig.expected(slug, 60_000)
    elif kind == "delete":
        assert rig.installation.members(segment_id) == set()
        assert rig.ledger.segment(slug) is None
    else:
        assert rig.ledger.segment(slug) is not None

    # A second operation succeeds.
    rig.create("second")
    rig.acceptance.roll_out("second", Rule(10_000), etag="", request=None)
    rig.settle()
    rig.check_invariants()


@pytest.mark.parametrize("point", ["before-abort", "aborted-not-rolled-back", "vote-refused"])
def test_a_crash_while_aborting_leaves_nothing_prepared(rig: Rig, arm: Callable[[str, str], None], point: str) -> None:
    segment_id = rig.create()
    operation = rig.acceptance.roll_out("checkout", Rule(60_000), etag="", request=None)
    rig.messages.sent.clear()
    rig.prepare(operation, 0)

    if point == "vote-refused":
        arm("prepared-not-voted", "fail")
        with pytest.raises(FailpointError):
            rig.prepare(operation, 1)
        arm("prepared-not-voted", "")
        arm("aborted-not-rolled-back", "fail")
        with pytest.raises(FailpointError):
            rig.acceptance.cancel(operation.id)
        arm("aborted-not-rolled-back", "")
    else:
        arm(point, "fail")
        with pytest.raises(FailpointError):
            rig.acceptance.cancel(operation.id)
        arm(point, "")

    rig.settle()
    state = rig.state(operation)
    assert state is (OperationState.DONE if point == "before-abort" else OperationState.ABORTED)

    expected = rig.expected("checkout", 60_000) if state is OperationState.DONE else set()
    assert rig.installation.members(segment_id) == expected
    rig.check_invariants()
