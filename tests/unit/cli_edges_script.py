"""Runs every command at an edge, an unusual environment, each in its own process, and reports how each ended.

Each process is forked from one that has loaded the heavy modules: a second for each interpreter would add up to
minutes. A child gets real descriptors, and new streams on them, as an interpreter makes them at its start.

Standard input: pairs of a name of `EDGES` and a command line, as JSON. Standard output: for each pair the exit code,
standard output and standard error, as JSON.
"""

from __future__ import annotations

import importlib
import io
import json
import os
import pty
import sys
import tempfile
import termios
from collections.abc import Callable
from pathlib import Path
from typing import Any, NoReturn

from segsvc.cli import streams
from segsvc.cli.app import app

AT_ONCE = 16
"""Processes that run at the same time: most of them wait for servers that are not there."""

for _module in ("segsvc.cli.following", "segsvc.cli.tables", "segsvc.bootstrap", "typer.rich_utils", "kafka",
                "segsvc.cli.doctor.running", "segsvc.local.stack"):  # fmt: skip
    importlib.import_module(_module)


def streams_in(encoding: str, *, closed: tuple[int, ...] = ()) -> None:
    """The interpreter's streams as they would be with this encoding."""
    for number, name in enumerate(("stdin", "stdout", "stderr")):
        if number in closed:
            os.close(number)
            setattr(sys, name, None)
        elif number:
            setattr(sys, name, io.TextIOWrapper(open(number, "wb", closefd=False), encoding=encoding, errors="strict"))  # noqa: SIM115


def ascii_only() -> None:
    streams_in("ascii")


def full_disk() -> None:
    full = os.open("/dev/full", os.O_WRONLY)
    os.dup2(full, 1)
    streams_in("utf-8")


def no_reader() -> None:
    reader, writer = os.pipe()
    os.close(reader)
    os.dup2(writer, 1)
    streams_in("utf-8")


def no_input() -> None:
    streams_in("utf-8", closed=(0,))


def no_output() -> None:
    streams_in("utf-8", closed=(1,))


def no_error() -> None:
    streams_in("utf-8", closed=(2,))


def full_error() -> None:
    os.dup2(os.open("/dev/full", os.O_WRONLY), 2)
    streams_in("utf-8")


def no_home() -> None:
    for name in ("HOME", "PATH", "USER", "TERM", "TMPDIR"):
        os.environ.pop(name, None)
    # A user that the machine does not know, as in a container, in a folder that no longer exists.
    folder = Path(f"/tmp/segsvc-edges-{os.getpid()}")
    folder.mkdir()
    os.chdir(folder)
    folder.rmdir()
    if os.geteuid() == 0:
        os.setuid(54_321)
    streams_in("utf-8")


def narrow() -> None:
    """A terminal of 40 columns; the parent reads what is written to it."""
    os.environ.update(COLUMNS="40", TERM="xterm", NO_COLOR="1")
    streams_in("utf-8")


def proxies() -> None:
    for name in ("http_proxy", "HTTP_PROXY", "https_proxy", "grpc_proxy", "all_proxy"):
        os.environ[name] = "http://127.0.0.1:9"
    streams_in("utf-8")


EDGES: dict[str, Callable[[], None]] = {
    edge.__name__: edge
    for edge in (
        ascii_only, full_disk, no_reader, no_input, no_output, no_error, full_error, no_home, narrow, proxies
    )
}  # fmt: skip


class Run:
    """One command line that is being run."""

    def __init__(self, edge: str, arguments: list[str]) -> None:
        self._output, output = _terminal() if edge == "narrow" else _file()
        self._error, error = _file()
        self._pid = os.fork()
        if self._pid == 0:
            os.dup2(output, 1)
            os.dup2(error, 2)
            os.dup2(os.open(os.devnull, os.O_RDONLY), 0)
            _be_command(edge, arguments)
        os.close(output)
        os.close(error)

    def end(self) -> dict[str, Any]:
        """Wait for the end of the process. Returns its exit code, output and errors."""
        # A terminal holds little, so it is read before the end; files are read after it.
        shown = _read(self._output) if os.isatty(self._output) else None
        _, status = os.waitpid(self._pid, 0)
        code = os.waitstatus_to_exitcode(status)
        return {"code": code, "stdout": _read(self._output) if shown is None else shown, "stderr": _read(self._error)}


def _be_command(edge: str, arguments: list[str]) -> NoReturn:
    code = 99
    try:
        EDGES[edge]()
        streams.prepare()
        try:
            app(arguments, prog_name="segsvc")
        except SystemExit as end:
            code = end.code if isinstance(end.code, int) else int(end.code is not None)
        except BaseException:  # noqa: BLE001  # reported as the interpreter would report it
            sys.excepthook(*sys.exc_info())
            code = 98

        try:
            # The interpreter flushes at its end too, and ends with the same code if that fails.
            sys.stdout.flush()
            sys.stderr.flush()
        except OSError:
            code = 120
    finally:
        os._exit(code)


def _file() -> tuple[int, int]:
    """A file as two descriptors: one to read from, one to write to."""
    descriptor, name = tempfile.mkstemp()
    reader = os.open(name, os.O_RDONLY)
    Path(name).unlink()
    return reader, descriptor


def _terminal() -> tuple[int, int]:
    """A terminal of 40 columns that leaves what is written unchanged."""
    reader, writer = pty.openpty()
    termios.tcsetwinsize(writer, (24, 40))
    settings = termios.tcgetattr(writer)
    settings[1] &= ~termios.OPOST
    termios.tcsetattr(writer, termios.TCSANOW, settings)
    return reader, writer


def _read(descriptor: int) -> str:
    read = b""
    while True:
        try:
            more = os.read(descriptor, 1 << 16)
        except OSError:  # a terminal whose other end is closed
            more = b""
        if not more:
            return read.decode("utf-8", "backslashreplace")
        read += more


if __name__ == "__main__":
    lines = json.load(sys.stdin)
    ends = []
    for start in range(0, len(lines), AT_ONCE):
        runs = [Run(edge, line) for edge, line in lines[start : start + AT_ONCE]]
        ends += [run.end() for run in runs]
    print(json.dumps(ends))
