"""The parts of every benchmark: a registry, rounds that alternate with a reference, CPU time, and result rows.

A benchmark is a function in a file of ``benchmarks/suite``::

    @benchmark("read_hit")
    def read_hit(world: World) -> Iterator[Result | Curve]:
        \"\"\"One line that says what is measured.\"\"\"
        …
        pair = measure_pair(ours, reference)            # each a function that measures once and gives a Sample
        yield pair.result("read_hit", "calls/s", ratio_at_least(0.8))

Rounds alternate between the two, and the one that goes first alternates as well, so that other work on the machine
affects both. Figures are medians. The spread is half of the distance between the quartiles, as a share of the median.
"""

from __future__ import annotations

import contextlib
import os
import statistics
import time
from collections.abc import Callable, Iterator, Mapping, Sequence
from dataclasses import dataclass, field
from typing import TYPE_CHECKING, Any, Final

import psutil

if TYPE_CHECKING:
    from benchmarks.world import World

ROUNDS: Final = 7
"""Rounds of a comparison, unless the benchmark or ``--rounds`` says otherwise."""


# -- goals ----------------------------------------------------------------------------------------------------------


@dataclass(frozen=True, slots=True)
class Goal:
    """A bound for a row's ratio or value. ``str`` formats it for the table."""

    bound: float
    at_least: bool
    of_ratio: bool

    def met(self, value: float, ratio: float | None) -> bool:
        measured = ratio if self.of_ratio else value
        if measured is None:
            return False
        return measured >= self.bound if self.at_least else measured <= self.bound

    def __str__(self) -> str:
        return f"{'≥' if self.at_least else '≤'} {self.bound:,g}{' ×' if self.of_ratio else ''}"


def ratio_at_least(bound: float) -> Goal:
    return Goal(bound, at_least=True, of_ratio=True)


def ratio_at_most(bound: float) -> Goal:
    return Goal(bound, at_least=False, of_ratio=True)


def value_at_least(bound: float) -> Goal:
    return Goal(bound, at_least=True, of_ratio=False)


def value_at_most(bound: float) -> Goal:
    return Goal(bound, at_least=False, of_ratio=False)


# -- results --------------------------------------------------------------------------------------------------------


@dataclass(frozen=True, slots=True)
class Result:
    """A row of the table and of latest.json.

    Attributes:
        name: the benchmark's name, perhaps with a suffix: ``read_hit.p99``.
        reference: the same figure of the reference, in the same unit and from the same run; None: there is none.
        ratio: value / reference, or reference / value if less is better and the goal is "times better".
        goal: None: the row is for information only.
        spread, reference_spread: as the module defines it; None: measured once.
        cpu_us_per_call: CPU time of each process involved, in microseconds per call (or per what the unit counts).
        note: what limits the value, what it leaves out, or what else a reader must know.
        more: further figures for the file.
    """

    name: str
    value: float
    unit: str
    reference: float | None = None
    ratio: float | None = None
    goal: Goal | None = None
    spread: float | None = None
    reference_spread: float | None = None
    cpu_us_per_call: Mapping[str, float] = field(default_factory=dict)
    reference_cpu_us_per_call: Mapping[str, float] = field(default_factory=dict)
    note: str = ""
    more: Mapping[str, Any] = field(default_factory=dict)

    @property
    def met(self) -> bool | None:
        """Whether the goal is met; None without one."""
        return None if self.goal is None else self.goal.met(self.value, self.ratio)


@dataclass(frozen=True, slots=True)
class Curve:
    """Points to draw, one PNG per curve: ``benchmarks/results/<name>.png``.

    Attributes:
        series: name → (x, y) points. A reference is a series like any other.
        logarithmic: both axes are logarithmic.
    """

    name: str
    title: str
    x_label: str
    y_label: str
    series: Mapping[str, Sequence[tuple[float, float]]]
    logarithmic: bool = False


# -- registry -------------------------------------------------------------------------------------------------------

Run = Callable[["World"], Iterator[Result | Curve]]
registry: Final[dict[str, Run]] = {}
"""Name → benchmark, in the order of registration."""


def benchmark(name: str) -> Callable[[Run], Run]:
    """Register a benchmark. Its docstring's first line is its description."""

    def register(run: Run) -> Run:
        if name in registry:
            raise ValueError(f"two benchmarks are called {name}")
        registry[name] = run
        return run

    return register


# -- measuring ------------------------------------------------------------------------------------------------------


@dataclass(frozen=True, slots=True)
class Sample:
    """One measurement.

    Attributes:
        value: the figure that is compared.
        calls: number of calls (events, users…) for which the CPU time was spent.
        cpu_s: CPU seconds of each process involved during the measurement, see ``cpu_of``.
        more: other figures of the same run, by name: latencies, errors.
    """

    value: float
    calls: int = 1
    cpu_s: Mapping[str, float] = field(default_factory=dict)
    more: Mapping[str, float] = field(default_factory=dict)


@dataclass(frozen=True, slots=True)
class Series:
    """All rounds of one side: ours or the reference."""

    samples: Sequence[Sample]

    @property
    def values(self) -> list[float]:
        return [sample.value for sample in self.samples]

    @property
    def median(self) -> float:
        return statistics.median(self.values)

    @property
    def spread(self) -> float | None:
        return spread_of(self.values)

    @property
    def cpu_us_per_call(self) -> dict[str, float]:
        """Medians over the rounds, by process; ``total`` is the median of the rounds' sums."""
        names = dict.fromkeys(name for sample in self.samples for name in sample.cpu_s)
        found = {
            name: statistics.median(1e6 * sample.cpu_s.get(name, 0.0) / sample.calls for sample in self.samples)
            for name in names
        }
        if found:
            found["total"] = statistics.median(1e6 * sum(s.cpu_s.values()) / s.calls for s in self.samples)
        return found

    def of(self, name: str) -> Series:
        """The same rounds with one of ``Sample.more`` as the value."""
        return Series([Sample(s.more[name], s.calls, s.cpu_s, s.more) for s in self.samples])


@dataclass(frozen=True, slots=True)
class Pair:
    """Alternating rounds of ours and of a reference."""

    ours: Series
    reference: Series

    def of(self, name: str) -> Pair:
        """The same rounds with one of ``Sample.more`` as the value."""
        return Pair(self.ours.of(name), self.reference.of(name))

    def result(
        self,
        name: str,
        unit: str,
        goal: Goal | None,
        *,
        times_better: bool = False,
        note: str = "",
        more: Mapping[str, Any] | None = None,
    ) -> Result:
        """The row of this comparison.

        Args:
            times_better: less is better, and the goal is a factor: the ratio is reference / value.
        """
        ours, reference = self.ours.median, self.reference.median
        upper, lower = (reference, ours) if times_better else (ours, reference)

        return Result(
            name,
            ours,
            unit,
            reference=reference,
            ratio=upper / lower if lower else None,
            goal=goal,
            spread=self.ours.spread,
            reference_spread=self.reference.spread,
            cpu_us_per_call=self.ours.cpu_us_per_call,
            reference_cpu_us_per_call=self.reference.cpu_us_per_call,
            note=note,
            more={"rounds": self.ours.values, "reference_rounds": self.reference.values, **(more or {})},
        )


Measure = Callable[[], Sample]


def measure(ours: Measure, *, rounds: int = 0) -> Series:
    """Measure without a reference, after one warm-up round that does not count."""
    ours()
    return Series([ours() for _ in range(rounds or rounds_wanted())])


def measure_pair(ours: Measure, reference: Measure, *, rounds: int = 0, warm_up: bool = True) -> Pair:
    """Measure both in alternating rounds.

    Args:
        rounds: 0: the usual number (``ROUNDS``).
        warm_up: run one round first that does not count. False for work that cannot be repeated at will.
    """
    if warm_up:
        ours()
        reference()

    mine: list[Sample] = []
    theirs: list[Sample] = []
    for number in range(rounds or rounds_wanted()):
        for own in (True, False) if number % 2 == 0 else (False, True):
            (mine if own else theirs).append(ours() if own else reference())
    return Pair(Series(mine), Series(theirs))


@contextlib.contextmanager
def suspended(processes: Sequence[psutil.Process]) -> Iterator[None]:
    """Suspend processes inside the block, for less time than their consumer group or their watchdog allows."""
    for process in processes:
        process.suspend()
    try:
        yield
    finally:
        for process in processes:
            process.resume()


def spread_of(values: Sequence[float]) -> float | None:
    """Half the distance between the quartiles as a share of the median; None for fewer than three values."""
    if len(values) < 3 or not statistics.median(values):
        return None
    low, _, high = statistics.quantiles(values, n=4, method="inclusive")
    return (high - low) / 2 / statistics.median(values)


def rounds_wanted() -> int:
    return int(os.environ.get("ROUNDS") or ROUNDS)


# -- CPU time -------------------------------------------------------------------------------------------------------

Pids = Mapping[str, int | Sequence[int]]
"""Name → one process or several. Processes that they started count as theirs."""


def cpu_seconds(*pids: int) -> float:
    """CPU time of these processes and of all processes that they started, ended ones included.

    A process's own count of its children includes children that ended and were waited for. That is how PostgreSQL's
    postmaster keeps the time of backends that have ended.
    """
    total = 0.0
    for pid in pids:
        root = psutil.Process(pid)
        for process in [root, *root.children(recursive=True)]:
            # A process that ends between the listing and this reading is in its parent's count at the next reading.
            with contextlib.suppress(psutil.NoSuchProcess):
                times = process.cpu_times()
                total += times.user + times.system + times.children_user + times.children_system
    return total


@dataclass(slots=True)
class Spent:
    """The result of ``cpu_of``, filled in when its block ends."""

    cpu_s: dict[str, float] = field(default_factory=dict)
    seconds: float = 0.0


@contextlib.contextmanager
def cpu_of(pids: Pids) -> Iterator[Spent]:
    """Count CPU and wall time inside the block. The kernel counts CPU in steps of 10 ms: measure over 0.5 s or more."""
    spent = Spent()
    lists = {name: (pid,) if isinstance(pid, int) else tuple(pid) for name, pid in pids.items()}
    before = {name: cpu_seconds(*members) for name, members in lists.items()}
    begun = time.perf_counter()
    yield spent
    spent.seconds = time.perf_counter() - begun
    spent.cpu_s = {name: cpu_seconds(*members) - before[name] for name, members in lists.items()}
