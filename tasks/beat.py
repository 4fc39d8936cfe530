"""The process ``segsvc beat``: recovery on a thread of its own, and Celery's beat, which sends tasks that are due."""

from __future__ import annotations

from typing import Any, Final

from celery.beat import Scheduler

from segsvc.config import Settings
from tasks import watchdog
from tasks.app import app
from tasks.dispatcher import CeleryDispatcher
from tasks.pulse import Pulse
from tasks.recovery import Recovery

_STOP_S: Final = 20.0
"""How long a run of recovery may go on when the process ends; the next beat does the rest."""

_pulse: Final = Pulse()


class PulsingScheduler(Scheduler):
    """Celery's scheduler, in memory: every entry is due again within seconds anyway, and a schedule file can be torn
    by a kill."""

    def tick(self, *args: Any, **kwargs: Any) -> float:
        """Send the tasks that are due. Returns the seconds until the next call."""
        left_s: float = super().tick(*args, **kwargs)
        _pulse.went_round()
        return left_s


class Beat:
    """Runs recovery and Celery's beat until SIGTERM or SIGINT."""

    def __init__(self, settings: Settings) -> None:
        self._recovery = Recovery(settings, CeleryDispatcher(app))
        self._log_level = settings.log_level

    def health(self) -> str | None:
        """What is wrong with this process; None: nothing."""
        if complaint := self._recovery.pulse.complaint():
            return f"recovery: {complaint}"
        if complaint := _pulse.complaint():
            return f"beat: {complaint}"
        return None

    def run(self) -> None:
        """Run until a signal comes; then end within a bounded time."""
        watched = watchdog.Watchdog(
            self._recovery.pulse, _pulse, end_within_s=watchdog.END_WITHIN_S, still_max_s=watchdog.STILL_MAX_S
        )
        watched.start()
        self._recovery.start()

        _pulse.begins()
        scheduler = f"--scheduler={PulsingScheduler.__module__}:{PulsingScheduler.__name__}"
        try:
            app.start(argv=["beat", scheduler, "--pidfile=", f"--loglevel={self._log_level}"])
        finally:
            watched.process_ends()
            self._recovery.stop(_STOP_S)
