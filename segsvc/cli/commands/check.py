"""``segsvc check``: recompute every membership and name each difference."""

from __future__ import annotations

from typing import TYPE_CHECKING, Annotated

import typer

from segsvc.cli.base import FAILED, Json, Refusal, bar, console, plain, print_json, settings_of_process

if TYPE_CHECKING:
    from segsvc.services.check.report import Report


def check(
    json_output: Json = False,
    without_cache: Annotated[
        bool, typer.Option("--without-cache", help="Leave the cache out, when it is down for good.")
    ] = False,
) -> None:
    """Recompute every membership from users, rules and overrides and compare all that is stored. Exit code 1 and each
    difference by name, if there is any. Safe beside traffic."""
    from segsvc.bootstrap import Check  # noqa: PLC0415
    from segsvc.cli.startup import verified  # noqa: PLC0415
    from segsvc.domain.errors import ServiceError  # noqa: PLC0415

    settings = settings_of_process()
    # Nothing is proved of the wrong databases; those out of reach end the check by themselves.
    verified(settings)
    try:
        service = Check(settings, with_cache=not without_cache)
    except ServiceError as error:
        # The error's own sentence is for callers whose change waits.
        text = f"{error.reason.text}: the cache cannot be reached; bring it back, or leave it out: --without-cache"
        raise Refusal(text) from error
    try:
        with bar("checking", hidden=json_output) as shown:

            def tell(shard: int, done: int, total: int) -> None:
                shown.to(done, total, f"checking shard {shard} of {settings.shard_count}: blocks")

            report = service.checker.run(tell)
    finally:
        service.close()
    if json_output:
        print_json(report.to_json())
    else:
        show(report)
    if report.total:
        raise typer.Exit(FAILED)


def show(report: Report) -> None:
    """Print the report for people; the last line says how it ended."""
    terminal = console()
    for difference in report.differences:
        terminal.print(plain(str(difference)))
    if report.total > len(report.differences):
        terminal.print(f"… and {report.total - len(report.differences):,} more")
    compared = (
        f"{report.users:,} users, {report.segments:,} segments, {report.memberships:,} memberships, "
        f"{report.entries:,} cache entries" + ("" if report.cache_checked else " (left out)")
    )
    differences = "no difference" if not report.total else f"{report.total:,} differences"
    terminal.print(f"{differences} in {compared} ({report.duration_s:.1f} s)")


def add_to(app: typer.Typer) -> None:
    """Register the command."""
    app.command(epilog="Example: segsvc check --json", rich_help_panel="Health")(check)
