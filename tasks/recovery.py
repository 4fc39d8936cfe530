"""Recovery in a place of its own: a thread of beat, which needs neither a worker nor the broker.

As a task it would wait behind others for a worker's process, on a broker that may be away, and it would be dead exactly
when it is needed: when the workers of operations hang.
"""

from __future__ import annotations

import threading
from typing import Final

from segsvc.bootstrap import RecoveryServices
from segsvc.config import Settings
from segsvc.domain.errors import LockTimeout, ServiceError
from segsvc.log import get_logger
from segsvc.metrics import recovery_time
from segsvc.twophase.ports import Dispatcher
from tasks.pulse import Pulse

log = get_logger(__name__)

RUN_MAX_S: Final = 300.0
"""A run that lasts longer than this hangs. One that redoes a shard's lost work takes a few statements of an operation;
one that meets a server which does not answer, a few of their timeouts."""


class Recovery(threading.Thread):
    """Carries on operations that nobody carries on, and ends prepared transactions by the ledger, until ``stop``.

    At once when it starts, then every ``recovery_interval_s``. Several may run, in several beats: the ledger decides.
    """

    def __init__(self, settings: Settings, dispatcher: Dispatcher) -> None:
        super().__init__(name="recovery", daemon=True)
        self.pulse = Pulse(turn_max_s=RUN_MAX_S)
        self._settings = settings
        self._dispatcher = dispatcher
        self._stop_event = threading.Event()

    def run(self) -> None:
        """Thread body."""
        services = RecoveryServices(self._settings, dispatcher=self._dispatcher)
        self.pulse.begins()
        try:
            while not self._stop_event.wait(self._settings.recovery_interval_s if self.pulse.has_turned else 0.0):
                self._look(services)
                self.pulse.turned()
        finally:
            self.pulse.waits("recovery has ended")
            services.close()

    @staticmethod
    def _look(services: RecoveryServices) -> None:
        try:
            services.recover()
            recovery_time.set_to_current_time()
        except ServiceError as error:
            # The next run is two seconds away; whatever could be reached has been looked after.
            log.warning("recovery_incomplete", reason=error.reason.text, **error.metadata)
        except LockTimeout:
            log.warning("recovery_incomplete", reason="LOCK_TIMEOUT")
        except Exception:
            # A fault of ours, perhaps with one operation only: others must not wait for its mend.
            log.exception("recovery_failed")

    def stop(self, timeout_s: float) -> None:
        """Let the run that is under way end, as long as that takes no longer than this."""
        self._stop_event.set()
        self.join(timeout_s)
