"""Run the benchmarks, print the table, write the results.

    python -m benchmarks.run                       # all; `make bench`
    python -m benchmarks.run read_hit read_cold    # these; `make bench ONLY="read_hit read_cold"`
    python -m benchmarks.run --check               # exit code 1 if a goal is missed; `make bench-check`

On a machine that does other work at the same time, compare ratios and CPU time, not throughput.
"""

from __future__ import annotations

import argparse
import importlib
import os
import pkgutil
import sys
import time
import traceback

import benchmarks.suite
from benchmarks import report
from benchmarks.harness import Curve, Result, registry
from benchmarks.world import World
from segsvc.local.processes import LocalStackError


def main() -> int:
    """Returns the exit code. 0: done; 1: a benchmark failed, or with ``--check`` a goal was missed; 2: wrong usage."""
    for module in pkgutil.iter_modules(benchmarks.suite.__path__, "benchmarks.suite."):
        importlib.import_module(module.name)

    options = _options()
    if options.list:
        for name, run in registry.items():
            print(f"{name:22} {(run.__doc__ or '').strip().splitlines()[0]}")
        return 0

    if options.rounds:
        os.environ["ROUNDS"] = str(options.rounds)

    results: list[Result] = []
    try:
        with World() as world:
            failed = [name for name in options.only or registry if not _run(name, world, results)]
    except LocalStackError as error:
        print(error, file=sys.stderr)
        return 1

    report.print_table(results)
    missed = [row.name for row in results if row.met is False]
    if missed:
        print(f"goals missed: {', '.join(missed)}")
    if failed:
        print(f"benchmarks that failed: {', '.join(failed)}")
    return 1 if failed or (options.check and missed) else 0


def _options() -> argparse.Namespace:
    parser = argparse.ArgumentParser(
        prog="benchmarks.run", description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter
    )
    parser.add_argument("only", nargs="*", metavar="NAME", help="run only these")
    parser.add_argument("--check", action="store_true", help="exit with 1 if a goal is missed")
    parser.add_argument("--list", action="store_true", help="list the benchmarks")
    parser.add_argument("--rounds", type=int, help="number of rounds of each comparison")
    options = parser.parse_args()
    if unknown := [name for name in options.only if name not in registry]:
        parser.error(f"no benchmark is called {', '.join(unknown)}; there are {', '.join(registry)}")
    return options


def _run(name: str, world: World, results: list[Result]) -> bool:
    """Run one benchmark and save its rows at once, so that a later failure loses nothing. Returns False if it failed;
    the cause is printed."""
    load = os.getloadavg()[0]
    busy = f" (load {load:.1f}: other work will disturb it)" if load > (os.cpu_count() or 1) / 2 else ""
    world.say(f"{name}{busy}")

    begun = time.monotonic()
    rows: list[Result] = []
    curves: list[Curve] = []
    try:
        for found in registry[name](world):
            (rows if isinstance(found, Result) else curves).append(found)  # type: ignore[arg-type]
    except LocalStackError as error:
        print(f"{name}: {error}", file=sys.stderr)
        return False
    except Exception:  # noqa: BLE001  (the other benchmarks run all the same)
        traceback.print_exc()
        return False
    finally:
        results += rows
        if rows or curves:
            report.save(rows, curves)

    world.say(f"{name} took {time.monotonic() - begun:.0f} s")
    return True


if __name__ == "__main__":
    sys.exit(main())
