"""Probes of the databases, for health checks."""

from __future__ import annotations

import sqlalchemy as sa

from segsvc.postgres.engine import Databases


class PostgresProbes:
    def __init__(self, databases: Databases) -> None:
        self._databases = databases

    def catalog(self, timeout_s: float) -> None:
        """Raises ServiceError CATALOG_UNAVAILABLE, DEADLINE_EXCEEDED, or OVERLOADED (every connection is in use)."""
        with self._databases.catalog_autocommit(timeout_s=timeout_s) as connection:
            connection.execute(sa.select(sa.literal(1)))

    def shard(self, shard: int, timeout_s: float) -> None:
        """Raises ServiceError SHARD_UNAVAILABLE, DEADLINE_EXCEEDED, or OVERLOADED (every connection is in use)."""
        with self._databases.shard_autocommit(shard, timeout_s=timeout_s) as connection:
            connection.execute(sa.select(sa.literal(1)))
