"""Two installations on one broker, with workers of both."""

from __future__ import annotations

import json

from segsvc.cli.doctor import running
from tests.integration.broker.conftest import Workplace


def test_a_task_of_another_installation_is_refused_and_its_queues_are_left_alone(workplace: Workplace) -> None:
    theirs = "segsvc:local-0ther000:"
    message = workplace.message("segsvc.finalize", operation_id="x", title="theirs")
    message["headers"]["installation"] = "local-0ther000"

    workplace.client.lpush(f"{theirs}operations", json.dumps(message))
    workplace.client.lpush("operations", json.dumps(message))
    workplace.client.lpush(f"{workplace.prefix}operations", json.dumps(message))

    workplace.worker()

    assert "it is a task of the installation 'local-0ther000'" in workplace.log()
    assert workplace.client.llen(f"{theirs}operations") == workplace.client.llen("operations") == 1
    names = {key.decode() for key in workplace.client.scan_iter()} - {f"{theirs}operations", "operations"}
    assert all(name.startswith(workplace.prefix) for name in names)
    assert f"{workplace.prefix}_kombu.binding.operations" in names


def test_the_doctor_names_other_installations_on_the_broker_and_idle_workers(workplace: Workplace) -> None:
    run = workplace.run_inside
    workplace.client.sadd("segsvc:local-07be4000:_kombu.binding.operations", b"x")
    assert "the installation local-07be4000 uses this server too" in run(running.broker)

    deaf = "import tasks.broker\ntasks.broker.pulse.complaint = lambda: 'it is deaf'\n"
    workplace.worker(code=deaf)

    said = run(running.workers)
    assert "reports a problem: it is deaf" in said
    assert "no worker of operations answers" not in said
    assert "no worker of events answers" in said
