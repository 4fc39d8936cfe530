"""``segsvc doctor``: is everything there and well, and if not, what to do?"""

from __future__ import annotations

from typing import TYPE_CHECKING

import typer

from segsvc.cli.base import FAILED, Json, bar, console, plain, print_json, settings_of_process, wrapped

if TYPE_CHECKING:
    from collections.abc import Mapping, Sequence

    from segsvc.cli.doctor.items import Examination, Item, Result
    from segsvc.config import Settings


def doctor(json_output: Json = False) -> None:
    """Look at every dependency and process, and say what to do for each thing that is not well. Exit code 1 then."""
    from segsvc.cli.doctor.items import Result  # noqa: PLC0415

    settings = settings_of_process()
    results: list[Result] = []
    with bar("looking", hidden=json_output) as shown:
        examinations = _examinations()
        for number, (name, examine) in enumerate(examinations.items()):
            shown.to(number, len(examinations), f"looking at {name}")
            results.append(Result(name, _seen(examine, settings)))
    if json_output:
        print_json([result.to_json() for result in results])
    else:
        _show(results)
    if not all(result.well for result in results):
        raise typer.Exit(FAILED)


def _examinations() -> Mapping[str, Examination]:
    """What is looked at, in the order in which things depend on each other."""
    from segsvc.cli.doctor import doubt, running, storage  # noqa: PLC0415

    return {
        "databases": storage.databases,
        "in doubt": doubt.in_doubt,
        "recovery": storage.recovery,
        "spread of the users": storage.shard_skew,
        "cache": storage.cache,
        "broker": running.broker,
        "Kafka": running.kafka,
        "front": running.front,
        "workers": running.workers,
        "bridge": running.bridge,
        "Flower": running.flower,
    }


def _seen(examine: Examination, settings: Settings) -> Sequence[Item]:
    from segsvc.cli.doctor.items import Item  # noqa: PLC0415

    try:
        return examine(settings)
    except Exception as error:  # noqa: BLE001  # told like the rest: it must not hide what the others find
        remedy = "correct what is named above it first, or the settings that it depends on: `segsvc config`"
        return [Item(f"it cannot be looked at ({type(error).__name__})", remedy)]


def _show(results: Sequence[Result]) -> None:
    """A line for each examination, and below it what was seen and what to do, in sentences as wide as the terminal."""
    terminal = console()
    for result in results:
        terminal.print("✓" if result.well else "✗", result.name)
        for item in result.items:
            terminal.print(wrapped(plain(item.text), terminal.width, lead="    "))
            if item.remedy:
                terminal.print(wrapped(plain(item.remedy), terminal.width, lead="    → "))
    ill = sum(not result.well for result in results)
    terminal.print(f"{ill} of {len(results)} are not well" if ill else "all is well")


def add_to(app: typer.Typer) -> None:
    """Register the command."""
    app.command(epilog="Example: segsvc doctor", rich_help_panel="Health")(doctor)
