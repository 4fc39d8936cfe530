"""Runs commands of segsvc one after the other; test_installed.py runs it in an environment without pytest.

    python administration.py '[["segments", "list"], …]'

Each command runs as from a shell, but in this one process, because the start of a process takes longer than all
commands. A line that ends with ``exit CODE`` follows the output of each command.
"""

from __future__ import annotations

import json
import sys

from segsvc.cli.app import app


def main(commands: list[list[str]]) -> None:
    for arguments in commands:
        try:
            app(arguments, prog_name="segsvc")
            code: object = 0
        except SystemExit as end:
            code = end.code
        print(f"{' '.join(arguments)}: exit {code}", flush=True)


if __name__ == "__main__":
    main(json.loads(sys.argv[1]))
