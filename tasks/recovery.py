"""Recovery runs on a thread of beat, so it needs neither a worker nor the broker.

As a task it would wait behind other tasks for a worker's process, on a broker that may be away, and it would be dead
exactly when it is needed: when the workers of operations hang.
"""

from __future__ import annotations

import threading
from typing import Final

from segsvc.bootstrap import RecoveryServices, watch_shards
from segsvc.config import Settings
from segsvc.domain.errors import LockTimeout, ServiceError
from segsvc.log import get_logger
from segsvc.metrics import recovery_time
from segsvc.twophase.ports import Dispatcher
from tasks.pulse import Pulse

log = get_logger(__name__)

RUN_MAX_S: Final = 300.0
"""A run that lasts longer than this hangs. A run that repeats a shard's lost work takes a few statements of an
operation; a run that meets a server which does not answer takes a few of their timeouts."""


class Recovery(threading.Thread):
    """Continues abandoned operations, and ends prepared transactions as the ledger says, until ``stop``.

    It runs at once when it starts, then every ``recovery_interval_s``. Several beats may each run one: the ledger
    decides.
    """

    def __init__(self, settings: Settings, dispatcher: Dispatcher) -> None:
        super().__init__(name="recovery", daemon=True)
        self.pulse = Pulse(round_max_s=RUN_MAX_S)
        self._settings = settings
        self._dispatcher = dispatcher
        self._stop_event = threading.Event()

    def run(self) -> None:
        """Thread body."""
        watch = watch_shards(self._settings)
        watch.start()
        settings = watch.settings
        services = RecoveryServices(settings, dispatcher=self._dispatcher)
        self.pulse.begins()
        try:
            while not self._stop_event.wait(self._settings.recovery_interval_s if self.pulse.has_gone_round else 0.0):
                if watch.settings is not settings:
                    services.close()
                    settings = watch.settings
                    services = RecoveryServices(settings, dispatcher=self._dispatcher)
                self._look(services)
                self.pulse.went_round()
        finally:
            self.pulse.waits("recovery has ended")
            watch.close()
            services.close()

    @staticmethod
    def _look(services: RecoveryServices) -> None:
        try:
            services.recover()
            recovery_time.set_to_current_time()
        except ServiceError as error:
            # The next run is two seconds away; this run has done all work on servers that could be reached.
            log.warning("recovery_incomplete", reason=error.reason.text, **error.metadata)
        except LockTimeout:
            log.warning("recovery_incomplete", reason="LOCK_TIMEOUT")
        except Exception:
            # A fault of ours, perhaps with one operation only: recovery of the rest must not wait for its repair.
            log.exception("recovery_failed")

    def stop(self, timeout_s: float) -> None:
        """Stop after the run that is under way; wait at most ``timeout_s`` for it."""
        self._stop_event.set()
        self.join(timeout_s)
