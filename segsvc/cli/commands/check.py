"""``segsvc check``: recompute every membership and report each difference."""

from __future__ import annotations

from typing import TYPE_CHECKING, Annotated

import typer

from segsvc.cli.base import FAILED, Json, Refusal, bar, console, in_force, plain, print_json, settings_of_process

if TYPE_CHECKING:
    from segsvc.services.check.report import Report


def check(
    json_output: Json = False,
    without_cache: Annotated[
        bool, typer.Option("--without-cache", help="Do not check the cache, for example when it is down for good.")
    ] = False,
) -> None:
    """Recompute every membership from users, rules and overrides, and compare it with everything that is stored. Prints
    each difference; exit code 1 if there is one. Safe during traffic."""
    from segsvc.bootstrap import Check  # noqa: PLC0415
    from segsvc.cli.startup import verified  # noqa: PLC0415
    from segsvc.domain.errors import ServiceError  # noqa: PLC0415

    settings = in_force(settings_of_process())
    # A check of the wrong databases proves nothing. A database that cannot be reached makes the check fail later.
    verified(settings)
    try:
        service = Check(settings, with_cache=not without_cache)
    except ServiceError as error:
        # The error's own message is written for callers whose change waits.
        text = f"{error.reason.text}: the cache cannot be reached; bring it back, or check without it: --without-cache"
        raise Refusal(text) from error
    try:
        with bar("checking", hidden=json_output) as shown:

            def show_progress(shard: int, done: int, total: int) -> None:
                shown.to(done, total, f"checking shard {shard} of {settings.shard_count}: blocks")

            report = service.checker.run(show_progress)
    finally:
        service.close()

    if json_output:
        print_json(report.to_json())
    else:
        show(report)
    if report.total:
        raise typer.Exit(FAILED)


def show(report: Report) -> None:
    """Print the report for people; the last line is the result."""
    terminal = console()
    for difference in report.differences:
        terminal.print(plain(str(difference)))
    if report.total > len(report.differences):
        terminal.print(f"… and {report.total - len(report.differences):,} more")

    compared = (
        f"{report.users:,} users, {report.segments:,} segments, {report.memberships:,} memberships, "
        f"{report.entries:,} cache entries" + ("" if report.cache_checked else " (not checked)")
    )
    differences = "no difference" if not report.total else f"{report.total:,} differences"
    terminal.print(f"{differences} in {compared} ({report.duration_s:.1f} s)")


def add_to(app: typer.Typer) -> None:
    """Register the command."""
    app.command(epilog="Example: segsvc check --json", rich_help_panel="Health")(check)
