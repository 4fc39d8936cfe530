"""``segsvc up | down | status | migrate | config``: the local stack, the schema, the settings."""

from __future__ import annotations

from typing import Annotated, Any, Final

import typer

from segsvc.cli.base import FAILED, Json, Refusal, bar, complain, console, print_json, settings_of_process, table

PANEL: Final = "Installation"


def up() -> None:
    """Start the whole stack on this machine: servers, migrations, all processes. Changes nothing if it is up."""
    from segsvc.cli.front import is_serving  # noqa: PLC0415
    from segsvc.local.processes import LocalStackError  # noqa: PLC0415
    from segsvc.local.stack import LocalStack  # noqa: PLC0415
    from segsvc.local.stack_env import metrics_addresses  # noqa: PLC0415

    settings_of_process()
    try:
        settings = LocalStack(say=complain, ready=is_serving).up()
    except LocalStackError as error:
        raise Refusal(str(error)) from error
    shown = table("what", "where")
    shown.add_row("gRPC", settings.grpc_address)
    shown.add_row("Flower", f"http://{settings.flower_address} ({settings.flower_user}, {settings.flower_password})")
    for process, address in metrics_addresses(settings).items():
        shown.add_row(f"metrics, {process}", f"http://{address}/metrics")
    shown.add_row("settings", str(settings.stack_dir / "stack.env"))
    console().print(shown)


def down(purge: Annotated[bool, typer.Option("--purge", help="Delete its data as well.")] = False) -> None:
    """Stop the whole stack on this machine. The data stays, unless told otherwise."""
    from segsvc.local.processes import LocalStackError  # noqa: PLC0415
    from segsvc.local.stack import LocalStack  # noqa: PLC0415

    settings_of_process()
    try:
        LocalStack(say=complain).down(purge=purge)
    except LocalStackError as error:
        raise Refusal(str(error)) from error


def status(json_output: Json = False) -> None:
    """Show every server and process of the stack on this machine. Exit code 1 unless all of them run."""
    from segsvc.local.stack import LocalStack  # noqa: PLC0415

    settings_of_process()
    parts = LocalStack(say=complain).status()
    if json_output:
        print_json([{"name": part.name, "state": part.state, "pid": part.pid, "log": str(part.log)} for part in parts])
    else:
        shown = table("name", "state", "pid", "log", right=("pid",))
        for part in parts:
            shown.add_row(part.name, part.state, str(part.pid or ""), str(part.log))
        console().print(shown)
    if any(part.state != "RUNNING" for part in parts):
        raise typer.Exit(FAILED)


def migrate(json_output: Json = False) -> None:
    """Bring the catalog and every shard to the newest schema; set up an installation that is new."""
    from segsvc.postgres.migrate import Migrated, MigrationError  # noqa: PLC0415
    from segsvc.postgres.migrate import migrate as run  # noqa: PLC0415

    settings = settings_of_process()
    with bar("migrating", hidden=json_output) as shown_bar:

        def tell(step: Migrated) -> None:
            shown_bar.to(step.number, step.total, f"migrated {step.where}")

        try:
            done = run(settings, tell)
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
    settings = settings_of_process()
    masked = settings.masked()
    if json_output:
        print_json(masked)
        return
    shown = table("setting", "value", "what it is")
    for name, field in type(settings).model_fields.items():
        variable = f"SEGSVC_{name.upper()}"
        shown.add_row(variable, _text(masked[variable]), field.description or "")
    console().print(shown)


def _text(value: Any) -> str:
    if isinstance(value, list):
        return " ".join(map(str, value))
    return "" if value is None else str(value)


def add_to(app: typer.Typer) -> None:
    """Register the commands."""
    for command, example in (
        (up, "segsvc up"),
        (down, "segsvc down --purge"),
        (status, "segsvc status"),
        (migrate, "segsvc migrate"),
        (config, "segsvc config --json"),
    ):
        app.command(epilog=f"Example: {example}", rich_help_panel=PANEL)(command)
