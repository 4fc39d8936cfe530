"""The fault matrix: every point of the commit protocol, every fault, shard and operation, on the real system.

    python -m tests.failure.run
    python -m tests.failure.run --only prepared --fault freeze

Writes build/failure-matrix.json. Exits with 1 unless every fault fired and every check after it passed.
"""

from __future__ import annotations

import argparse
import json
import os
import shutil
import sys
import tempfile
import time
from collections import Counter
from pathlib import Path
from typing import Any

from segsvc.local.processes import termination_raises
from segsvc.log import configure_logging
from tests.failure.cell import Cell, Outcome
from tests.failure.matrix import Player, cells, left_out
from tests.failure.rig import Rig

REPORT = Path("build/failure-matrix.json")
GIVE_UP_AFTER = 10
"""After this number of failed cells the run ends."""


def report(outcomes: list[Outcome], started: float) -> dict[str, Any]:
    missing = left_out()

    return {
        "summary": {
            "cells": len(outcomes),
            "passed": sum(outcome.passed for outcome in outcomes),
            "fired": sum(outcome.fired for outcome in outcomes),
            "by_fault": Counter(outcome.cell.fault.value for outcome in outcomes),
            "by_state": Counter(outcome.state for outcome in outcomes),
            "drain_s_max": round(max((outcome.drain_s for outcome in outcomes), default=0), 3),
            "left_out": sum(group["cells"] for group in missing),
            "duration_s": round(time.monotonic() - started, 1),
        },
        "cases": [outcome.to_json() for outcome in outcomes],
        "left_out": missing,
    }


def play(wanted: list[Cell], folder: Path, outcomes: list[Outcome]) -> None:
    """Play the cells one after the other; add each outcome to ``outcomes`` at once."""
    rig = Rig(folder)
    rig.start()

    try:
        player = Player(rig)
        for number, cell in enumerate(wanted, 1):
            started = time.monotonic()
            outcome = player.play(cell)
            outcomes.append(outcome)

            verdict = "ok" if outcome.passed else f"FAILED {outcome.problems}"
            print(f"{number:4}/{len(wanted)}  {time.monotonic() - started:5.1f} s  drained in {outcome.drain_s:4.1f} s"
                  f"  {outcome.state:8}  {cell}: {verdict}", flush=True)  # fmt: skip

            if sum(not one.passed for one in outcomes) >= GIVE_UP_AFTER:
                print("too many have failed to go on")
                break
    finally:
        rig.stop()


def main() -> int:
    parser = argparse.ArgumentParser(description=__doc__.splitlines()[0] if __doc__ else "")
    parser.add_argument("--only", action="append", help="points to play (default: all)")
    parser.add_argument("--fault", action="append", help="faults to play (default: all)")
    parser.add_argument("--kind", action="append", help="operations to play (default: all)")
    parser.add_argument("--report", type=Path, default=REPORT, help="where the report goes")
    parser.add_argument("--part", default="1/1", help="n/m: the n-th of m parts")

    given = parser.parse_args()
    configure_logging("WARNING", "console")

    part, parts = map(int, given.part.split("/"))
    wanted = [
        cell
        for cell in cells()
        if (not given.only or cell.point in given.only)
        and (not given.fault or cell.fault.value in given.fault)
        and (not given.kind or cell.kind.value in given.kind)
    ][part - 1 :: parts]

    started = time.monotonic()
    folder = Path(tempfile.mkdtemp(prefix=f"segsvc-matrix-{os.getpid()}-"))
    folder.chmod(0o755)
    outcomes: list[Outcome] = []

    try:
        with termination_raises():
            play(wanted, folder, outcomes)
    finally:
        made = report(outcomes, started)
        given.report.parent.mkdir(exist_ok=True)
        given.report.write_text(json.dumps(made, indent=1) + "\n")
        print(json.dumps(made["summary"], indent=1))

    if wanted and len(outcomes) == len(wanted) and all(outcome.passed for outcome in outcomes):
        shutil.rmtree(folder, ignore_errors=True)
        return 0

    print(f"the logs are in {folder}")
    return 1


if __name__ == "__main__":
    sys.exit(main())
