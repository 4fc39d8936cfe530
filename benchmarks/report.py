"""The results of a run: a table for people, latest.json for programs, the curves as PNG."""

from __future__ import annotations

import datetime
import json
import os
import platform
from collections.abc import Sequence
from pathlib import Path
from typing import Any, Final

from rich import box
from rich.console import Console
from rich.table import Table

from benchmarks.harness import Curve, Result

RESULTS: Final = Path(__file__).resolve().parent / "results"
LATEST: Final = "latest.json"
_COLUMNS: Final = (
    *("Benchmark", "Ours", "Reference", "Unit", "Ratio", "Goal", "Met"),
    *("CPU µs a call: ours", "reference"),
)
_TEXTS: Final = ("Benchmark", "Unit", "Goal", "Met")
_SERIES_COLOURS: Final = ("#1f6feb", "#bf5b04", "#3b8132", "#8250df", "#57606a")


def print_table(results: Sequence[Result]) -> None:
    """Print the rows with notes below them; the table fits a terminal of 120 columns."""
    table = Table(box=box.SIMPLE_HEAD, pad_edge=False)
    for column in _COLUMNS:
        table.add_column(column, justify="left" if column in _TEXTS else "right", overflow="fold")
    for row in results:
        table.add_row(
            row.name,
            _with_spread(row.value, row.spread),
            _with_spread(row.reference, row.reference_spread),
            row.unit,
            "" if row.ratio is None else f"{_short(row.ratio)} ×",
            "" if row.goal is None else str(row.goal),
            {True: "yes", False: "NO", None: ""}[row.met],
            _cpu(row.cpu_us_per_call),
            _cpu(row.reference_cpu_us_per_call),
        )

    console = Console(width=None if Console().is_terminal else 160)
    console.print(table)
    for row in results:
        if row.note:
            console.print(f"{row.name}: {row.note}", highlight=False)


def save(results: Sequence[Result], curves: Sequence[Curve], folder: Path = RESULTS) -> None:
    """Write the rows into latest.json and draw the curves. Rows of benchmarks that did not run now stay unchanged. Each
    row says when and on which machine it was measured."""
    folder.mkdir(parents=True, exist_ok=True)
    latest = folder / LATEST
    kept = {row["name"]: row for row in json.loads(latest.read_text())} if latest.exists() else {}
    ran = {_benchmark_of(row.name) for row in results}
    kept = {name: row for name, row in kept.items() if _benchmark_of(name) not in ran}
    for row in results:
        kept[row.name] = _as_json(row)

    unfinished = latest.with_suffix(".new")
    unfinished.write_text(json.dumps(list(kept.values()), indent=1, ensure_ascii=False) + "\n")
    unfinished.replace(latest)

    for curve in curves:
        draw(curve, folder / f"{curve.name}.png")


def draw(curve: Curve, path: Path) -> None:
    """Draw one curve."""
    # Imported here, because the table does not need it.
    import matplotlib as mpl  # noqa: PLC0415

    mpl.use("Agg")
    import matplotlib.pyplot as plt  # noqa: PLC0415

    figure, axes = plt.subplots(figsize=(7, 4.2), dpi=110)
    for (name, points), colour in zip(curve.series.items(), _SERIES_COLOURS, strict=False):
        xs, ys = zip(*sorted(points), strict=True)
        axes.plot(xs, ys, marker="o", markersize=4, linewidth=1.8, color=colour, label=name)

    if curve.logarithmic:
        axes.set_xscale("log")
        axes.set_yscale("log")
    else:
        axes.set_ylim(bottom=0)

    axes.set_title(curve.title, loc="left", fontsize=11)
    axes.set_xlabel(curve.x_label)
    axes.set_ylabel(curve.y_label)
    axes.grid(visible=True, which="both" if curve.logarithmic else "major", color="#d0d7de", linewidth=0.6)
    axes.spines[["top", "right"]].set_visible(False)
    axes.legend(frameon=False)
    figure.tight_layout()

    # Without a date inside, so that the same figures give the same file.
    figure.savefig(path, metadata={"Software": None})
    plt.close(figure)


def _benchmark_of(name: str) -> str:
    return name.split(".", 1)[0]


def _as_json(row: Result) -> dict[str, Any]:
    return {
        "name": row.name,
        "value": row.value,
        "unit": row.unit,
        "reference": row.reference,
        "ratio": row.ratio,
        "goal": None if row.goal is None else str(row.goal),
        "met": row.met,
        "spread": row.spread,
        "reference_spread": row.reference_spread,
        "cpu_us_per_call": dict(row.cpu_us_per_call),
        "reference_cpu_us_per_call": dict(row.reference_cpu_us_per_call),
        "note": row.note,
        "measured": datetime.datetime.now(datetime.UTC).isoformat(timespec="seconds"),
        "machine": f"{os.cpu_count()} cores, {platform.machine()}, Python {platform.python_version()}",
        **row.more,
    }


def _with_spread(value: float | None, spread: float | None) -> str:
    if value is None:
        return ""
    return _short(value) + ("" if spread is None else f" ± {100 * spread:.0f} %")


def _short(value: float) -> str:
    """Three significant digits, and always all digits before the point."""
    if abs(value) >= 100:
        return f"{value:,.0f}"
    return f"{value:#.3g}".rstrip(".")


def _cpu(costs: Any) -> str:
    if not costs:
        return ""
    parts = [f"{name} {_short(cost)}" for name, cost in costs.items() if name != "total"]
    return f"{_short(costs['total'])} ({', '.join(parts)})" if "total" in costs and len(parts) > 1 else ", ".join(parts)
