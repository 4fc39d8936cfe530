"""All output of a process is JSON, one object a line: also what libraries print, warnings, and uncaught exceptions."""

from __future__ import annotations

import json
import logging
import subprocess
import sys
import textwrap
from typing import Any

import pytest

from segsvc.log import Demote
from tests.local_servers import REPOSITORY

TAKEN_OVER = """
from segsvc.log import configure_logging, take_over_output
configure_logging("INFO", "json")
take_over_output()
configure_logging("INFO", "json")  # again, as Celery asks for it
"""


def said_by(program: str) -> tuple[str, list[dict[str, Any]]]:
    """Standard output, and the events on standard error."""
    code = TAKEN_OVER + textwrap.dedent(program)
    done = subprocess.run([sys.executable, "-c", code], capture_output=True, text=True, check=False, cwd=REPOSITORY)
    return done.stdout, [json.loads(line) for line in done.stderr.splitlines()]


def test_what_is_printed_is_an_event() -> None:
    output, events = said_by("""
        import sys
        print("to output\\nin two lines")
        print("é\\udcff 😀", file=sys.__stderr__)
        sys.stdout.write("half a ")
        sys.stdout.write("line\\n")
    """)

    assert output == ""
    assert [(event["text"], event["stream"]) for event in events] == [
        ("to output", "stdout"), ("in two lines", "stdout"), ("é\udcff 😀", "stderr"), ("half a line", "stdout")
    ]  # fmt: skip
    assert {event["event"] for event in events} == {"output"}


def test_warnings_exceptions_and_broken_handlers_are_events() -> None:
    _, events = said_by("""
        import logging, threading, warnings
        warnings.warn("old")
        logging.getLogger("x").info("%d", "no number")

        def fail():
            raise ValueError("of a\\nthread")
        thread = threading.Thread(target=fail)
        thread.start()
        thread.join()

        class Dies:
            def __del__(self):
                raise ValueError("ignored")
        Dies()
        raise ValueError("of the\\nprogram")
    """)

    assert "UserWarning: old" in events[0]["event"]
    assert any(event["event"] == "output" and "Logging error" in event["text"] for event in events)
    uncaught = [event["exception"] for event in events if event["event"] == "uncaught_exception"]
    assert [trace.rpartition("ValueError: ")[2] for trace in uncaught] == ["of a\nthread", "of the\nprogram"]
    assert [event["exception"][-7:] for event in events if event["event"] == "exception_ignored"] == ["ignored"]


@pytest.mark.parametrize(
    ("level", "name", "least", "written"),
    [
        (logging.INFO, "segsvc.warm_all", "INFO", False), (logging.INFO, "segsvc.warm_all", "DEBUG", True),
        (logging.ERROR, "segsvc.warm_all", "INFO", True), (logging.INFO, "segsvc.finalize", "INFO", True),
    ],
)  # fmt: skip
def test_what_is_periodic_is_seen_at_debug(
    monkeypatch: pytest.MonkeyPatch, level: int, name: str, least: str, written: bool
) -> None:
    root = logging.getLogger()
    monkeypatch.setattr(root, "isEnabledFor", lambda asked: asked >= logging.getLevelName(least))
    record = logging.LogRecord("celery", level, __file__, 1, "done", None, None)
    assert Demote(lambda _: name, ("segsvc.warm_",)).filter(record) is written
    assert record.levelno == (logging.DEBUG if level == logging.INFO and name == "segsvc.warm_all" else level)
