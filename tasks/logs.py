"""What workers and beat log: the request that caused the work; tasks that run every few seconds are left out."""

from __future__ import annotations

import logging
from typing import Any, Final

import structlog
from celery.signals import task_postrun, task_prerun

from segsvc.log import Demote

REQUEST_ID_HEADER: Final = "x-request-id"
"""Header of a message: the id of the call that caused it, as in the front's log."""

PERIODIC: Final = ("segsvc.maintain", "segsvc.warm_")
"""How the names of periodic tasks begin: these come every few seconds, whether there is work or not."""


def caused_by() -> dict[str, str]:
    """Headers for messages that are sent now: the request id of the current call or task; empty if there is none."""
    request_id = structlog.contextvars.get_contextvars().get("request_id")
    return {} if request_id is None else {REQUEST_ID_HEADER: str(request_id)}


def be_quiet_about_periodic_tasks() -> None:
    """Log the successful runs of periodic tasks at DEBUG. Called in every process of Celery."""
    for name in ("celery.worker.strategy", "celery.app.trace"):
        _filter_once(name, Demote(_task_of, PERIODIC))
    _filter_once("celery.worker.request", Demote(_discarded, PERIODIC))
    _filter_once("celery.beat", Demote(_sent_by_beat, PERIODIC))


def _filter_once(name: str, demote: Demote) -> None:
    logger = logging.getLogger(name)
    if not any(isinstance(there, Demote) for there in logger.filters):
        logger.addFilter(demote)


def _task_of(record: logging.LogRecord) -> Any:
    data = getattr(record, "data", None)
    return data.get("name") if isinstance(data, dict) else None


def _sent_by_beat(record: logging.LogRecord) -> Any:
    """The task of `Scheduler: Sending due task %s (%s)`."""
    return record.args[1] if isinstance(record.args, tuple) and len(record.args) == 2 else None


def _discarded(record: logging.LogRecord) -> Any:
    """The task of `Discarding revoked task: %s[%s]`: the next task of its kind has come meanwhile."""
    return record.args[0] if isinstance(record.args, tuple) and len(record.args) == 2 else None


@task_prerun.connect
def _enter(task: Any = None, **_: Any) -> None:
    request_id = (task.request.headers or {}).get(REQUEST_ID_HEADER)
    if request_id is not None:
        structlog.contextvars.bind_contextvars(request_id=request_id)


@task_postrun.connect
def _leave(**_: Any) -> None:
    structlog.contextvars.unbind_contextvars("request_id")
