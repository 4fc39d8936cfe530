"""The periodic upkeep, sent by beat: counts members for lists, and deletes old records."""

from __future__ import annotations

from tasks.app import app, runtime


@app.task(name="segsvc.maintain", ignore_result=True, send_events=False)
def maintain() -> None:
    """Count members for lists again, and delete requests, fences and tombstones that are old enough."""
    runtime().maintenance.run()
