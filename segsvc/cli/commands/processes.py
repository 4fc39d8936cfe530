"""``segsvc serve | worker | beat | bridge | flower``: one process each, until SIGTERM or Ctrl-C."""

from __future__ import annotations

import functools
import os
import tempfile
from collections.abc import Callable, Iterator
from contextlib import ExitStack, contextmanager
from pathlib import Path
from typing import TYPE_CHECKING, Annotated, Any, Final

import typer

from segsvc.cli.base import FAILED, Refusal, in_force, settings_of_process
from tasks.queues import Queue

if TYPE_CHECKING:
    from prometheus_client import CollectorRegistry

    from segsvc.bootstrap import TaskSender
    from segsvc.config import Settings
    from segsvc.metrics_http import Health

PANEL: Final = "Processes"


def serve() -> None:
    """Run the gRPC front."""
    from grpc_api.server import serve as serve_front  # noqa: PLC0415
    from segsvc.cli.startup import start_process  # noqa: PLC0415

    settings = settings_of_process()
    start_process(in_force(settings))
    code = serve_front(settings, make_sender=_sender)
    if code:
        raise typer.Exit(FAILED)


def _sender(_settings: Settings) -> TaskSender:
    # Imported in the forked front process, which then makes its own connections.
    from tasks.app import app  # noqa: PLC0415
    from tasks.dispatcher import CeleryDispatcher  # noqa: PLC0415

    return CeleryDispatcher(app)


FLOWER_COLUMNS: Final = "name,kwargs,state,result,received,started,runtime,worker,uuid"
"""Columns of Flower's list of tasks. The columns that distinguish one rollout from another come first."""
WARMING_NICENESS: Final = 15
"""No caller waits for the warmer. On a machine that it shares with a front, reads that miss the cache go first."""


def worker(queue: Annotated[Queue, typer.Option(help="The queue that the worker works on.")]) -> None:
    """Run the Celery worker of one queue."""
    from segsvc.cli.startup import start_process  # noqa: PLC0415

    settings = settings_of_process()
    processes, metrics_address = {
        Queue.OPERATIONS: (settings.operation_worker_processes, settings.operation_worker_metrics_address),
        Queue.EVENTS: (settings.event_worker_processes, settings.event_worker_metrics_address),
        Queue.WARMING: (settings.warming_worker_processes, settings.warming_worker_metrics_address),
    }[queue]
    if queue is Queue.WARMING:
        os.nice(WARMING_NICENESS)
    with _worker_metrics(settings, metrics_address, queue):
        start_process(in_force(settings))
        _celery(
            "worker",
            f"--queues={queue.value}",
            f"--hostname={queue.value}@%h",
            f"--concurrency={processes}",
            # Workers need nothing from each other: their shared state is in the ledger.
            "--without-mingle",
            "--without-gossip",
            # Flower needs them.
            "--task-events",
            f"--loglevel={settings.log_level}",
        )


@contextmanager
def _worker_metrics(settings: Settings, address: str, queue: Queue) -> Iterator[None]:
    """Serve the sum of the metrics of a worker and its children while the block runs.

    The processes keep their metrics in files of a new folder; in a local stack, it lies in the stack's folder.
    ``prometheus_client`` must not have been imported before: where it keeps values is decided by its import.

    Raises:
        Refusal: the address cannot be used.
    """
    if not address:
        yield
        return
    parent = settings.stack_dir if settings.stack_dir.is_dir() else None
    with tempfile.TemporaryDirectory(prefix="segsvc-metrics-", dir=parent, ignore_cleanup_errors=True) as folder:
        os.environ["PROMETHEUS_MULTIPROC_DIR"] = folder
        from segsvc.metrics_http import all_processes  # noqa: PLC0415
        from tasks.broker import pulse  # noqa: PLC0415

        with _serving(settings, address, queue.value, pulse.complaint, all_processes(Path(folder))):
            yield


@contextmanager
def _serving(
    settings: Settings, address: str, role: str, health: Health, registry: CollectorRegistry | None = None
) -> Iterator[None]:
    """Serve metrics and health of a role while the block runs. ``registry`` None: metrics of this process.

    Raises:
        Refusal: the address cannot be used.
    """
    from segsvc.metrics_http import MetricsAddressError, of_role, serving  # noqa: PLC0415

    with ExitStack() as stack:
        try:
            served = of_role(role, registry)
            stack.enter_context(serving(address, served, health=health, token=settings.metrics_token))
        except MetricsAddressError as error:
            raise Refusal(str(error)) from error
        yield


def beat() -> None:
    """Run recovery, and Celery beat, which sends warming and upkeep on time. One is enough; a second does no harm."""
    from segsvc.cli.startup import start_process  # noqa: PLC0415

    settings = settings_of_process()
    start_process(in_force(settings))
    from tasks.beat import Beat  # noqa: PLC0415

    process = Beat(settings)
    with _serving(settings, settings.beat_metrics_address, "beat", process.health):
        process.run()


def bridge() -> None:
    """Run the bridge from Kafka to the workers."""
    from segsvc.bridge.bridge import pulse, run_bridge  # noqa: PLC0415
    from segsvc.cli.startup import start_process  # noqa: PLC0415

    settings = settings_of_process()
    with _serving(settings, settings.bridge_metrics_address, "bridge", pulse.complaint):
        start_process(in_force(settings))
        run_bridge(settings)


def flower() -> None:
    """Run Flower, which shows workers, tasks and the progress of operations."""
    from segsvc.log import configure_logging  # noqa: PLC0415

    settings = settings_of_process()
    configure_logging(settings.log_level, settings.log_format)
    os.environ.update(flower_environment(settings))
    # Imported only now: a refusal does not need Flower.
    from tasks.flower_app import close_it  # noqa: PLC0415

    close_it()
    _celery("flower")


def flower_environment(settings: Settings) -> dict[str, str]:
    """Flower's options as environment variables: command-line arguments can be read by every user of the machine.

    Raises:
        Refusal: the password is missing, or Flower does not support it.
    """
    if not settings.flower_password:
        raise Refusal("SEGSVC_FLOWER_PASSWORD is empty: Flower can start and stop workers, so it needs a password")
    if "," in settings.flower_user + settings.flower_password or ":" in settings.flower_user:
        raise Refusal("SEGSVC_FLOWER_USER and SEGSVC_FLOWER_PASSWORD must not contain a comma, nor the user a colon")
    host, _, port = settings.flower_address.rpartition(":")
    if not port.isdigit():
        raise Refusal(f"SEGSVC_FLOWER_ADDRESS must be host:port, is {settings.flower_address!r}")
    environment = {
        "FLOWER_BASIC_AUTH": f"{settings.flower_user}:{settings.flower_password}",
        "FLOWER_ADDRESS": host.strip("[]"),
        "FLOWER_PORT": port,
        "FLOWER_TASKS_COLUMNS": FLOWER_COLUMNS,
    }
    if settings.flower_db is not None:
        environment |= {"FLOWER_PERSISTENT": "true", "FLOWER_DB": str(settings.flower_db)}
    return environment


def _celery(*arguments: str) -> None:
    """Run a command of Celery in this process, on our application."""
    from tasks.app import app  # noqa: PLC0415

    # Without its banner, which is not a log line.
    app.start(argv=["--quiet", *arguments])


def _with_process_logging(command: Callable[..., None]) -> Callable[..., None]:
    """The command, with all its output in the form of its log."""

    @functools.wraps(command)
    def run(**given: Any) -> None:
        from segsvc.cli.startup import start_process_logging  # noqa: PLC0415

        start_process_logging()
        command(**given)

    return run


def add_to(app: typer.Typer) -> None:
    """Register the commands."""
    for command, example in (
        (serve, "segsvc serve"),
        (worker, "segsvc worker --queue operations"),
        (beat, "segsvc beat"),
        (bridge, "segsvc bridge"),
        (flower, "SEGSVC_FLOWER_PASSWORD=… segsvc flower"),
    ):
        app.command(epilog=f"Example: {example}", rich_help_panel=PANEL)(_with_process_logging(command))
