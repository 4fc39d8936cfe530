"""The counters and measurements of operations."""

from __future__ import annotations

import pytest
from prometheus_client import REGISTRY

from segsvc import metrics
from segsvc.domain.errors import ServiceError, catalog_unavailable
from segsvc.domain.segment import Rule
from segsvc.twophase.ports import IN_DOUBT_STATES
from tests.integration.operations.conftest import SHARDS, Rig, roll_out


def ended() -> dict[tuple[str, str], float]:
    """Operations counted so far, by kind and state."""
    return {
        (sample.labels["kind"], sample.labels["state"]): sample.value
        for metric in metrics.operations_finished.collect()
        for sample in metric.samples
        if sample.name.endswith("_total")
    }


def test_each_operation_that_ends_is_counted_once(rig: Rig) -> None:
    before = ended()
    rig.create()

    segment = rig.ledger.segment("checkout")
    assert segment is not None

    done = rig.acceptance.roll_out("checkout", Rule(1000), etag=segment.etag, request=None)
    rig.acceptance.roll_out("checkout", Rule(2000), etag=segment.etag, request=None)  # aborted when its turn comes
    rig.deliver()

    cancelled = roll_out(rig, 3000)
    rig.prepare(cancelled, 0)
    for _ in range(2):
        rig.acceptance.cancel(cancelled.id)
        rig.coordinator.finalize(done.id)
        rig.coordinator.recover()

    rig.acceptance.delete("checkout", etag="", request=None)
    rig.deliver()

    counted = {label: count - before.get(label, 0) for label, count in ended().items()}
    assert {label: count for label, count in counted.items() if count} == {
        ("CREATE", "DONE"): 1,
        ("ROLL_OUT", "DONE"): 1,
        ("ROLL_OUT", "ABORTED"): 2,
        ("DELETE", "DONE"): 1,
    }


def test_the_age_of_what_is_in_doubt_is_measured_on_each_shard(rig: Rig, monkeypatch: pytest.MonkeyPatch) -> None:
    def ages(state: str) -> list[float | None]:
        name = "segsvc_in_doubt_seconds"
        return [REGISTRY.get_sample_value(name, {"shard": str(shard), "state": state}) for shard in range(SHARDS)]

    def not_ended(state: str) -> float | None:
        return REGISTRY.get_sample_value("segsvc_operations_not_ended_seconds", {"state": state})

    rig.create()
    operation = roll_out(rig, 10_000)
    rig.prepare(operation, 1)
    [age] = [prepared.age_s for prepared in rig.coordinator.participants[1].prepared()]

    rig.messages.sent.clear()
    rig.coordinator.recover()
    measured = ages("PREPARING")
    assert (measured[0], measured[2]) == (0, 0)
    assert measured[1] is not None
    assert measured[1] > age > 0
    assert (not_ended("PREPARING") or 0) > 0
    assert not_ended("COMMITTED") == 0
    assert ages("COMMITTED") == [0, 0, 0]

    # Without the catalog, the operation's state is unknown; the age of the transaction is still known.
    with monkeypatch.context() as without:
        without.setattr(rig.ledger, "states", _out_of_reach)
        with pytest.raises(ServiceError):
            rig.coordinator.recover()
    assert (ages("PREPARING")[1], ages("UNREAD")[0]) == (0, 0)
    assert (ages("UNREAD")[1] or 0) > measured[1]

    rig.settle()
    rig.coordinator.recover()
    assert [ages(state) for state in IN_DOUBT_STATES] == [[0, 0, 0]] * len(IN_DOUBT_STATES)
    assert not_ended("PREPARING") == 0


def _out_of_reach(_: object) -> None:
    raise catalog_unavailable()
