"""The demonstration on an installation that is there; and what it shares with the one that starts its own stack.

Nothing here needs the packages of a local stack: the image of docker/ has none of them.
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
    """The installation is not one on which the demonstration can run; the message says why."""


def run_on(settings: Settings, users: int, *, report: Path) -> bool:
    """Run the demonstration on an installation that is there, empty and running, with its failpoints armed by a folder
    that this process and its operations worker share. True if every step found what it expected.

    Raises:
        DemoRefused: it has no such folder, or it has users.
        ServiceError: SHARD_UNAVAILABLE.
    """
    if settings.failpoint_dir is None:
        raise DemoRefused("the demonstration holds a worker at a failpoint: set SEGSVC_FAILPOINT_DIR for both")
    inspection = Inspection(settings)
    try:
        there = inspection.user_count()
    finally:
        inspection.close()
    if there:
        raise DemoRefused(f"the demonstration needs an installation without users; this one has {there:,}")
    screen = Screen()
    started = time.monotonic()
    screen.console.print(f"[bold]segsvc[/bold]: {users:,} users, on the installation {settings.cluster!r}")
    tell_story(settings, users, screen, lambda: screen.note("look at the logs of the processes"))
    screen.write(report)
    summarise(screen, time.monotonic() - started, report)
    return screen.all_ok


def tell_story(settings: Settings, users: int, screen: Screen, explain: Callable[[], None]) -> None:
    """Run the story; what goes wrong ends with an explanation."""
    story = Story(settings, users, screen)
    try:
        story.tell()
    except StepFailed:
        explain()
    except (grpc.RpcError, OperationFailed) as error:
        screen.console.print(f"[red]{error}[/red]", markup=True)
        explain()
    finally:
        story.close()


def summarise(screen: Screen, seconds: float, written: Path) -> None:
    """Say how many steps found what they expected, and which did not."""
    failed = [report for report in screen.reports if not report.ok]
    screen.chapter("Summary")
    if failed:
        screen.note(f"[red]{len(failed)} of {len(screen.reports)} steps failed[/red] in {seconds:.0f} s:")
        for report in failed:
            screen.note(f"  {report.step}: expected {report.expected}; {report.actual}")
    else:
        screen.note(f"[green]all {len(screen.reports)} steps as expected[/green] in {seconds:.0f} s")
    screen.note(f"report: {written}")
