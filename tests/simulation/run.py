"""Simulates hundreds of thousands of schedules of both protocols on all cores; then proves that it finds faults.

    python -m tests.simulation.run --schedules 100000
    python -m tests.simulation.run --protocol cache --seed 4711        # one schedule, step by step

Exits with 1 if a promise was broken, a crash point was never reached, or a mutant survived.
"""

from __future__ import annotations

import argparse
import os
import re
import sys
import time
from collections import Counter
from collections.abc import Callable, Iterable
from concurrent.futures import ProcessPoolExecutor
from dataclasses import dataclass, field
from pathlib import Path

from tests.simulation import cache_mutants, commit_mutants
from tests.simulation.cache_world import CacheWorld
from tests.simulation.commit_world import World
from tests.simulation.scheduler import Violation

CHUNK = 500
MUTANT_SEEDS = 6000
MINUTE_S = 60
PROTOCOLS: dict[str, Callable[..., World | CacheWorld]] = {"commit": World, "cache": CacheWorld}
MUTANTS: dict[str, dict[str, object]] = {"commit": {**commit_mutants.MUTANTS}, "cache": {**cache_mutants.MUTANTS}}
_DOCS = Path(__file__).resolve().parents[2] / "docs"


@dataclass
class Tally:
    """The results of some schedules."""

    schedules: int = 0
    fingerprints: set[bytes] = field(default_factory=set)
    killed_at: Counter[str] = field(default_factory=Counter)
    failures: list[tuple[int, str]] = field(default_factory=list)

    def add(self, other: Tally) -> None:
        self.schedules += other.schedules
        self.fingerprints |= other.fingerprints
        self.killed_at += other.killed_at
        self.failures += other.failures


def simulate(protocol: str, seeds: Iterable[int], mutant: str = "", *, stop: bool = False) -> Tally:
    """Run a schedule for each seed. ``stop``: end at the first schedule that breaks a promise."""
    tally = Tally()
    for seed in seeds:
        replaced = MUTANTS[protocol][mutant] if mutant else None
        world = PROTOCOLS[protocol](seed, replaced)
        tally.schedules += 1
        try:
            world.run()
        except Violation as broken:
            tally.failures.append((seed, str(broken)))
            if stop:
                break
        tally.fingerprints.add(world.scheduler.fingerprint)
        tally.killed_at.update(world.scheduler.crashed_at)

    return tally


def crash_points() -> dict[str, set[str]]:
    """The points at which a process can die, as the documents list them."""
    found = {}
    for protocol, page, heading in (
        ("commit", "commit-protocol.md", "## What survives a crash"),
        ("cache", "cache-protocol.md", "## Steps"),
    ):
        text = (_DOCS / page).read_text(encoding="utf-8").split(heading, 1)[1].split("\n## ", 1)[0]
        found[protocol] = set(re.findall(r"^\| `([a-z-]+)` \|", text, flags=re.MULTILINE))

    return found


def _report(protocol: str, tally: Tally, seconds: float) -> bool:
    points = crash_points()[protocol]
    missed = points - tally.killed_at.keys()

    print(
        f"{protocol}: {tally.schedules:,} schedules, {len(tally.fingerprints):,} distinct, "
        f"{sum(tally.killed_at.values()):,} tasks killed, {len(points) - len(missed)} of {len(points)} crash points, "
        f"{seconds:.0f} s"
    )

    for point in sorted(points):
        print(f"  killed at {point:28} {tally.killed_at[point]:8,} times")
    for seed, what in tally.failures[:10]:
        print(f"  BROKEN: {what}\n    python -m tests.simulation.run --protocol {protocol} --seed {seed}")

    return not tally.failures and not missed


def _show(protocol: str, seed: int) -> int:
    try:
        PROTOCOLS[protocol](seed, verbose=True).run()
    except Violation as broken:
        print(f"BROKEN: {broken}")
        return 1
    print("all promises kept")
    return 0


def main() -> int:
    arguments = argparse.ArgumentParser(description=(__doc__ or "").splitlines()[0])
    arguments.add_argument("--schedules", type=int, default=100_000)
    arguments.add_argument("--from-seed", type=int, default=0)
    arguments.add_argument("--protocol", choices=sorted(PROTOCOLS), help="only this one")
    arguments.add_argument("--seed", type=int, help="one schedule, step by step")

    given = arguments.parse_args()
    if given.seed is not None:
        return _show(given.protocol or "commit", given.seed)

    ok = True
    protocols = [given.protocol] if given.protocol else sorted(PROTOCOLS)

    with ProcessPoolExecutor(os.process_cpu_count() if hasattr(os, "process_cpu_count") else os.cpu_count()) as pool:
        for protocol in protocols:
            started, told = time.monotonic(), time.monotonic()
            last = given.from_seed + given.schedules // len(protocols)
            chunks = [range(first, min(first + CHUNK, last)) for first in range(given.from_seed, last, CHUNK)]
            tally = Tally()
            for part in pool.map(simulate, [protocol] * len(chunks), chunks):
                tally.add(part)
                if time.monotonic() - told > MINUTE_S:
                    told = time.monotonic()
                    print(f"{protocol}: {tally.schedules:,} of {last - given.from_seed:,}", flush=True)
            ok &= _report(protocol, tally, time.monotonic() - started)

        names = [(protocol, name) for protocol in protocols for name in MUTANTS[protocol]]
        caught = pool.map(_first_catch, *zip(*names, strict=True))
        for (protocol, name), (seed, what) in zip(names, caught, strict=True):
            ok &= seed is not None
            verdict = f"caught by seed {seed}: {what}" if seed is not None else "SURVIVED"
            print(f"mutant of {protocol}: {name}: {verdict}")

    return 0 if ok else 1


def _first_catch(protocol: str, mutant: str) -> tuple[int | None, str]:
    tally = simulate(protocol, range(MUTANT_SEEDS), mutant, stop=True)
    return tally.failures[0] if tally.failures else (None, "")


if __name__ == "__main__":
    sys.exit(main())
