"""The broker forgets everything, delivers messages twice, or delivers a message whose task runs; all workers die."""

from __future__ import annotations

import json

import pytest
import redis

from tests.eventually import eventually
from tests.infrastructure.system import ALONE, SHARDS, System

EVERYWHERE = set(range(SHARDS))
PHASES = {
    "started-not-dispatched": "hold",
    "worked-not-prepared": f"hold shard={ALONE}",
    "prepared-not-voted": f"hold shard={ALONE}",
    "voted": f"hold shard={ALONE}",
    "before-decision": "hold",
    "before-commit-prepared": f"hold shard={ALONE}",
    "committed-not-invalidated": "hold",
    "invalidated-not-done": "hold",
}
"""The points at which a process that works on an operation is held, from its start to its end."""
IN_SHORT = "prepared-not-voted"
START_S = 90.0
"""Time until all processes run again on a busy machine. So long the fault lasts; 30 s later its effects are gone."""


def in_full(*values: object) -> object:
    return pytest.param(*values, marks=pytest.mark.infrastructure)


@pytest.mark.parametrize("workers", ["live", in_full("die")])
@pytest.mark.parametrize("phase", [phase if phase == IN_SHORT else in_full(phase) for phase in PHASES])
def test_the_broker_forgets_everything(system: System, slug: str, phase: str, workers: str) -> None:
    system.new_segment(slug, 20)

    with system.armed(phase, PHASES[phase]) as point:
        name = system.begin(slug, 60)
        point.await_fired()
        system.empty_broker()
        if workers == "die":
            # The messages in the memory of these processes are lost with them.
            system.kill_processes(["serve"] if phase == "started-not-dispatched" else ["worker-operations"])

    eventually(system.workers_answer, START_S)
    eventually(lambda: system.state(name) == "DONE")
    system.expect_well(slug, 60)


@pytest.mark.infrastructure
@pytest.mark.parametrize("phase", ["worked-not-prepared", "prepared-not-voted", "before-commit-prepared"])
def test_the_broker_dies_and_comes_back(system: System, slug: str, phase: str) -> None:
    system.new_segment(slug, 20)
    with system.armed(phase, PHASES[phase]) as point:
        name = system.begin(slug, 60)
        point.await_fired()
        system.broker.kill()
    system.broker.start()
    eventually(lambda: system.state(name) == "DONE")
    system.expect_well(slug, 60)


@pytest.mark.infrastructure
@pytest.mark.parametrize("phase", ["worked-not-prepared", "voted", "before-commit-prepared", "invalidated-not-done"])
def test_all_workers_die(system: System, slug: str, phase: str) -> None:
    system.new_segment(slug, 20)
    with system.armed(phase, PHASES[phase]) as point:
        name = system.client.start_roll_out(slug, 60)
        point.await_fired()
        system.kill_processes()
    eventually(system.workers_answer, START_S)
    eventually(lambda: system.state(name) == "DONE")
    system.expect_well(slug, 60)


def test_messages_come_twice(system: System, slug: str) -> None:
    system.new_segment(slug, 20)

    # A frozen worker takes at most the one message that it was waiting for; the test can copy the remaining messages.
    with system.frozen("worker-operations"), system.frozen("beat"):
        name = system.begin(slug, 60)
        with redis.Redis.from_url(system.broker.url) as broker:
            eventually(lambda: len(of_operation(system, broker, name)) >= SHARDS - 1)
            messages = of_operation(system, broker, name)
            broker.lpush(f"{system.prefix}operations", *messages)

    eventually(lambda: system.state(name) == "DONE")

    # However often the chord's body ran, the operation was decided once.
    [row] = system.execute_catalog(
        "SELECT count(*) AS n FROM audit WHERE operation_id = :id", id=name.removeprefix("operations/")
    )
    assert row.n == 1
    system.expect_well(slug, 60)


def of_operation(system: System, broker: redis.Redis, name: str) -> list[bytes]:
    """Messages of an operation's header that no worker has taken."""
    waiting = broker.lrange(f"{system.prefix}operations", 0, -1)
    assert isinstance(waiting, list)
    return [message for message in waiting if name.removeprefix("operations/") in str(json.loads(message)["headers"])]


HASTY_WORKER = """\
import tasks.app
tasks.app.VISIBILITY_TIMEOUT_S = 1
from segsvc.cli import main
main()
"""


@pytest.mark.infrastructure
def test_a_message_is_handed_out_again_while_its_task_runs(system: System, slug: str) -> None:
    system.new_segment(slug, 20)

    # The hasty worker treats a message as lost if it is not acknowledged within a second. Beat is frozen, because
    # recovery would send the same messages again.
    with system.frozen("beat"), system.armed("prepared-not-voted", f"hold shard={ALONE}") as point:
        name = system.client.start_roll_out(slug, 60)
        point.await_fired()
        with system.another("hasty", ["worker", "--queue", "operations"], code=HASTY_WORKER):
            eventually(lambda: len({fired["pid"] for fired in point.fired()}) > 1, 60)
            point.release()
            eventually(lambda: system.state(name) == "DONE")

    system.expect_well(slug, 60)
