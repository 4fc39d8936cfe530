"""A simulated world: processes that stop at every step, and a seeded scheduler that chooses which one goes on.

Code under test runs unmodified in greenlets. Every request to the world passes through ``pause``: there the scheduler
takes over, lets time pass, and goes on with another task. ``pause`` never returns if the process was killed, and
returns much later if the process was frozen. The same seed gives the same schedule, step by step.
"""

from __future__ import annotations

import hashlib
import random
from collections.abc import Callable
from dataclasses import dataclass, field

import greenlet

STEP_S = 0.02
"""Longest time of a step."""
IDLE = ("sleep", "wait for a message", "wait for visits")
"""Points at which a kill teaches nothing."""


class Violation(AssertionError):
    """The protocol broke one of its promises."""


@dataclass(eq=False)
class Process:
    """A unit that dies and freezes as a whole. ``main`` runs when it starts, and again after each crash."""

    name: str
    main: Callable[[], None]
    alive: bool = False
    frozen_until: float = 0.0
    restart_at: float = 0.0


@dataclass(eq=False)
class Task:
    """One thread of a process. With ``process`` None it belongs to a server, and survives its clients."""

    name: str
    process: Process | None
    run: greenlet.greenlet
    at: str = "begin"
    wake_at: float = 0.0
    ready_when: Callable[[], bool] | None = None


@dataclass(frozen=True)
class FaultRates:
    """How probable a fault is at each of its occasions."""

    crash: float = 0.02
    freeze: float = 0.006
    lost_request: float = 0.015
    lost_reply: float = 0.02
    late: float = 0.01
    lost_message: float = 0.1
    twin_message: float = 0.15
    flush: float = 0.004
    early_body: float = 0.004


@dataclass
class Scheduler:
    seed: int
    rates: FaultRates = field(default_factory=FaultRates)
    verbose: bool = False
    now: float = 0.0
    steps: int = 0
    faults: bool = True
    crashed_at: dict[str, int] = field(default_factory=dict)
    """Number of killed tasks, by the label at which they were killed."""

    def __post_init__(self) -> None:
        self.random = random.Random(self.seed)
        self.processes: list[Process] = []
        self.tasks: list[Task] = []
        self.current: Task | None = None
        self._main = greenlet.getcurrent()
        self._trace: list[str] = []
        self.after_step: Callable[[], None] = lambda: None
        """Checks the world between two steps."""

    # -- what tasks do ----------------------------------------------------------------------------------------------

    def pause(self, label: str) -> None:
        """Let other tasks go on. May return much later, or never."""
        task = self._mine()
        task.at = label
        self._main.switch()

    def sleep(self, seconds: float, label: str = "sleep") -> None:
        self._mine().wake_at = self.now + seconds
        self.pause(label)

    def dawdle(self, label: str) -> None:
        """Wait for a reply that sometimes takes long."""
        if self.chance(0.12):
            self.sleep(self.random.random(), label)
        else:
            self.pause(label)

    def wait(self, condition: Callable[[], bool], timeout_s: float | None, label: str) -> bool:
        """Wait until the condition holds. Returns False if it did not in time.

        No other task runs between the condition and the return.
        """
        task = self._mine()
        give_up = None if timeout_s is None else self.now + timeout_s

        while not condition():
            if give_up is not None and self.now >= give_up:
                return False
            task.ready_when = condition if give_up is None else lambda: condition() or self.now >= give_up
            self.pause(label)
            task.ready_when = None
        return True

    def chance(self, probability: float) -> bool:
        """Whether a fault happens now; never once the faults are over."""
        return self.faults and self.random.random() < probability

    def spawn(self, name: str, run: Callable[[], object], *, server: bool = False) -> Task:
        """Add a task of the current process, or of a server."""
        process = None if server or self.current is None else self.current.process
        return self._add(name, process, run)

    @property
    def current_name(self) -> str:
        return self._mine().name

    def _mine(self) -> Task:
        assert self.current is not None, "only tasks can wait"
        return self.current

    def _add(self, name: str, process: Process | None, run: Callable[[], object]) -> Task:
        task = Task(name, process, greenlet.greenlet(run, parent=self._main))
        self.tasks.append(task)
        return task

    # -- processes --------------------------------------------------------------------------------------------------

    def add_process(self, name: str, main: Callable[[], None]) -> None:
        process = Process(name, main)
        self.processes.append(process)
        self._start(process)

    def _start(self, process: Process) -> None:
        process.alive = True
        self._add(process.name, process, process.main)

    def crash(self, process: Process) -> None:
        """Kill a process: its tasks end where they are, and the servers release the locks that they held."""
        self._note(f"crash {process.name}")
        process.alive = False
        process.restart_at = self.now + self.random.random() * 2
        process.frozen_until = 0.0

        for task in [task for task in self.tasks if task.process is process]:
            self.tasks.remove(task)
            if task.run:
                self.crashed_at[task.at] = self.crashed_at.get(task.at, 0) + 1
            self.current = task
            task.run.throw(greenlet.GreenletExit)
        self.current = None

    # -- the loop ---------------------------------------------------------------------------------------------------

    def run(self, steps: int, until: Callable[[], bool] | None = None) -> bool:
        """Run ``steps`` steps, or until the condition holds. Returns whether it holds."""
        end = self.steps + steps
        while self.steps < end:
            if until is not None and until():
                return True

            self.steps += 1
            self.now += self.random.random() * STEP_S
            self._disturb()

            for process in self.processes:
                if not process.alive and process.restart_at <= self.now:
                    self._start(process)

            ready = [task for task in self.tasks if self._is_ready(task)]
            if ready:
                self._go_on(self.random.choice(ready))
                self.after_step()
            else:
                self.now += STEP_S * 5

        return until is not None and until()

    def _disturb(self) -> None:
        if self.chance(self.rates.freeze):
            frozen = self.random.choice(self.processes)
            frozen.frozen_until = self.now + self.random.choice((0.3, 1.0, 6.0))
            self._note(f"freeze {frozen.name}")

    def _is_ready(self, task: Task) -> bool:
        process = task.process
        if task.wake_at > self.now or (process is not None and process.frozen_until > self.now):
            return False
        return task.ready_when is None or task.ready_when()

    def _go_on(self, task: Task) -> None:
        if task.process is not None and task.at not in IDLE and self.chance(self.rates.crash):
            self.crash(task.process)
            return

        self._note(f"{task.name}: {task.at}")
        self.current = task
        try:
            task.run.switch()
        finally:
            self.current = None

        if task.run.dead and task in self.tasks:
            self.tasks.remove(task)

    def end_faults(self) -> None:
        """From now on nothing dies, freezes or is lost, and dead processes start again."""
        self._note("no more faults")
        self.faults = False
        for process in self.processes:
            process.frozen_until = 0.0
            process.restart_at = 0.0

    def close(self) -> None:
        """End every task."""
        for task in self.tasks:
            self.current = task
            task.run.throw(greenlet.GreenletExit)
        self.tasks.clear()
        self.current = None

    # -- the trace --------------------------------------------------------------------------------------------------

    def note(self, text: str) -> None:
        """Add an event of the world to the trace."""
        self._note(text)

    def _note(self, text: str) -> None:
        self._trace.append(text)
        if self.verbose:
            print(f"{self.now:8.3f}  {text}")

    @property
    def fingerprint(self) -> bytes:
        """Equal for equal schedules."""
        return hashlib.blake2b("\n".join(self._trace).encode(), digest_size=10).digest()
