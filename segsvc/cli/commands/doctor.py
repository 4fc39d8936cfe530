"""``segsvc doctor``: check whether everything works, and say what to do if not."""

from __future__ import annotations

from typing import TYPE_CHECKING

import typer

from segsvc.cli.base import FAILED, Json, bar, console, in_force, plain, print_json, settings_of_process, wrapped

if TYPE_CHECKING:
    from collections.abc import Mapping, Sequence

    from segsvc.cli.doctor.items import DoctorCheck, Item, Result
    from segsvc.config import Settings


def doctor(json_output: Json = False) -> None:
    """Check every dependency and process, and say what to do about each problem. Exit code 1 if there is one."""
    from segsvc.cli.doctor.items import Result  # noqa: PLC0415

    settings = in_force(settings_of_process())
    results: list[Result] = []
    with bar("checking", hidden=json_output) as shown:
        checks = _checks()
        for number, (name, check) in enumerate(checks.items()):
            shown.to(number, len(checks), f"checking {name}")
            results.append(Result(name, _run(check, settings)))

    if json_output:
        print_json([result.to_json() for result in results])
    else:
        _show(results)
    if not all(result.passed for result in results):
        raise typer.Exit(FAILED)


def _checks() -> Mapping[str, DoctorCheck]:
    """All checks by name. A check comes after the checks of everything that it depends on."""
    from segsvc.cli.doctor import access, doubt, running, storage  # noqa: PLC0415

    return {
        "databases": storage.databases,
        "in doubt": doubt.in_doubt,
        "recovery": storage.recovery,
        "spread of the users": storage.shard_skew,
        "cache": storage.cache,
        "broker": running.broker,
        "Kafka": running.kafka,
        "front": running.front,
        "access": access.access,
        "workers": running.workers,
        "bridge": running.bridge,
        "Flower": running.flower,
    }


def _run(check: DoctorCheck, settings: Settings) -> Sequence[Item]:
    from segsvc.cli.doctor.items import Item  # noqa: PLC0415

    try:
        return check(settings)
    except Exception as error:  # noqa: BLE001  # reported like a problem: it must not hide the results of other checks
        remedy = "first fix the problems above, or correct the settings that it depends on: `segsvc config`"
        return [Item(f"it cannot be checked ({type(error).__name__})", remedy)]


def _show(results: Sequence[Result]) -> None:
    """Print a line for each check, and below it the observations and what to do, as wide as the terminal."""
    terminal = console()
    for result in results:
        terminal.print("✓" if result.passed else "✗", result.name)
        for item in result.items:
            terminal.print(wrapped(plain(item.text), terminal.width, lead="    "))
            if item.remedy:
                terminal.print(wrapped(plain(item.remedy), terminal.width, lead="    → "))

    failed = sum(not result.passed for result in results)
    terminal.print(f"{failed} of {len(results)} checks failed" if failed else "all checks passed")


def add_to(app: typer.Typer) -> None:
    """Register the command."""
    app.command(epilog="Example: segsvc doctor", rich_help_panel="Health")(doctor)
