"""The command line: the topmost layer, so it may use everything else. Modules import heavy packages inside
commands, so that ``segsvc --help`` and shell completion answer at once."""

from __future__ import annotations

import os


def main() -> None:
    """Entry point of the command ``segsvc``."""
    from segsvc.cli import streams  # noqa: PLC0415

    streams.prepare()
    # Suppress gRPC's own lines on standard error: they are neither a command's answer nor a log line in JSON.
    os.environ.setdefault("GRPC_VERBOSITY", "NONE")
    from segsvc.cli.app import app  # noqa: PLC0415  # importing typer is slow: not before the streams are ready

    app(prog_name="segsvc")
