"""Structured logging to standard error, one line per event, also for the standard library's loggers."""

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
        # Plain tracebacks: the pretty ones show local variables, which may be secrets or a user's attributes.
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
    """The logger of a module. Bind values that identify the work (operation, shard), never secrets or attributes."""
    return cast(structlog.stdlib.BoundLogger, structlog.get_logger(name))


class LineStream(io.TextIOBase):
    """Replaces a standard stream: each printed line becomes one JSON object.

    The lines do not go through logging, because logging prints here itself when a handler fails.

    Args:
        beneath: the original standard error.
        name: ``stdout`` or ``stderr``.
    """

    def __init__(self, beneath: TextIO, name: str) -> None:
        self.beneath = beneath
        self._name = name
        self._rest = ""
        self._lock = threading.RLock()

    def writable(self) -> bool:
        """True."""
        return True

    def fileno(self) -> int:
        """None. Celery checks this value to see whether it may write past the stream. Other callers take None as they
        take any stream without a number."""
        return cast(int, None)

    def write(self, text: str) -> int:
        """Write the complete lines. The start of an incomplete last line is kept until its end comes."""
        with self._lock:
            *lines, self._rest = (self._rest + text).split("\n")
            for line in lines:
                self._write_line(line)
        return len(text)

    def flush(self) -> None:
        """Flush the stream beneath. An incomplete line is not written before its end comes."""
        self.beneath.flush()

    def _write_line(self, line: str) -> None:
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
    """Make all output of this process JSON, one object per line: prints of libraries, warnings, uncaught exceptions.
    The only exception is the interpreter's crash report (``faulthandler``).

    For processes of segsvc only, not for a process that imports it. Call it after ``configure_logging``.
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
    """Lowers INFO records of periodic work to DEBUG, so that work of every few seconds does not fill the log.

    Args:
        about: the name of the work that a record is about; None: a record that keeps its level.
        names: names of periodic work, or prefixes of them.
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
