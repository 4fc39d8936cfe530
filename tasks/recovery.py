"""What beat runs so that nothing stays undone: recovery of operations, recounts, and forgetting what is old."""

from __future__ import annotations

from celery.signals import worker_ready

from segsvc.domain.errors import ServiceError
from segsvc.log import get_logger
from segsvc.metrics import recovery_time
from tasks.app import app, runtime

log = get_logger(__name__)


@app.task(name="segsvc.recover", ignore_result=True)
def recover() -> None:
    """Carry on operations that nobody carries on, and end prepared transactions by the ledger."""
    try:
        runtime().coordinator.recover()
        runtime().maintenance.note_recovery()
        recovery_time.set_to_current_time()
    except ServiceError as error:
        # The next run is two seconds away; whatever could be reached has been looked after.
        log.warning("recovery_incomplete", reason=error.reason.text, **error.metadata)


@app.task(name="segsvc.maintain", ignore_result=True)
def maintain() -> None:
    """Count members for lists again, and forget requests, fences and tombstones that are old enough."""
    runtime().maintenance.run()


@worker_ready.connect
def _recover_at_start(sender: object, **_: object) -> None:
    """A worker that starts may be the one that comes back after all died: recovery does not wait for beat."""
    hostname = str(getattr(sender, "hostname", ""))
    if hostname.startswith("operations@"):
        recover.apply_async()
