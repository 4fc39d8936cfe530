"""``segsvc demo``: the main job on real components, each claim checked."""

from __future__ import annotations

from pathlib import Path
from typing import Annotated, Final

import typer

from segsvc.cli.base import FAILED, Refusal, settings_of_process
from segsvc.cli.local_stack import local_stack_available

USERS_MIN: Final = 2000
USERS_MAX: Final = 10_000_000


def demo(
    users: Annotated[
        int, typer.Option(min=USERS_MIN, max=USERS_MAX, envvar="USERS", help="How many users arrive.")
    ] = 200_000,
    keep: Annotated[bool, typer.Option("--keep", envvar="KEEP", help="Leave the stack running afterwards.")] = False,
    replace: Annotated[
        bool, typer.Option("--replace", envvar="REPLACE", help="First delete the existing stack with its data.")
    ] = False,
    running: Annotated[
        bool, typer.Option("--running", help="Start no stack: use the empty installation that the settings name.")
    ] = False,
    report: Annotated[Path, typer.Option(help="Where the report is written.")] = Path("build/demo-report.json"),
) -> None:
    """Start a stack, run the main job on it, check every claim, and write a report."""
    from segsvc.cli.front import is_serving  # noqa: PLC0415
    from segsvc.demo.running import DemoRefused, run_on  # noqa: PLC0415

    settings = settings_of_process()
    try:
        if running:
            all_ok = run_on(settings, users, report=report)
        else:
            with local_stack_available():
                from segsvc.demo.run import run_demo  # noqa: PLC0415

                all_ok = run_demo(
                    users,
                    keep=keep,
                    replace=replace,
                    stack_dir=settings.stack_dir,
                    ready=is_serving,
                    report=report,
                )
    except DemoRefused as error:
        raise Refusal(str(error)) from error
    if not all_ok:
        raise typer.Exit(FAILED)


def add_to(app: typer.Typer) -> None:
    """Register the command."""
    app.command(epilog="Example: segsvc demo --users 50000 --keep", rich_help_panel="Installation")(demo)
