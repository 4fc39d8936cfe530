"""The demonstration on an existing installation, and the code that both kinds of demonstration share.

This module does not need the packages of a local stack: the image of docker/ does not contain them.
"""

from __future__ import annotations

import time
from collections.abc import Callable
from pathlib import Path

import grpc

from segsvc.bootstrap import Inspection
from segsvc.config import Settings
from segsvc.demo.client import OperationFailed
from segsvc.demo.screen import Screen, StepFailed
from segsvc.demo.story import Story


class DemoRefused(Exception):
    """The demonstration cannot run on this installation; the message says why."""


def run_on(settings: Settings, users: int, *, report: Path) -> bool:
    """Run the demonstration on an installation that is running and has no users. Its failpoint folder must be shared by
    this process and the operations worker. Returns True if every step found what it expected.

    Raises:
        DemoRefused: the installation has no such folder, or it has users.
        ServiceError: SHARD_UNAVAILABLE.
    """
    if settings.failpoint_dir is None:
        raise DemoRefused("the demonstration holds a worker at a failpoint: set SEGSVC_FAILPOINT_DIR for both")

    inspection = Inspection(settings)
    try:
        user_count = inspection.user_count()
    finally:
        inspection.close()
    if user_count:
        raise DemoRefused(f"the demonstration needs an installation without users; this one has {user_count:,}")

    screen = Screen()
    started = time.monotonic()
    screen.console.print(f"[bold]segsvc[/bold]: {users:,} users, on the installation {settings.cluster!r}")

    run_story(settings, users, screen, lambda: screen.note("look at the logs of the processes"))
    screen.write(report)
    summarise(screen, time.monotonic() - started, report)
    return screen.all_ok


def run_story(settings: Settings, users: int, screen: Screen, explain: Callable[[], None]) -> None:
    """Run the story. After a failure, call ``explain``, which shows where to look."""
    story = Story(settings, users, screen)
    try:
        story.run()
    except StepFailed:
        explain()
    except (grpc.RpcError, OperationFailed) as error:
        screen.console.print(f"[red]{error}[/red]", markup=True)
        explain()
    finally:
        story.close()


def summarise(screen: Screen, seconds: float, written: Path) -> None:
    """Print how many steps found what they expected, and which steps did not."""
    failed = [report for report in screen.reports if not report.ok]
    screen.chapter("Summary")
    if failed:
        screen.note(f"[red]{len(failed)} of {len(screen.reports)} steps failed[/red] in {seconds:.0f} s:")
        for report in failed:
            screen.note(f"  {report.step}: expected {report.expected}; {report.actual}")
    else:
        screen.note(f"[green]all {len(screen.reports)} steps as expected[/green] in {seconds:.0f} s")
    screen.note(f"report: {written}")
