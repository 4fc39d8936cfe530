"""Fixtures of every test."""

from __future__ import annotations

from segsvc.log import configure_logging
from tests.local_servers import broker_server, cache_server, kafka_server, pg_server, servers_folder

__all__ = ["broker_server", "cache_server", "kafka_server", "pg_server", "servers_folder"]

# As our processes log, less: structlog's own default renders every exception for seconds.
configure_logging("WARNING", "console")
