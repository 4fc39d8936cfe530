"""Run by test_installed.py in an environment without pytest: runs commands of segsvc one after the other.

    python administration.py '[["segments", "list"], …]'

Each is run as from a shell, in this one process, because starting one takes longer than all of them. Their outputs
follow each other, after each a line ``exit CODE``.
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
