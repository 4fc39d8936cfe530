"""Applies messages from the standard input as the bridge and a worker do, and prints the outcomes.

It is a process of its own, so that ``test_extending`` can run it on a changed copy of the project.
"""

from __future__ import annotations

import json
import sys
from collections.abc import Sequence
from typing import Any

import segsvc
from segsvc.bootstrap import FrontServices, WorkerServices
from segsvc.config import Settings
from segsvc.domain.errors import ServiceError
from segsvc.domain.events import TOPICS, BadEvent, from_wire, parse, to_wire
from segsvc.domain.operation import Operation
from segsvc.domain.sharding import shard_of
from segsvc.local import kafka


class NoTasks:
    """A sender for a script that changes no segment."""

    def dispatch(self, operation: Operation, shards: Sequence[int]) -> None:
        raise AssertionError("no operation is started")

    def check(self) -> None:
        raise AssertionError("no operation is accepted")


def main() -> None:
    job: dict[str, Any] = json.load(sys.stdin)
    settings = Settings(_env_file=None, **job["settings"])

    worker = WorkerServices(settings, sender=NoTasks())
    front = FrontServices(settings, sender=NoTasks())

    outcomes: list[dict[str, Any]] = []
    try:
        for topic, text in job["messages"]:
            try:
                event = parse(topic, text.encode())
            except BadEvent as bad:
                outcomes.append({"refused": bad.reason})
                continue

            # The event takes the same form as through the broker.
            report = worker.ingestion.apply_batch(
                shard_of(event.user_id, settings.shard_count), from_wire(to_wire([event]))
            )
            try:
                user = front.users.get(event.user_id)
            except ServiceError as error:
                outcomes.append({"applied": report.applied, "error": error.reason.text})
            else:
                outcomes.append(
                    {"applied": report.applied, "version": user.version, "attributes": dict(user.attributes)}
                )
    finally:
        front.close()
        worker.close()

    json.dump(
        {
            "outcomes": outcomes,
            "code": segsvc.__file__,
            "topics": list(TOPICS),
            "local_topics": list(kafka.TOPICS),
        },
        sys.stdout,
    )


if __name__ == "__main__":
    main()
