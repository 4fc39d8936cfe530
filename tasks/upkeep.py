"""The upkeep that beat asks for: member counts for lists, and forgetting what is old."""

from __future__ import annotations

from tasks.app import app, runtime


@app.task(name="segsvc.maintain", ignore_result=True, send_events=False)
def maintain() -> None:
    """Count members for lists again, and forget requests, fences and tombstones that are old enough."""
    runtime().maintenance.run()
