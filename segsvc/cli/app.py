"""All commands in one tree."""

from __future__ import annotations

import typer

from segsvc.cli.base import Commands
from segsvc.cli.commands import check, demo, doctor, processes, stack
from segsvc.cli.commands import events as events_commands
from segsvc.cli.commands import operations as operations_commands
from segsvc.cli.commands import segments as segments_commands
from segsvc.cli.commands import shards as shards_commands
from segsvc.cli.commands import users as users_commands

PANEL = "Administration"

app = typer.Typer(
    cls=Commands,
    no_args_is_help=True,
    # A traceback is for a bug report, and typer's shows local variables, which could hold secrets.
    pretty_exceptions_enable=False,
    help="segsvc: which segments is this user in? Settings are environment variables SEGSVC_*; see `segsvc config`.",
)
stack.add_to(app)
processes.add_to(app)
check.add_to(app)
doctor.add_to(app)
demo.add_to(app)
app.add_typer(segments_commands.app, name="segments", rich_help_panel=PANEL)
app.add_typer(users_commands.app, name="users", rich_help_panel=PANEL)
app.add_typer(operations_commands.app, name="operations", rich_help_panel=PANEL)
app.add_typer(events_commands.app, name="events", rich_help_panel=PANEL)
app.add_typer(shards_commands.app, name="shards", rich_help_panel=PANEL)
