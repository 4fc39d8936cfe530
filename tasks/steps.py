"""Our parts in a worker's main process, beside Celery's own: its pulse, and the watchdog over its end."""

from __future__ import annotations

from collections.abc import Iterable
from typing import Any, Final

from billiard.process import active_children
from celery import Celery, bootsteps
from celery.signals import task_rejected, task_unknown, worker_shutdown, worker_shutting_down
from celery.worker.control import inspect_command

from tasks import watchdog
from tasks.broker import pulse, refused

HEALTH_COMMAND: Final = "segsvc_health"
_ROUND_EVERY_S: Final = 1.0


def _children() -> Iterable[int]:
    """Process ids of the worker's pool."""
    return [child.pid for child in active_children() if child.pid is not None]


class PulseStep(bootsteps.StartStopStep):
    """Notes each round of the consumer's loop, as long as it is connected."""

    requires = ("celery.worker.consumer.tasks:Tasks",)

    def register_with_event_loop(self, consumer: Any, hub: Any) -> None:
        """The loop begins. Celery removes all timers, this one too, when the connection is lost."""
        pulse.begins()
        hub.timer.call_repeatedly(_ROUND_EVERY_S, self._note_round, (consumer,))

    @staticmethod
    def _note_round(consumer: Any) -> None:
        pulse.went_round(has_room=consumer.task_consumer.channel.qos.can_consume())

    def start(self, parent: Any) -> None:
        """Connected; the loop is next."""

    def stop(self, parent: Any) -> None:
        """The connection is lost, or the worker ends."""
        pulse.waits("the broker cannot be reached, or the worker ends")

    terminate = stop


class WatchdogStep(bootsteps.StartStopStep):
    """Runs the watchdog, and notifies it when the worker begins to end, for any reason."""

    def __init__(self, parent: Any, **kwargs: Any) -> None:
        super().__init__(parent, **kwargs)
        self.watchdog = watchdog.Watchdog(
            pulse, children=_children, end_within_s=watchdog.END_WITHIN_S, still_max_s=watchdog.STILL_MAX_S
        )

    def start(self, parent: Any) -> None:
        """Start the thread in the main process, which forks: children do not inherit threads."""
        # These signals also come when a worker ends without Celery's ``close``, because it has not come up.
        for ends in (worker_shutting_down, worker_shutdown):
            ends.connect(self._process_ends, weak=False)
        self.watchdog.start()

    def close(self, parent: Any) -> None:
        """Called first when a worker ends, also after an unrecoverable error."""
        self.watchdog.process_ends()

    def _process_ends(self, **_: Any) -> None:
        self.watchdog.process_ends()

    def stop(self, parent: Any) -> None:
        """The watchdog ends last, with the process."""


@task_unknown.connect
def _unknown(name: object = "", **_: Any) -> None:
    refused("unknown", "a worker", "this release has no such task", task=str(name)[:100])


@task_rejected.connect
def _rejected(**_: Any) -> None:
    refused("failed", "a worker", "no task could be made of it")


@inspect_command(name=HEALTH_COMMAND)
def _health(_state: Any) -> dict[str, str | None]:
    """Answers ``segsvc doctor``. A worker that answers may still take no messages, so it reports its pulse."""
    return {"complaint": pulse.complaint()}


def add_to(app: Celery) -> None:
    """Make the workers of this application run these parts."""
    app.steps["worker"].add(WatchdogStep)
    app.steps["consumer"].add(PulseStep)
