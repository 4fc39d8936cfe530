"""The demonstration's output and report: steps with the expected result, the actual one, and the duration."""

from __future__ import annotations

import json
import sys
import time
from collections.abc import Iterator
from contextlib import contextmanager
from dataclasses import asdict, dataclass
from pathlib import Path

from rich.console import Console
from rich.padding import Padding
from rich.progress import BarColumn, MofNCompleteColumn, Progress, TextColumn, TimeElapsedColumn
from rich.table import Table
from rich.text import Text


def as_percent(share: float) -> str:
    """A share from 0 to 1 as a percentage for people: 19.98 %."""
    return f"{100 * share:.2f} %"


@dataclass(frozen=True, slots=True)
class StepReport:
    step: str
    expected: str
    actual: str
    ok: bool
    seconds: float


class StepFailed(Exception):
    """A step did not find what it expected; the report has the details."""


@dataclass(slots=True)
class Step:
    """A running step. ``expect`` records what it found, and marks the step as failed if that is wrong."""

    name: str
    expected: str
    actual: str = ""
    ok: bool = True

    def expect(self, holds: bool, actual: str) -> None:
        """Record the finding ``actual`` and whether it is right. After a wrong finding, later ones are ignored."""
        if not self.ok:
            return
        self.actual = actual
        self.ok = holds


class Screen:
    """Prints for people; ``write`` writes the report for programs. Only notes interpret markup; other texts are printed
    as they are."""

    def __init__(self, console: Console | None = None) -> None:
        # Output to a file or a pipe is not wrapped.
        self.console = console or Console(highlight=False, soft_wrap=not sys.stdout.isatty())
        self.reports: list[StepReport] = []

    def chapter(self, title: str) -> None:
        self.console.print(f"\n[bold]{title}[/bold]")

    def note(self, text: str) -> None:
        """Print a line with markup."""
        self._indented(Text.from_markup(text))

    def say(self, text: str) -> None:
        """Print a line as it is."""
        self._indented(Text(text))

    def _indented(self, text: Text) -> None:
        if self.console.is_terminal:
            self.console.print(Padding(text, (0, 0, 0, 2), expand=False))
        else:
            self.console.print(" ", text)

    @contextmanager
    def step(self, name: str, expected: str) -> Iterator[Step]:
        """Run a step, print its outcome and duration, record it. An exception is the outcome and is raised again."""
        step = Step(name, expected)
        started = time.monotonic()
        try:
            yield step
        except BaseException as error:
            step.ok, step.actual = False, f"{type(error).__name__}: {error}"
            raise
        finally:
            seconds = time.monotonic() - started
            self.reports.append(StepReport(name, expected, step.actual, step.ok, round(seconds, 3)))
            self._show(step, seconds)

    def _show(self, step: Step, seconds: float) -> None:
        """Print what was found, then what was expected. A text wider than the terminal continues below its start."""
        mark = Text("✓", "green") if step.ok else Text("✗", "red")
        style = "dim" if step.ok else "red"
        found = Text(f"{step.name}: {step.actual} ").append(f"(expected: {step.expected}; {seconds:.2f} s)", style)
        if not self.console.is_terminal:
            self.console.print(" ", mark, found)
            return

        row = Table.grid(padding=(0, 1, 0, 0))
        row.add_row(" ", mark, found)
        self.console.print(row)

    @contextmanager
    def bar(self, title: str, total: int) -> Iterator[ProgressBar]:
        """A progress bar that disappears at the end of the block. Without a terminal it prints nothing."""
        columns = (TextColumn("  {task.description}"), BarColumn(), MofNCompleteColumn(), TimeElapsedColumn())
        with Progress(*columns, console=self.console, transient=True) as progress:
            yield ProgressBar(progress, progress.add_task(title, total=total))

    def table(self, *columns: str) -> Table:
        return Table(*columns, box=None, padding=(0, 2), header_style="bold")

    @property
    def all_ok(self) -> bool:
        return bool(self.reports) and all(report.ok for report in self.reports)

    def write(self, path: Path) -> None:
        """Write the report: a list of {step, expected, actual, ok, seconds}."""
        path.parent.mkdir(parents=True, exist_ok=True)
        path.write_text(json.dumps([asdict(report) for report in self.reports], indent=2, ensure_ascii=False) + "\n")


class ProgressBar:
    def __init__(self, progress: Progress, task: object) -> None:
        self._progress = progress
        self._task = task

    def to(self, completed: int) -> None:
        self._progress.update(self._task, completed=completed)  # type: ignore[arg-type]
