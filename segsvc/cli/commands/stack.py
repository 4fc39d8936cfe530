"""``segsvc up | down | status | migrate | config``: the local stack, the schema, the settings."""

from __future__ import annotations

from pathlib import Path
from typing import Annotated, Any, Final

import typer

from segsvc.cli.base import (
    FAILED,
    Json,
    Refusal,
    bar,
    complain,
    console,
    in_force,
    print_json,
    settings_of_process,
    table,
)
from segsvc.cli.local_stack import local_stack_available

PANEL: Final = "Installation"


def up(json_output: Json = False) -> None:
    """Start the whole stack on this machine: servers, migrations, all processes. Changes nothing if the stack is up."""
    from segsvc.cli.front import is_serving  # noqa: PLC0415

    settings_of_process()
    with local_stack_available():
        from segsvc.local.stack import LocalStack  # noqa: PLC0415
        from segsvc.local.stack_env import metrics_addresses  # noqa: PLC0415

        settings = LocalStack(say=complain, ready=is_serving).up()

    places = {
        "gRPC": settings.grpc_address,
        "Flower": f"http://{settings.flower_address}",
        **{f"metrics, {process}": f"http://{at}/metrics" for process, at in metrics_addresses(settings).items()},
        "settings": str(settings.stack_dir / "stack.env"),
        **({"token": str(settings.token_file)} if settings.token_file else {}),
    }
    if json_output:
        print_json(places)
        return
    places["Flower"] += f" ({settings.flower_user}, {settings.flower_password})"
    shown = table("what", "where", whole=("where",))
    for what, where in places.items():
        shown.add_row(what, where)
    console().print(shown)


def down(purge: Annotated[bool, typer.Option("--purge", help="Also delete its data.")] = False) -> None:
    """Stop the whole stack on this machine. Its data stays unless --purge is given."""
    settings_of_process()
    with local_stack_available():
        from segsvc.local.stack import LocalStack  # noqa: PLC0415

        LocalStack(say=complain).down(purge=purge)


def status(json_output: Json = False) -> None:
    """Show every server and process of the stack on this machine. Exit code 1 unless all of them run."""
    settings_of_process()
    with local_stack_available():
        from segsvc.local.stack import LocalStack  # noqa: PLC0415

        parts = LocalStack(say=complain).status()

    if json_output:
        print_json([{"name": part.name, "state": part.state, "pid": part.pid, "log": str(part.log)} for part in parts])
    else:
        shown = table("name", "state", "pid", "log", right=("pid",), whole=("name", "log"))
        for part in parts:
            shown.add_row(part.name, part.state, str(part.pid or ""), _short(part.log))
        console().print(shown)
    if any(part.state != "RUNNING" for part in parts):
        raise typer.Exit(FAILED)


def migrate(
    roles: Annotated[
        bool, typer.Option("--roles", help="Also make the roles that change and read data, and give them their rights.")
    ] = False,
    json_output: Json = False,
) -> None:
    """Bring the catalog and every shard to the newest schema; set up a new installation."""
    from segsvc.postgres.installation.migrate import Migrated, MigrationError  # noqa: PLC0415
    from segsvc.postgres.installation.migrate import migrate as run  # noqa: PLC0415

    settings = in_force(settings_of_process())
    with bar("migrating", hidden=json_output) as shown_bar:

        def show_progress(step: Migrated) -> None:
            shown_bar.to(step.number, step.total, f"migrated {step.where}")

        try:
            done = run(settings, show_progress, roles=roles)
        except MigrationError as error:
            raise Refusal(str(error)) from error
    if json_output:
        print_json([{"database": step.where, "before": step.before, "after": step.after} for step in done])
        return
    shown = table("database", "before", "now")
    for step in done:
        shown.add_row(step.where, step.before or "new", step.after)
    console().print(shown)


def config(json_output: Json = False) -> None:
    """Show the effective settings, secrets masked."""
    from segsvc.config import descriptions  # noqa: PLC0415

    settings = settings_of_process()
    masked = settings.masked()
    if json_output:
        print_json(masked)
        return
    shown = table("setting", "value", whole=("setting",))
    for variable, about in descriptions().items():
        shown.add_row(variable, _text(masked[variable]))
        shown.add_row("", about, style="dim")
    console().print(shown)


def _short(path: Path) -> str:
    """A path, relative to the working folder where possible."""
    here = Path.cwd()
    return str(path.relative_to(here) if path.is_relative_to(here) else path)


def _text(value: Any) -> str:
    if isinstance(value, list):
        return "\n".join(map(str, value))
    if isinstance(value, bool):
        return str(value).lower()
    return "" if value is None else str(value)


def add_to(app: typer.Typer) -> None:
    """Register the commands."""
    for command, example in (
        (up, "segsvc up"),
        (down, "segsvc down --purge"),
        (status, "segsvc status"),
        (migrate, "segsvc migrate --roles"),
        (config, "segsvc config --json"),
    ):
        app.command(epilog=f"Example: {example}", rich_help_panel=PANEL)(command)
