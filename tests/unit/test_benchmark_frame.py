"""The benchmarks' frame: what a row says, how rounds are taken, what the files hold."""

from __future__ import annotations

import json
import os
import subprocess
import sys
import time
from pathlib import Path

import pytest

from benchmarks import report
from benchmarks.harness import (
    Curve,
    Pair,
    Result,
    Sample,
    Series,
    cpu_of,
    cpu_seconds,
    measure_pair,
    ratio_at_least,
    ratio_at_most,
    spread_of,
    value_at_most,
)
from benchmarks.seed import CONDITION, Shape


def series(*values: float) -> Series:
    return Series([Sample(value, 10, {"front": value / 1e6}, {"p99_ms": value * 2}) for value in values])


def test_row_of_a_comparison() -> None:
    row = Pair(series(30, 10, 20), series(40, 40, 40)).result("x", "calls/s", ratio_at_least(0.5))
    assert (row.value, row.reference, row.ratio, row.met) == (20, 40, 0.5, True)
    assert row.spread == 0.25
    assert row.cpu_us_per_call == {"front": 2.0, "total": 2.0}


def test_less_may_be_better() -> None:
    pair = Pair(series(2, 2, 2), series(60, 60, 60))
    assert pair.result("x", "s", ratio_at_least(30), times_better=True).ratio == 30
    assert pair.result("x", "s", ratio_at_least(30)).met is False
    assert pair.of("p99_ms").result("x", "ms", value_at_most(3)).met is False


def test_goal_without_a_figure_is_missed() -> None:
    assert Result("x", 1.0, "s", goal=ratio_at_most(2)).met is False
    assert Result("x", 1.0, "s").met is None


def test_rounds_take_turns() -> None:
    order: list[str] = []

    def measure(name: str) -> Sample:
        order.append(name)
        return Sample(len(order))

    pair = measure_pair(lambda: measure("ours"), lambda: measure("theirs"), rounds=3)
    assert order[2:] == ["ours", "theirs", "theirs", "ours", "ours", "theirs"]
    assert pair.ours.values == [3, 6, 7], "the first two do not count"


def test_spread_is_half_the_quartiles_distance() -> None:
    assert spread_of([1, 2]) is None
    assert spread_of([8, 9, 10, 11, 12]) == pytest.approx(0.1)


def test_cpu_time_of_children_counts_when_they_have_ended() -> None:
    burn = "import time\nwhile time.process_time() < 0.3: pass"
    with cpu_of({"all": os.getpid()}) as spent:
        subprocess.run([sys.executable, "-c", burn], check=True)
    assert spent.cpu_s["all"] >= 0.25  # the kernel counts in steps
    assert spent.seconds >= 0.25
    begun = time.process_time()
    assert cpu_seconds(os.getpid()) >= begun - 0.05


def test_rows_of_other_benchmarks_stay(tmp_path: Path) -> None:
    first = [Result("a", 1.0, "s"), Result("a.p99", 2.0, "s", note="old"), Result("b", 3.0, "s")]
    report.save(first, [], tmp_path)
    curve = Curve("curve", "A curve", "users", "s", {"ours": [(1, 2), (2, 3)]}, logarithmic=True)
    report.save([Result("a", 4.0, "s", reference=2.0, ratio=2.0, goal=ratio_at_least(1))], [curve], tmp_path)
    rows = json.loads((tmp_path / report.LATEST).read_text())
    assert {row["name"]: row["value"] for row in rows} == {"a": 4.0, "b": 3.0}, "a.p99 is of the run before"
    (mine,) = [row for row in rows if row["name"] == "a"]
    assert (mine["reference"], mine["ratio"], mine["goal"], mine["met"], mine["unit"]) == (2.0, 2.0, "≥ 1 ×", True, "s")
    assert (tmp_path / "curve.png").stat().st_size > 1000


def test_shape_says_what_is_made() -> None:
    shape = Shape(users=10, segments=8, percent=20, shards=4, conditions=(CONDITION,))
    assert [bool(rule.condition) for _, rule in shape.rules] == [False, False, False, True] * 2
    assert {rule.threshold for _, rule in shape.rules} == {20_000}
    assert shape.user_ids(3).tolist() == [shape.user_id(3, slot) for slot in range(10)]
    assert all(user_id % 4 == 3 for user_id in shape.user_ids(3).tolist())
    assert shape.digest != Shape(users=10, segments=8, percent=20, shards=4).digest
