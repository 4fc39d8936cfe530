"""What all commands share: settings, exit codes, errors as one line, tables, JSON, and bars for what takes time."""

from __future__ import annotations

import errno
import json
import os
import sys
import textwrap
import threading
from collections.abc import Iterator
from contextlib import contextmanager
from datetime import UTC, datetime
from typing import TYPE_CHECKING, Annotated, Any, Final

import typer
from typer.core import TyperGroup

from segsvc.domain.errors import LockTimeout, ServiceError

if TYPE_CHECKING:
    from rich.console import Console
    from rich.progress import Progress
    from rich.table import Table

    from segsvc.config import Settings

FAILED: Final = 1
USAGE: Final = 2
"""Exit codes beside 0, done."""

_CANNOT_WRITE: Final = {errno.ENOSPC, errno.EDQUOT, errno.EFBIG, errno.EIO}

BAR_AFTER_S: Final = 1.0
"""What takes longer gets a progress bar; what is quicker only flickers with one."""

Json = Annotated[bool, typer.Option("--json", help="JSON for programs instead of a table for people.")]


class Refusal(Exception):
    """A command was refused or failed. The text goes to standard error as it is, and the exit code is 1."""


class Commands(TyperGroup):
    """The tree of commands; turns the errors that are meant for people into a line and an exit code."""

    def parse_args(self, ctx: Any, args: list[str]) -> list[str]:
        """Read the arguments, of all commands: the tree's root has them first."""
        for argument in args:
            try:
                argument.encode()
            except UnicodeEncodeError:
                # Bytes of another encoding. They could be sent nowhere, and printed neither.
                raise typer.BadParameter("arguments must be UTF-8, one is not") from None
        return super().parse_args(ctx, args)

    def invoke(self, ctx: Any) -> Any:
        """Run the command that the arguments name."""
        try:
            return self._run(ctx)
        except (Refusal, ServiceError) as error:
            complain(str(error))
        except LockTimeout:
            complain("LOCK_TIMEOUT: a shard is locked by an operation; try again in a moment")
        except OSError as error:
            # A closed pipe is left to the library, which ends without a word.
            if error.errno not in _CANNOT_WRITE:
                raise
            complain(f"cannot write: {error.strerror}")
            _forget_output()
        raise typer.Exit(FAILED)

    def _run(self, ctx: Any) -> Any:
        done = super().invoke(ctx)
        # What cannot be written is noticed here, and not by the interpreter on its way out.
        sys.stdout.flush()
        return done


def _forget_output() -> None:
    """Drop what standard output still holds, for the interpreter would try to write it once more."""
    nowhere = os.open(os.devnull, os.O_WRONLY)
    os.dup2(nowhere, sys.stdout.fileno())
    os.close(nowhere)


def complain(text: str) -> None:
    """One line, or a few, on standard error."""
    typer.echo(text, err=True)


def settings_of_process() -> Settings:
    """The settings; a bad one ends the command with exit code 2 and a line that names it."""
    from pydantic import ValidationError  # noqa: PLC0415
    from pydantic_settings import SettingsError  # noqa: PLC0415

    from segsvc.config import load_settings  # noqa: PLC0415

    try:
        return load_settings()
    except ValidationError as error:
        for item in error.errors(include_input=False, include_url=False):
            # A value may be a secret, so it is not repeated.
            name = "SEGSVC_" + str(item["loc"][0]).upper() if item["loc"] else "settings"
            complain(f"{name}: {item['msg'].removeprefix('Value error, ')}")
    except SettingsError as error:
        complain(f"settings: {error}")
    raise typer.Exit(USAGE)


def console(*, err: bool = False) -> Console:
    """The terminal; into a pipe or a file, lines are not wrapped and cells not cut."""
    from rich.console import Console  # noqa: PLC0415

    stream = sys.stderr if err else sys.stdout
    # Texts come from users: what looks like markup in them is not.
    return Console(stderr=err, markup=False, highlight=False, emoji=False, width=None if stream.isatty() else 10_000)


def table(*columns: str, right: tuple[str, ...] = (), whole: tuple[str, ...] = ()) -> Table:
    """An empty table. ``right``: columns of numbers. ``whole``: columns of names to copy, never broken into lines."""
    from rich.table import Table  # noqa: PLC0415

    made = Table(box=None, padding=(0, 2, 0, 0), header_style="bold", pad_edge=False)
    for column in columns:
        made.add_column(
            column, justify="right" if column in right else "left", overflow="fold", no_wrap=column in whole
        )
    return made


def wrapped(text: str, width: int, *, lead: str) -> str:
    """A text in lines of ``width``, the first one after ``lead``, the others below its beginning. Words stay whole."""
    rest = " " * len(lead)
    return textwrap.fill(
        text, width, initial_indent=lead, subsequent_indent=rest, break_long_words=False, break_on_hyphens=False
    )


def plain(text: str) -> str:
    """Text of users without control characters, which could rewrite the terminal."""
    return "".join(character if character.isprintable() else "�" for character in text)


def short_time(when: datetime) -> str:
    """A moment in a table, to the second: 2030-01-31 12:00:00Z."""
    return when.astimezone(UTC).strftime("%Y-%m-%d %H:%M:%SZ")


def print_json(value: object) -> None:
    """One JSON document on standard output."""
    typer.echo(json.dumps(value, indent=2, ensure_ascii=False))


class Bar:
    """A progress bar on standard error that shows itself only if the work takes longer than ``BAR_AFTER_S``.

    Nothing is printed where standard error is no terminal.
    """

    def __init__(self, progress: Progress, title: str) -> None:
        self._progress = progress
        self._task = progress.add_task(title, total=None)

    def to(self, done: int, total: int | None, title: str | None = None) -> None:
        """Move the bar. ``total`` None: the end is not known."""
        self._progress.update(self._task, completed=done, total=total, description=title)


@contextmanager
def bar(title: str, *, hidden: bool = False) -> Iterator[Bar]:
    """A progress bar for as long as the block lasts."""
    from rich.progress import BarColumn, MofNCompleteColumn, Progress, TextColumn, TimeElapsedColumn  # noqa: PLC0415

    terminal = console(err=True)
    columns = (TextColumn("{task.description}"), BarColumn(), MofNCompleteColumn(), TimeElapsedColumn())
    progress = Progress(*columns, console=terminal, transient=True, disable=hidden or not terminal.is_terminal)
    timer = threading.Timer(BAR_AFTER_S, progress.start)
    timer.daemon = True
    timer.start()
    try:
        yield Bar(progress, title)
    finally:
        timer.cancel()
        timer.join()
        progress.stop()
