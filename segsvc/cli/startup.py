"""What every process does first: it sets up logging, and checks that these are the right servers."""

from __future__ import annotations

import logging
import os
from collections.abc import Sequence

from pydantic import ValidationError
from pydantic_settings import SettingsError

from segsvc.cache.server import server_name
from segsvc.cache.server_check import cache_findings
from segsvc.cli import streams
from segsvc.cli.base import Refusal, log_complaints
from segsvc.config import Settings, load_settings
from segsvc.log import configure_logging, get_logger, take_over_output
from segsvc.postgres.installation.identity import Finding, StartupError
from segsvc.postgres.installation.migrate import verify

log = get_logger(__name__)


def start_process_logging() -> None:
    """From here on, write all output of this process to its log: JSON, one object a line, unless the format is console.

    Called before anything else of the process: the reason why it cannot start belongs in the log, too.
    """
    try:
        settings = load_settings()
        level, form = settings.log_level, settings.log_format
    except (ValidationError, SettingsError, UnicodeDecodeError, OSError):
        # The command itself reports what is wrong with the settings.
        level = "INFO"
        form = "console" if os.environ.get("SEGSVC_LOG_FORMAT") == "console" else "json"
    if form == "console" or not streams.Process.owns_streams:
        return

    configure_logging(level, "json")
    take_over_output()
    log_complaints(lambda text, at: log.log(getattr(logging, at.upper()), "complaint", text=text))


def start_process(settings: Settings) -> None:
    """Set up logging and verify the databases and the cache.

    A server that cannot be reached does not keep a process from starting: the process serves what it can, and
    everything once the server is back.

    Raises:
        Refusal: a database is the wrong one or not migrated, or its server cannot prepare enough transactions.
    """
    configure_logging(settings.log_level, settings.log_format)

    for finding in verified(settings):
        log.warning("starts_without", where=finding.where, problem=finding.problem)

    # Only logged: a badly configured cache causes misses, never wrong answers.
    for url in settings.all_cache_urls:
        for sentence in cache_findings(url, timeout_s=settings.cache_timeout_s):
            log.warning("cache_finding", server=server_name(url), finding=sentence)


def verified(settings: Settings) -> Sequence[Finding]:
    """Check the databases; returns those that cannot be reached. All others are the right ones, and of this release.

    Raises:
        Refusal: a database is the wrong one, or of another release.
    """
    try:
        return verify(settings)
    except StartupError as error:
        raise Refusal(str(error)) from error
