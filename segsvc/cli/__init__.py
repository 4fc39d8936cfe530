"""The command line: the topmost layer, so it may use everything else. Modules import what is heavy inside commands,
so that ``segsvc --help`` and shell completion answer at once."""

from __future__ import annotations

import os


def main() -> None:
    """Entry point of the command ``segsvc``."""
    from segsvc.cli import streams  # noqa: PLC0415

    streams.prepare()
    # gRPC's own lines on standard error are no answers of ours, nor the JSON that a process writes.
    os.environ.setdefault("GRPC_VERBOSITY", "NONE")
    from segsvc.cli.app import app  # noqa: PLC0415  # typer costs more than a mistake in the entry point should

    app(prog_name="segsvc")
