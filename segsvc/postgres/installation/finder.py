"""Finds the installation that the settings name, by reading the identity that each of its databases stores."""

from __future__ import annotations

import threading
import time
from collections.abc import Callable
from typing import Final

from sqlalchemy import exc

from segsvc.config import Settings
from segsvc.domain.errors import catalog_unavailable
from segsvc.domain.installation import Installation
from segsvc.postgres.installation import identity

_RETRY_S: Final = 1.0
"""How long after a failure the databases are asked again; until then every call fails at once."""
_WAIT_S: Final = 3.0
"""How long a thread waits while another one asks: long enough for one database to answer, which nearly always
suffices."""


class InstallationFinder:
    """Asks the databases once, and remembers the answer: an installation's id never changes.

    The catalog is asked first, then the shards, so a process that starts while the catalog is down also learns it. Safe
    for any number of threads.
    """

    def __init__(self, clock: Callable[[], float] = time.monotonic) -> None:
        self._clock = clock
        self._lock = threading.Lock()
        self._found: dict[tuple[str, ...], Installation] = {}
        self._ask_again_at: dict[tuple[str, ...], float] = {}
        self._why: dict[tuple[str, ...], Exception | None] = {}

    def __call__(self, settings: Settings) -> Installation:
        """The installation of these settings.

        Raises:
            ServiceError: CATALOG_UNAVAILABLE, no database knows it: none can be reached, or none is migrated. Its cause
                is the error of the catalog's driver, if there was one.
        """
        key = (settings.cluster, settings.catalog_dsn, *settings.shard_dsns)
        found = self._found.get(key)
        if found is not None:
            return found

        # One thread asks. If that takes long, since one database after the other is out of reach, no other thread
        # waits for long.
        if not self._lock.acquire(timeout=_WAIT_S):
            raise catalog_unavailable()
        try:
            if key in self._found:
                return self._found[key]
            if self._clock() >= self._ask_again_at.get(key, 0.0):
                found, self._why[key] = _ask(settings)
                if found is not None:
                    self._found[key] = found
                    return found
                self._ask_again_at[key] = self._clock() + _RETRY_S
            raise catalog_unavailable() from self._why[key]
        finally:
            self._lock.release()


def _ask(settings: Settings) -> tuple[Installation | None, Exception | None]:
    """The installation; or None and the error of the first database that could not be asked."""
    why: Exception | None = None
    with identity.open_databases(settings) as databases:
        for database in databases:
            try:
                found = identity.identity_of(database)
            except exc.DBAPIError as error:
                why = why or error
                continue

            # A database that is not the expected one has the id of another installation, which would lead to its
            # queues.
            if found is not None and (found.cluster, found.shard) == (settings.cluster, database.shard):
                return Installation(found.cluster, found.installation), None
    return None, why


find_installation: Final = InstallationFinder()
"""The finder of this process; forked children inherit what it knows."""
