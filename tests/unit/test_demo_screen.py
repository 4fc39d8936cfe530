"""What the demonstration shows of a step."""

from __future__ import annotations

import io
import json
from pathlib import Path

from rich.console import Console

from segsvc.demo.screen import Screen


def told(screen: Screen) -> None:
    with screen.step("count [red]", "a hundred or so") as step:
        step.expect(True, 'user.country in ["BR", "MX"]')
    with screen.step("count again", "a hundred or so") as step:
        step.expect(False, "7")
        step.expect(True, "what comes later changes nothing")


def test_a_step_shows_what_was_found_and_what_was_expected(tmp_path: Path) -> None:
    output = io.StringIO()
    screen = Screen(Console(file=output, soft_wrap=True, highlight=False))
    told(screen)
    first, second = output.getvalue().splitlines()
    assert first.startswith('  ✓ count [red]: user.country in ["BR", "MX"] (expected: a hundred or so; 0.0')
    assert second.startswith("  ✗ count again: 7 (expected: a hundred or so; 0.0")
    assert not screen.all_ok
    screen.write(tmp_path / "report.json")
    assert [step["ok"] for step in json.loads((tmp_path / "report.json").read_text())] == [True, False]


def test_on_a_terminal_it_goes_on_below_its_text() -> None:
    output = io.StringIO()
    screen = Screen(Console(file=output, force_terminal=True, color_system=None, width=40, highlight=False))
    told(screen)
    screen.note("[bold]a note[/bold] that is longer than the terminal is wide")
    lines = output.getvalue().splitlines()
    assert len(lines) > 5
    for line in lines:
        assert line.startswith(("  ✓ ", "  ✗ ", "    ", "  a note", "  terminal is wide"))
        assert len(line) <= 40
