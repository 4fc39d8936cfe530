"""Which installation do these settings name? Its databases know, each of them."""

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
"""How long after a failure the databases are asked again; until then every question fails at once."""
_WAIT_S: Final = 3.0
"""How long a thread waits for another one's answer: for that of one database, which is nearly always enough."""


class InstallationFinder:
    """Asks the databases once, and remembers the answer: an installation's id never changes.

    The catalog is asked first, then the shards: a process that starts while the catalog is down learns it all the same.
    For any number of threads.
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
            ServiceError: CATALOG_UNAVAILABLE, no database could say: none can be reached, or none is migrated. Its
                cause is what the catalog's driver said, if anything.
        """
        key = (settings.cluster, settings.catalog_dsn, *settings.shard_dsns)
        found = self._found.get(key)
        if found is not None:
            return found
        # One thread asks. If that takes long, since one database after the other is out of reach, nobody waits for it.
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
    """The installation, or None and what the first database that could not be asked said."""
    why: Exception | None = None
    with identity.open_databases(settings) as databases:
        for database in databases:
            try:
                found = identity.whose(database)
            except exc.DBAPIError as error:
                why = why or error
                continue
            # What it is not taken for has the id of another installation, which would lead to that one's queues.
            if found is not None and (found.cluster, found.shard) == (settings.cluster, database.shard):
                return Installation(found.cluster, found.installation), None
    return None, why


installation_of: Final = InstallationFinder()
"""This process's; children that it forks inherit what it knows."""
