"""What all commands share: settings, exit codes, errors as one line, tables, JSON, and progress bars."""

from __future__ import annotations

import errno
import functools
import inspect
import json
import os
import sys
import textwrap
import threading
import traceback
from collections.abc import Callable, Iterator
from contextlib import contextmanager
from contextvars import ContextVar
from datetime import UTC, datetime
from typing import TYPE_CHECKING, Annotated, Any, Final, TypeVar, get_type_hints

import typer
from typer.core import TyperGroup

from segsvc.cli.streams import discard_output, is_unicode, reader_is_gone
from segsvc.domain.errors import LockTimeout, ServiceError

if TYPE_CHECKING:
    from rich.console import Console
    from rich.progress import Progress
    from rich.table import Table

    from segsvc.config import Settings

FAILED: Final = 1
USAGE: Final = 2
CLOSED_PIPE: Final = 141
"""Exit codes other than 0 (done). ``CLOSED_PIPE`` is what shells report for a program whose reader has closed the pipe,
as ``head`` does."""

_CANNOT_WRITE: Final = {errno.ENOSPC, errno.EDQUOT, errno.EFBIG, errno.EIO, errno.EBADF}

BAR_AFTER_S: Final = 1.0
"""Work that takes longer gets a progress bar; for quicker work a bar would only flicker."""

Json = Annotated[bool, typer.Option("--json", help="JSON for programs instead of a table for people.")]


Function = TypeVar("Function", bound=Callable[..., Any])


class Refusal(Exception):
    """A command was refused or failed. The text goes to standard error as it is, and the exit code is 1."""


class Commands(TyperGroup):
    """The tree of commands; turns each error into a line and an exit code."""

    def main(self, *args: Any, **more: Any) -> Any:
        """Run the command line."""
        try:
            return super().main(*args, **more)
        except OSError as error:
            # Raised by help, a wrong argument or shell completion: `invoke` catches only what a command raises.
            _report(error)
            sys.exit(FAILED)

    def parse_args(self, ctx: Any, args: list[str]) -> list[str]:
        """Read the arguments of all commands: the root of the tree receives them first."""
        for argument in args:
            try:
                argument.encode()
            except UnicodeEncodeError:
                # Bytes of another encoding. They could neither be sent nor printed.
                raise typer.BadParameter("arguments must be UTF-8, one is not") from None
        return super().parse_args(ctx, args)

    def invoke(self, ctx: Any) -> Any:
        """Run the command that the arguments name."""
        try:
            return self._run(ctx)
        except BrokenPipeError as error:
            if reader_is_gone(sys.stdout) or reader_is_gone(sys.stderr):
                # The reader has what it wants. The exit code says that not all was written, as with other programs.
                discard_output(sys.stdout)
                raise typer.Exit(CLOSED_PIPE) from None
            _report(error)
        except Exception as error:
            if _is_usage(error):
                raise
            _report(error)
        raise typer.Exit(FAILED)

    def _run(self, ctx: Any) -> Any:
        try:
            return super().invoke(ctx)
        finally:
            # A write that fails is noticed here, not by the interpreter when it exits.
            sys.stdout.flush()


def _is_usage(error: Exception) -> bool:
    """Whether the library itself turns the error into a message or an exit code."""
    return isinstance(error, typer.Exit | typer.Abort | EOFError) or hasattr(error, "exit_code")


def _report(error: Exception) -> None:
    """Print in one line which error ended a command."""
    if isinstance(error, Refusal | ServiceError):
        complain(str(error))
    elif isinstance(error, LockTimeout):
        complain("LOCK_TIMEOUT: a shard is locked by an operation; try again in a moment")
    elif isinstance(error, OSError) and error.errno in _CANNOT_WRITE and error.filename is None:
        complain(f"cannot write: {error.strerror}")
        discard_output(sys.stdout)
    elif isinstance(error, OSError) and error.filename is not None:
        complain(f"{os.fsdecode(error.filename)}: {error.strerror}")
    elif isinstance(error, FileNotFoundError):
        # The only file without a name is the working folder.
        complain("the working folder no longer exists")
    else:
        _report_unexpected(error)


def _report_unexpected(error: Exception) -> None:
    """Print an error that no command expects: a bug. Its traceback is for a bug report: only on request."""
    from segsvc.config import mask  # noqa: PLC0415

    message = mask(plain(str(error).partition("\n")[0]))
    if os.environ.get("SEGSVC_LOG_LEVEL", "").upper() == "DEBUG":
        complain("".join(traceback.format_exception(error)).rstrip())
    complain(f"failed: {type(error).__name__}: {message} (SEGSVC_LOG_LEVEL=DEBUG shows where)")


class _ComplaintLog:
    """Where this process writes its complaints; None: to standard error."""

    write: Callable[[str, str], None] | None = None


def log_complaints(write: Callable[[str, str], None]) -> None:
    """From now on write complaints, with their level, to the log of this process, whose lines may have to be JSON."""
    _ComplaintLog.write = write


def complain(text: str, level: str = "error") -> None:
    """Print one line, or a few, on standard error. ``level``: of the log event, where complaints go to the log."""
    if _ComplaintLog.write is not None:
        _ComplaintLog.write(text, level)
        return
    try:
        print(text, file=sys.stderr, flush=True)
    except OSError:
        # Standard error cannot be written. The exit code still says that the command failed.
        discard_output(sys.stderr)


_timeout_s: ContextVar[float | None] = ContextVar("timeout_s", default=None)

Timeout = Annotated[
    float | None,
    typer.Option(
        "--timeout",
        min=0.001,
        max=86_400,
        help="Seconds that one call to the front may take; it does not limit the wait for an operation.",
        show_default="SEGSVC_CLIENT_TIMEOUT_S",
    ),
]


class FrontCommands(typer.Typer):
    """Commands that talk to the front: each of them gets the option ``--timeout``."""

    def command(self, *args: Any, **more: Any) -> Callable[[Function], Function]:
        """Register a command."""
        register = super().command(*args, **more)

        def with_timeout(function: Function) -> Function:
            @functools.wraps(function)
            def run(*given: Any, timeout: float | None = None, **named: Any) -> Any:
                token = _timeout_s.set(timeout)
                try:
                    return function(*given, **named)
                finally:
                    _timeout_s.reset(token)

            # Typer reads the options from signature and annotations.
            signature = inspect.signature(function, eval_str=True)
            option = inspect.Parameter("timeout", inspect.Parameter.KEYWORD_ONLY, default=None, annotation=Timeout)
            run.__signature__ = signature.replace(  # type: ignore[attr-defined]
                parameters=[*signature.parameters.values(), option]
            )
            run.__annotations__ = {**get_type_hints(function, include_extras=True), "timeout": Timeout}

            register(run)
            return function

        return with_timeout


def settings_of_process() -> Settings:
    """The settings. A bad one ends the command with exit code 2 and a line that names it; unknown ones are reported."""
    from pydantic import ValidationError  # noqa: PLC0415
    from pydantic_settings import SettingsError  # noqa: PLC0415

    from segsvc.config import load_settings, unknown_settings  # noqa: PLC0415

    timeout_s = _timeout_s.get()
    try:
        settings = load_settings(**({} if timeout_s is None else {"client_timeout_s": timeout_s}))
        for name, nearest in unknown_settings().items():
            advice = f"; do you mean {nearest}?" if nearest else ", and does nothing"
            complain(f"{name} is not a setting{advice}", "warning")
    except ValidationError as error:
        for item in error.errors(include_input=False, include_url=False):
            # A value may be a secret, so it is not printed.
            name = "SEGSVC_" + str(item["loc"][0]).upper() if item["loc"] else "settings"
            complain(f"{name}: {item['msg'].removeprefix('Value error, ')}")
    except SettingsError as error:
        complain(f"settings: {error}")
    except UnicodeDecodeError:
        complain("settings: the file of SEGSVC_ENV_FILE, or one of SEGSVC_SECRETS_DIR, is not UTF-8")
    except OSError as error:
        complain(f"settings: {error.filename}: {error.strerror}")
    else:
        return settings
    raise typer.Exit(USAGE)


def in_force(settings: Settings) -> Settings:
    """These settings with the shards that the catalog says are in force: see ``segsvc shards double``."""
    if not settings.shard_dsns_next:
        return settings  # and nothing is imported for the commands that only call the front
    from segsvc.postgres.installation import layout  # noqa: PLC0415

    return layout.in_force(settings)


def console(*, err: bool = False) -> Console:
    """The terminal. In a pipe or a file, lines are not wrapped and cells are not cut."""
    from segsvc.cli.tables import Terminal  # noqa: PLC0415

    stream = sys.stderr if err else sys.stdout
    return Terminal(
        stderr=err,
        # Texts come from users: do not interpret them as markup.
        markup=False,
        highlight=False,
        emoji=False,
        # The terminal itself wraps lines: then a name that spans two of them can be copied whole.
        soft_wrap=not err,
        width=None if stream.isatty() else 10_000,
    )


def table(*columns: str, right: tuple[str, ...] = (), whole: tuple[str, ...] = ()) -> Table:
    """An empty table. ``right``: columns of numbers. ``whole``: columns whose cells stay on one line.

    Where the terminal is too narrow for them, each row becomes several lines.
    """
    from segsvc.cli.tables import Listing  # noqa: PLC0415

    return Listing(columns, right=right, whole=whole)


def wrapped(text: str, width: int, *, lead: str) -> str:
    """Wrap a text at ``width``. Words stay whole. The first line starts with ``lead``, the rest is indented as far."""
    indent = " " * len(lead)
    return textwrap.fill(
        text, width, initial_indent=lead, subsequent_indent=indent, break_long_words=False, break_on_hyphens=False
    )


def plain(text: str) -> str:
    """A user's text without control characters, which could rewrite the terminal."""
    return "".join(character if character.isprintable() else "�" for character in text)


def short_time(when: datetime) -> str:
    """A time for a table, to the second: 2030-01-31 12:00:00Z."""
    return when.astimezone(UTC).isoformat(" ", "seconds").replace("+00:00", "Z")


def print_json(value: object) -> None:
    """Print one JSON document on standard output."""
    print(to_json_text(value, indent=2))


def to_json_text(value: object, *, indent: int | None = None) -> str:
    """JSON that standard output can represent, whatever its encoding."""
    return json.dumps(value, indent=indent, ensure_ascii=not is_unicode(sys.stdout))


class Bar:
    """A progress bar on standard error that appears only if the work takes longer than ``BAR_AFTER_S``.

    Nothing is printed where standard error is not a terminal.
    """

    def __init__(self, progress: Progress, title: str) -> None:
        self._progress = progress
        self._task = progress.add_task(title, total=None)

    def to(self, done: int, total: int | None, title: str | None = None) -> None:
        """Move the bar. ``total`` None: the total is not known."""
        self._progress.update(self._task, completed=done, total=total, description=title)


@contextmanager
def bar(title: str, *, hidden: bool = False) -> Iterator[Bar]:
    """Show a progress bar while the block runs."""
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
