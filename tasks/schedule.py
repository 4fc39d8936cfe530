"""What beat sends, and how often."""

from __future__ import annotations

from typing import Any

from segsvc.config import Settings

MAINTENANCE_INTERVAL_S = 60.0


def beat_schedule(settings: Settings) -> dict[str, dict[str, Any]]:
    """Beat's entries. Each message expires when the next one is due, so that after a busy or stopped time a worker
    finds one message of each kind waiting, not many."""

    def entry(task: str, interval_s: float) -> dict[str, Any]:
        return {"task": task, "schedule": interval_s, "options": {"expires": interval_s}}

    return {
        "maintain": entry("segsvc.maintain", MAINTENANCE_INTERVAL_S),
        "warm": entry("segsvc.warm_all", settings.warm_interval_s),
    }
