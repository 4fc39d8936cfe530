"""Run by test_local_stack.py as a process of its own, to be interrupted: python … HOME up|block

It starts a stack whose own processes are dummies, and prints each message of the launcher as a line.
"""

from __future__ import annotations

import signal
import sys
from pathlib import Path

from segsvc.local.stack import LocalStack
from segsvc.local.supervision import ProcessSpec

SLEEP = "import signal, sys; signal.signal(signal.SIGTERM, lambda *_: sys.exit(0)); signal.pause()"


def main(home: Path, command: str) -> None:
    # A background process of a shell may have inherited that SIGINT is ignored.
    signal.signal(signal.SIGINT, signal.default_int_handler)

    stack = LocalStack(
        home=home,
        processes=[ProcessSpec("serve", (sys.executable, "-c", SLEEP))],
        shards=1,
        fast=True,
        migrate=[sys.executable, "-c", "import time; time.sleep(0.5)"],
        say=lambda text: print(text, flush=True),
    )

    if command == "up":
        stack.up()
        return

    with stack:
        print("inside", flush=True)
        signal.pause()


if __name__ == "__main__":
    main(Path(sys.argv[1]), sys.argv[2])
