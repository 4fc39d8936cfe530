"""All commands in one tree."""

from __future__ import annotations

import typer

from segsvc.cli import commands_check, commands_demo, commands_doctor, commands_processes, commands_stack
from segsvc.cli import events as events_commands
from segsvc.cli import operations as operations_commands
from segsvc.cli import segments as segments_commands
from segsvc.cli import shards as shards_commands
from segsvc.cli import users as users_commands
from segsvc.cli.base import Commands

PANEL = "Administration"

app = typer.Typer(
    cls=Commands,
    no_args_is_help=True,
    # A traceback of ours is for a bug report; locals could hold secrets.
    pretty_exceptions_enable=False,
    help="segsvc: which segments is this user in? Settings are environment variables SEGSVC_*; see `segsvc config`.",
)
commands_stack.add_to(app)
commands_processes.add_to(app)
commands_check.add_to(app)
commands_doctor.add_to(app)
commands_demo.add_to(app)
app.add_typer(segments_commands.app, name="segments", rich_help_panel=PANEL)
app.add_typer(users_commands.app, name="users", rich_help_panel=PANEL)
app.add_typer(operations_commands.app, name="operations", rich_help_panel=PANEL)
app.add_typer(events_commands.app, name="events", rich_help_panel=PANEL)
app.add_typer(shards_commands.app, name="shards", rich_help_panel=PANEL)
