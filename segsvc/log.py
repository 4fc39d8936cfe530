"""Structured logging to standard error, one line an event; the standard library's loggers go the same way."""

from __future__ import annotations

import io
import json
import logging
import sys
import threading
from collections.abc import Callable, Collection
from datetime import UTC, datetime
from types import TracebackType
from typing import Any, TextIO, cast

import structlog


def configure_logging(level: str, form: str) -> None:
    """Set up this process's logging.

    Args:
        level: DEBUG, INFO, WARNING or ERROR.
        form: ``json`` for machines, ``console`` for people.
    """
    shared: list[structlog.typing.Processor] = [
        structlog.contextvars.merge_contextvars,
        structlog.stdlib.add_log_level,
        structlog.stdlib.add_logger_name,
        structlog.processors.TimeStamper(fmt="iso", utc=True),
        structlog.processors.StackInfoRenderer(),
    ]
    renderer: structlog.typing.Processor
    if form == "json":
        shared.append(structlog.processors.format_exc_info)
        renderer = structlog.processors.JSONRenderer()
    else:
        # Plain tracebacks: the pretty ones show local variables, which may be secrets or somebody's attributes.
        renderer = structlog.dev.ConsoleRenderer(
            colors=sys.stderr.isatty(), exception_formatter=structlog.dev.plain_traceback
        )
    structlog.configure(
        processors=[*shared, structlog.stdlib.ProcessorFormatter.wrap_for_formatter],
        wrapper_class=structlog.make_filtering_bound_logger(logging.getLevelName(level)),
        logger_factory=structlog.stdlib.LoggerFactory(),
        cache_logger_on_first_use=True,
    )
    handler = logging.StreamHandler(sys.stderr.beneath if isinstance(sys.stderr, LineStream) else sys.stderr)
    handler.setFormatter(
        structlog.stdlib.ProcessorFormatter(
            foreign_pre_chain=shared,
            processors=[structlog.stdlib.ProcessorFormatter.remove_processors_meta, renderer],
        )
    )
    root = logging.getLogger()
    root.handlers[:] = [handler]
    root.setLevel(level)


def get_logger(name: str) -> structlog.stdlib.BoundLogger:
    """A logger of a module. Bind what identifies the work (operation, shard), never secrets or attributes."""
    return cast(structlog.stdlib.BoundLogger, structlog.get_logger(name))


class LineStream(io.TextIOBase):
    """In place of a standard stream: each line that somebody prints becomes one JSON object.

    It does not go through logging, which prints here itself when a handler fails.

    Args:
        beneath: standard error as it was.
        name: ``stdout`` or ``stderr``.
    """

    def __init__(self, beneath: TextIO, name: str) -> None:
        self.beneath = beneath
        self._name = name
        self._rest = ""
        self._lock = threading.RLock()

    def writable(self) -> bool:
        """It is."""
        return True

    def fileno(self) -> int:
        """None, of which Celery asks whether it may write past the stream; to others it is no number, as they expect
        of a stream without one."""
        return cast(int, None)

    def write(self, text: str) -> int:
        """Write the lines that are whole; the rest of the last one waits for its end."""
        with self._lock:
            *lines, self._rest = (self._rest + text).split("\n")
            for line in lines:
                self._say(line)
        return len(text)

    def flush(self) -> None:
        """Lines are written when they end."""
        self.beneath.flush()

    def _say(self, line: str) -> None:
        if not line.strip():
            return
        event = {
            "event": "output",
            "text": line,
            "stream": self._name,
            "level": "info" if self._name == "stdout" else "warning",
            "timestamp": datetime.now(UTC).isoformat().replace("+00:00", "Z"),
        }
        self.beneath.write(json.dumps(event) + "\n")
        self.beneath.flush()


def take_over_output() -> None:
    """Let everything that this process says be JSON, one object a line: what libraries print, warnings, and exceptions
    that nobody caught. Only the interpreter's own last words (``faulthandler``) are not.

    For a process that is ours alone; after ``configure_logging``.
    """
    beneath = sys.stderr.beneath if isinstance(sys.stderr, LineStream) else sys.stderr
    sys.stdout = sys.__stdout__ = LineStream(beneath, "stdout")  # type: ignore[misc, assignment]
    sys.stderr = sys.__stderr__ = LineStream(beneath, "stderr")  # type: ignore[misc, assignment]
    logging.captureWarnings(True)

    log = get_logger(__name__)

    def uncaught(kind: type[BaseException], error: BaseException, trace: TracebackType | None) -> None:
        log.critical("uncaught_exception", exc_info=(kind, error, trace))

    def of_thread(args: threading.ExceptHookArgs) -> None:
        if args.exc_value is not None:
            uncaught(args.exc_type, args.exc_value, args.exc_traceback)

    def unraisable(args: sys.UnraisableHookArgs) -> None:
        trace = None if args.exc_value is None else (args.exc_type, args.exc_value, args.exc_traceback)
        log.error("exception_ignored", where=f"{args.err_msg or 'in'} {args.object!r}", exc_info=trace)

    sys.excepthook = uncaught
    threading.excepthook = of_thread
    sys.unraisablehook = unraisable


class Demote(logging.Filter):
    """Lets what happens every few seconds be seen at DEBUG alone, where it went well.

    Args:
        about: what a record is about; None: nothing that may be demoted.
        names: what is periodic, or how it begins.
    """

    def __init__(self, about: Callable[[logging.LogRecord], Any], names: Collection[str]) -> None:
        super().__init__()
        self._about = about
        self._names = tuple(names)

    def filter(self, record: logging.LogRecord) -> bool:
        """Whether the record is written."""
        if record.levelno != logging.INFO or not str(self._about(record) or "").startswith(self._names):
            return True
        record.levelno, record.levelname = logging.DEBUG, "DEBUG"
        return logging.getLogger().isEnabledFor(logging.DEBUG)
