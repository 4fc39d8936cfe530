"""The terminal, and tables that never break a word, not even on a narrow terminal: names can be copied as they are."""

from __future__ import annotations

from collections.abc import Sequence
from typing import Final

from rich.cells import cell_len
from rich.console import Console, ConsoleOptions, RenderResult
from rich.segment import Segment
from rich.table import Table

_PAD: Final = 2


class Terminal(Console):
    """Standard output, or standard error."""

    def on_broken_pipe(self) -> None:
        """Pass the error on: ``Commands.invoke`` handles a closed pipe, and knows the exit code."""
        raise  # noqa: PLE0704  # rich calls this while it handles the error


class Listing(Table):
    """A table without borders. If its longest words do not fit beside each other, each cell gets a line of its own.

    Args:
        columns: names of the columns.
        right: columns of numbers, aligned to the right.
        whole: columns whose cells stay on one line.
    """

    def __init__(self, columns: Sequence[str], *, right: Sequence[str], whole: Sequence[str]) -> None:
        super().__init__(box=None, padding=(0, _PAD, 0, 0), header_style="bold", pad_edge=False)
        self._names = columns
        self._whole = frozenset((*whole, *right))
        self._cells: list[tuple[str, ...]] = []
        for column in columns:
            self.add_column(column, justify="right" if column in right else "left", overflow="fold")

    def add_row(self, *cells: str, style: str | None = None) -> None:  # type: ignore[override]  # texts only
        """Add a row."""
        self._cells.append(cells)
        super().add_row(*cells, style=style)

    def __rich_console__(self, console: Console, options: ConsoleOptions) -> RenderResult:
        """The table; if the terminal is too narrow, its cells one below the other."""
        spare = options.max_width - self._give_widths()
        if spare < 0:
            yield from self._lines()
            return

        for index, column in enumerate(self.columns):
            more = min(spare, self._widest(index) - (column.width or 0))
            column.width = (column.width or 0) + more
            spare -= more
        yield from super().__rich_console__(console, options)

    def _give_widths(self) -> int:
        """Give each column the width of its longest word; returns the width of the whole table."""
        for index, column in enumerate(self.columns):
            cells = [self._names[index], *(cells[index] for cells in self._cells)]
            words = cells if self._names[index] in self._whole else [word for cell in cells for word in cell.split()]
            column.width = max(map(cell_len, words))
        return sum((column.width or 0) + _PAD for column in self.columns) - _PAD

    def _widest(self, index: int) -> int:
        cells = (self._names[index], *(cells[index] for cells in self._cells))
        return max(cell_len(line) for cell in cells for line in cell.split("\n"))

    def _lines(self) -> RenderResult:
        """Each cell on a line of its own, after the name of its column; the terminal wraps lines that are too long."""
        for cells in self._cells:
            # A pair of name and value, such as a setting, needs no column names.
            pairs = [cells] if len(cells) == 2 else list(zip(self._names, cells, strict=True))
            for name, cell in pairs:
                yield Segment(f"{name}: {cell}" if name else cell)
                yield Segment.line()
            if len(pairs) > 1:
                yield Segment.line()
