"""The soak: load of reads, events and operations while faults happen at random; every answer is judged.

    python -m tests.soak.run --minutes 5 --seed 1

Writes build/soak.json. Exits with 1 unless no read was wrong, everything drained, and the checker finds no difference.
"""

from __future__ import annotations

import argparse
import contextlib
import json
import random
import sys
import threading
import time
from collections import deque
from pathlib import Path
from typing import Any

import grpc
import sqlalchemy as sa

from segsvc.bootstrap import Check
from segsvc.cli.front import is_serving
from segsvc.config import Settings
from segsvc.demo.client import Client
from segsvc.local.stack import LocalStack
from tests.soak.faults import Faults
from tests.soak.load import Actor, Counts, Operator, Overrider, Publisher, Read, Reader
from tests.soak.timeline import History, SegmentRule, Timeline

REPORT = Path("build/soak.json")
STACK = Path("build/soak-stack")
USERS = 3000
SLUGS = tuple(f"soak-{n}" for n in range(6))
# A deletion removes overrides: the segments with overrides are not deleted, so that each override has one writer.
OVERRIDDEN = ("soak-overridden",)
READERS = 3
OPERATION_DEADLINE_S = 10.0
FAULT_EVERY_S = (2.0, 6.0)
DRAIN_S = 90.0
WRONG_KEPT = 20
FORGET_AFTER_S = 60.0


class Judge:
    """Compares answers with the history, once every change that can affect them has begun."""

    def __init__(self, history: History, log: deque[Read], wrong: list[str]) -> None:
        self._history = history
        self._log = log
        self._wrong = wrong
        self.judged = 0
        self.wrong_count = 0
        self._forget_at = 0.0

    def catch_up(self) -> None:
        """Judge the reads. An open change counts as possibly visible, so a verdict is never too strict.

        A change that is withdrawn later makes an answer wrong that would pass before: so a read waits until no
        operation that began before the read's end is open.
        """
        while self._log:
            read = self._log[0]
            if any(timeline_open(timeline, read.end) for timeline in self._history.rules.values()):
                return
            self._log.popleft()
            self.judged += 1
            why = self._history.wrong(read.user_id, read.answer, read.begin, read.end)
            if why:
                self.wrong_count += 1
                if len(self._wrong) < WRONG_KEPT:
                    self._wrong.append(f"user {read.user_id} at {read.begin:.3f}: {why}")

        now = time.monotonic()
        if now >= self._forget_at:
            # A read that is not in the log yet began less than this time ago: a call takes less time.
            self._history.forget(now - FORGET_AFTER_S)
            self._forget_at = now + FORGET_AFTER_S


def timeline_open(timeline: Timeline[SegmentRule], end: float) -> bool:
    """Whether an operation that began before ``end`` is not decided yet."""
    return timeline.open_since() < end


class InDoubt(Actor):
    """Watches how long transactions stay prepared."""

    def __init__(self, settings: Settings, **thread: Any) -> None:
        super().__init__("in doubt", **thread)
        self._engine = sa.create_engine(settings.shard_dsns[0], poolclass=sa.NullPool)
        self.longest_s = 0.0

    def act(self) -> None:
        with contextlib.suppress(sa.exc.OperationalError), self._engine.connect() as connection:
            statement = "SELECT coalesce(max(extract(epoch FROM now() - prepared)), 0) FROM pg_prepared_xacts"
            self.longest_s = max(self.longest_s, float(connection.execute(sa.text(statement)).scalar_one()))
        time.sleep(0.1)


def soak(stack: LocalStack, minutes: float, seed: int) -> dict[str, Any]:
    """Run the load for ``minutes``. Returns the report."""
    settings = stack.settings
    slugs = (*SLUGS, *OVERRIDDEN)
    history = History({slug: Timeline(SegmentRule()) for slug in slugs})
    ids = [9_000_000_000 + 7 * n for n in range(USERS)]
    stop = threading.Event()
    failures: list[str] = []
    thread: dict[str, Any] = {"stop": stop, "failures": failures}
    changed, log = Counts(), deque[Read]()

    publisher = Publisher(settings, history, ids, seed, changed, **thread)
    publisher.send(ids)
    half = len(SLUGS) // 2

    groups = (SLUGS[:half], (*SLUGS[half:], *OVERRIDDEN))
    operators = [
        Operator(settings, history, group, OVERRIDDEN, seed + n, changed, **thread) for n, group in enumerate(groups)
    ]
    for operator, group in zip(operators, groups, strict=True):
        for slug in group:
            operator.create(slug)

    # Users with overrides are not deleted: a deletion clears overrides that the history still has.
    overridden, ids_of_publisher = ids[:200], ids[200:]
    publisher.restrict(ids_of_publisher)
    overrider = Overrider(settings, history, overridden, OVERRIDDEN, seed, changed, **thread)

    readers = [Reader(settings, ids, seed + n, log, Counts(), **thread) for n in range(READERS)]
    in_doubt = InDoubt(settings, **thread)

    wrong: list[str] = []
    judge = Judge(history, log, wrong)
    faults = Faults(stack, seed)

    writers: list[Actor] = [publisher, *operators, overrider]
    watchers: list[Actor] = [*readers, in_doubt]
    for actor in (*writers, *watchers):
        actor.start()

    until = time.monotonic() + minutes * 60
    pause = random.Random(seed)
    while time.monotonic() < until and not stop.is_set():
        next_fault = time.monotonic() + pause.uniform(*FAULT_EVERY_S)
        while time.monotonic() < min(next_fault, until) and not stop.is_set():
            judge.catch_up()
            time.sleep(0.05)
        print(f"{max(0, until - time.monotonic()):6.0f} s left: {faults.one()}; {judge.judged:,} reads judged, "
              f"{judge.wrong_count} wrong", flush=True)  # fmt: skip

    stop.set()
    drained = _join(writers, DRAIN_S) and _drained(settings)
    _join(watchers, 30.0)
    judge.catch_up()

    refused: dict[str, int] = {}
    for reader in readers:
        for code, count in reader.counts.reads_refused.items():
            refused[code] = refused.get(code, 0) + count

    differences = _check(settings)
    ok = not (failures or judge.wrong_count or differences or log) and drained

    return {
        "ok": ok,
        "minutes": minutes,
        "seed": seed,
        "operations": changed.operations,
        "user_changes": changed.user_changes,
        "overrides": changed.overrides,
        "faults": faults.fired,
        "longest_in_doubt_s": round(in_doubt.longest_s, 2),
        "reads": sum(reader.counts.reads for reader in readers),
        "reads_judged": judge.judged,
        "reads_wrong": judge.wrong_count,
        "reads_wrong_first": wrong,
        "reads_refused": refused,
        "drained": drained,
        "check_differences": differences,
        "failures": failures,
    }


def _join(actors: list[Actor], timeout_s: float) -> bool:
    until = time.monotonic() + timeout_s
    for actor in actors:
        actor.join(max(0.0, until - time.monotonic()))
    return not any(actor.is_alive() for actor in actors)


def _drained(settings: Settings) -> bool:
    """Whether every operation ends and nothing stays prepared, in time and without help."""
    until = time.monotonic() + DRAIN_S
    catalog = sa.create_engine(settings.catalog_dsn, poolclass=sa.NullPool)
    pending = "SELECT (SELECT count(*) FROM operations WHERE state NOT IN ('DONE', 'ABORTED'))"
    prepared = "SELECT count(*) FROM pg_prepared_xacts"

    while time.monotonic() < until:
        with contextlib.suppress(sa.exc.OperationalError), catalog.connect() as connection:
            if not any(connection.execute(sa.text(text)).scalar_one() for text in (pending, prepared)):
                return True
        time.sleep(0.2)
    return False


def _check(settings: Settings) -> list[str]:
    """Differences that ``segsvc check`` finds; the front must answer again, too."""
    client = Client.of(settings)
    client.wait_ready(60)
    with contextlib.suppress(grpc.RpcError):
        client.list_slugs()
    client.close()

    checking = Check(settings)
    try:
        report = checking.checker.run()
    finally:
        checking.close()

    return [str(difference.to_json()) for difference in report.differences]


def main() -> int:
    arguments = argparse.ArgumentParser(description=__doc__.splitlines()[0] if __doc__ else "")
    arguments.add_argument("--minutes", type=float, default=2.0)
    arguments.add_argument("--seed", type=int, default=random.SystemRandom().randrange(10**6))
    given = arguments.parse_args()

    stack = LocalStack(
        {"operation_deadline_s": OPERATION_DEADLINE_S},
        home=STACK,
        say=print,
        ready=is_serving,
        fast=True,
    )

    # An earlier run that failed left its stack for inspection.
    stack.down(purge=True)

    with stack:
        report = soak(stack, given.minutes, given.seed)

    if report["ok"]:
        stack.down(purge=True)
    else:
        print("the logs are in", stack.logs)

    REPORT.parent.mkdir(exist_ok=True)
    REPORT.write_text(json.dumps(report, indent=1) + "\n")
    print(json.dumps(report, indent=1))
    return 0 if report["ok"] else 1


if __name__ == "__main__":
    sys.exit(main())
