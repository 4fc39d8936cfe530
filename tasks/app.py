"""The Celery application: queues, limits and the allowed kinds of messages. Workers build their services after the
fork."""

from __future__ import annotations

import gc
from typing import Any
from urllib.parse import parse_qs, urlsplit

from celery import Celery
from celery.signals import (
    setup_logging,
    worker_process_init,
    worker_process_shutdown,
    worker_ready,
)

from segsvc.bootstrap import WorkerServices, installation_of, watch_shards
from segsvc.config import Settings, load_settings, mask
from segsvc.domain.errors import ServiceError
from segsvc.domain.installation import Installation
from segsvc.log import configure_logging
from segsvc.postgres.installation.layout import LayoutWatch
from tasks import steps
from tasks.broker import InstallationUnknown, use_our_transport
from tasks.dispatcher import CeleryDispatcher
from tasks.logs import be_quiet_about_periodic_tasks
from tasks.queues import Queue
from tasks.schedule import beat_schedule

TASK_TIME_LIMIT_S = 600
VISIBILITY_TIMEOUT_S = 900
"""Longer than any task may run: otherwise Redis would hand a running task to a second worker. Recovery, the bridge
and beat send again long before, so the work of a killed worker's message does not wait for this."""


def installation(settings: Settings) -> Installation:
    """The installation that this process belongs to: it names the broker's keys and owns our tasks.

    Raises:
        InstallationUnknown: no database could say which one it is.
    """
    try:
        return installation_of(settings)
    except ServiceError as error:
        reason = mask(str(error.__cause__ or error)).splitlines()[0]
        raise InstallationUnknown(f"no database says yet which installation this is: {reason}") from error


class _Prefix:
    """The prefix of all names on the broker: a text that is looked up when it is used. Flower adds the names of queues
    to it; all other code calls it."""

    def __init__(self, settings: Settings) -> None:
        self._settings = settings

    def __call__(self) -> str:
        return installation(self._settings).broker_prefix

    def __add__(self, name: str) -> str:
        return self() + name

    def __repr__(self) -> str:
        # Workers show their configuration to Flower, which must not show a setting's password.
        return "<the installation's prefix>"

    __str__ = __call__


def _verified(url: str) -> str:
    """The broker's URL as Celery wants it: with TLS, it has to say that the server's certificate is verified.

    A URL that says otherwise by itself is left as it is.
    """
    if not url.startswith("rediss://") or "ssl_cert_reqs" in parse_qs(urlsplit(url).query):
        return url
    return f"{url}{'&' if urlsplit(url).query else '?'}ssl_cert_reqs=required"


def celery_config(settings: Settings) -> dict[str, Any]:
    """Celery's configuration, made from the settings."""
    prefix = _Prefix(settings)
    broker_url = _verified(settings.broker_url)
    redis_options = {
        # Looked up when a channel opens: a process may start while no database can be reached yet.
        "global_keyprefix": prefix,
        "installation": lambda: installation(settings).name,
        "visibility_timeout": VISIBILITY_TIMEOUT_S,
        # By default kombu searches for messages of dead workers only about every 100 s.
        "unacked_restore_interval": 5,
        "unacked_restore_throttle": 1,
        "socket_connect_timeout": 1,
        "socket_timeout": 5,
        "socket_keepalive": True,
        "retry_on_timeout": False,
    }
    return {
        "broker_url": broker_url,
        "result_backend": f"tasks.results:UnsubscribedRedisBackend+{broker_url}",
        "broker_connection_retry_on_startup": True,
        "broker_transport_options": redis_options,
        "result_backend_transport_options": {"retry_policy": {"timeout": 5.0}, "global_keyprefix": prefix},
        "redis_socket_connect_timeout": 1,
        "redis_socket_timeout": 5,
        # A message from outside can only be JSON: no format that runs code when it is read.
        "task_serializer": "json",
        "result_serializer": "json",
        "accept_content": ["json"],
        "result_accept_content": ["json"],
        # A task counts as done when its effects are stored: a killed worker's task runs again, since every task is
        # idempotent.
        "task_acks_late": True,
        "task_reject_on_worker_lost": True,
        # With True, a worker killed between storing a result and counting it would hang a chord for ever.
        "worker_deduplicate_successful_tasks": False,
        "worker_prefetch_multiplier": 1,
        "task_time_limit": TASK_TIME_LIMIT_S,
        "task_track_started": True,
        # An hour: nothing reads a result later, and 0 would lose a chord's body.
        "result_expires": 3600,
        "task_default_queue": Queue.OPERATIONS.value,
        "task_routes": {
            "segsvc.apply_events": {"queue": Queue.EVENTS.value},
            "segsvc.warm_*": {"queue": Queue.WARMING.value},
            "segsvc.*": {"queue": Queue.OPERATIONS.value},
        },
        # A publisher soon reports to its caller that the broker is down; the ledger remembers what was to be sent.
        "task_publish_retry_policy": {"max_retries": 1, "interval_start": 0, "interval_step": 0.1, "interval_max": 0.1},
        "worker_send_task_events": True,
        # A task is shown when a worker has it. Events about sent tasks would show every kind, the quiet kinds too.
        "task_send_sent_event": False,
        "worker_hijack_root_logger": False,
        "worker_consumer": "tasks.consumer:Consumer",
        "worker_cancel_long_running_tasks_on_connection_loss": False,
        "beat_schedule": beat_schedule(settings),
        # Beat wakes at least this often, so that its pulse shows whether it lives.
        "beat_max_loop_interval": 5,
        "imports": ("tasks.operations", "tasks.events", "tasks.upkeep", "tasks.warming"),
        "enable_utc": True,
        "timezone": "UTC",
    }


use_our_transport()
app = Celery("segsvc")
# A callable, so that reading the settings waits until something uses the application.
app.add_defaults(lambda: celery_config(load_settings()))


steps.add_to(app)


class _Process:
    """The state of this worker process: empty before the fork."""

    services: WorkerServices | None = None
    watch: LayoutWatch | None = None
    settings: Settings | None = None


def runtime() -> WorkerServices:
    """This worker process's services; built on first use, so always after the fork.

    When the shards have doubled, the next task gets new services. A process runs one task at a time, so none is left
    with the old ones.
    """
    if _Process.watch is None:
        _Process.watch = watch_shards(load_settings(), _leave_shards)
        _Process.watch.start()

    settings = _Process.watch.settings
    if _Process.services is not None and settings is not _Process.settings:
        _Process.services.close()
        _Process.services = None
    if _Process.services is None:
        _Process.services = WorkerServices(settings, sender=CeleryDispatcher(app))
        _Process.settings = settings
    return _Process.services


def _leave_shards(_settings: Settings) -> None:
    """Close the connections that no task uses: a doubling waits until no process has one to the old shards."""
    services = _Process.services
    if services is not None:
        services.databases.close()


@worker_process_init.connect
def _build(**_: Any) -> None:
    """Connect before the first task arrives rather than during it."""
    runtime()
    # Objects that exist by now stay. Each full run of the garbage collector would check them again, and a batch of
    # events makes enough objects for several runs: that was half of the CPU time of a batch.
    gc.freeze()


@worker_ready.connect
def _freeze(**_: Any) -> None:
    """The same for the worker's main process, whose objects also stay from here on."""
    gc.freeze()


@worker_process_shutdown.connect
def _close(**_: Any) -> None:
    if _Process.watch is not None:
        _Process.watch.close()
        _Process.watch = None
    if _Process.services is not None:
        _Process.services.close()
        _Process.services = None


@setup_logging.connect
def _logging(**_: Any) -> None:
    settings = load_settings()
    configure_logging(settings.log_level, settings.log_format)
    be_quiet_about_periodic_tasks()
