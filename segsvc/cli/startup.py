"""What every process of ours does first: logging, and the question whether it may work with these servers."""

from __future__ import annotations

import logging
import os
from collections.abc import Sequence

from pydantic import ValidationError
from pydantic_settings import SettingsError

from segsvc.cache.server_check import cache_findings
from segsvc.cli import streams
from segsvc.cli.base import Refusal, speak_in_events
from segsvc.config import Settings, load_settings
from segsvc.log import configure_logging, get_logger, take_over_output
from segsvc.postgres.installation.identity import Finding, StartupError
from segsvc.postgres.installation.migrate import verify

log = get_logger(__name__)


def speak_as_a_process() -> None:
    """Let all that this process says be what its log is, from here on: JSON, one object a line, unless for people.

    Before anything else of it: also that it cannot start, and why, belongs there.
    """
    try:
        settings = load_settings()
        level, form = settings.log_level, settings.log_format
    except (ValidationError, SettingsError, UnicodeDecodeError, OSError):
        # The command itself says what is wrong with them.
        level = "INFO"
        form = "console" if os.environ.get("SEGSVC_LOG_FORMAT") == "console" else "json"
    if form == "console" or not streams.Process.ours:
        return
    configure_logging(level, "json")
    take_over_output()
    speak_in_events(lambda text, at: log.log(getattr(logging, at.upper()), "complaint", text=text))


def start_process(settings: Settings) -> None:
    """Set up logging and verify the databases and the cache.

    A server that is out of reach is no reason not to start: a process serves what can be served, and all of it when
    the server is back.

    Raises:
        Refusal: a database is the wrong one or not migrated, or its server cannot prepare enough transactions.
    """
    configure_logging(settings.log_level, settings.log_format)
    for finding in verified(settings):
        log.warning("starts_without", where=finding.where, problem=finding.problem)
    # Only told: a cache that is set up wrongly answers too seldom, never wrongly.
    for sentence in cache_findings(settings.cache_url, timeout_s=settings.cache_timeout_s):
        log.warning("cache_finding", finding=sentence)


def verified(settings: Settings) -> Sequence[Finding]:
    """The databases that are out of reach; the others are the right ones and of this release.

    Raises:
        Refusal: one is not.
    """
    try:
        return verify(settings)
    except StartupError as error:
        raise Refusal(str(error)) from error
