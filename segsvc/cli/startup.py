"""What every process of ours does first: logging, and the question whether it may work with these servers."""

from __future__ import annotations

from collections.abc import Sequence

from segsvc.cache.server_check import cache_findings
from segsvc.cli.base import Refusal
from segsvc.config import Settings
from segsvc.log import configure_logging, get_logger
from segsvc.postgres.identity import Finding, StartupError
from segsvc.postgres.migrate import verify

log = get_logger(__name__)


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
