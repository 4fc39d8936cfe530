"""Fixtures of every test."""

from __future__ import annotations

from tests.local_servers import broker_server, cache_server, kafka_server, pg_server, servers_folder

__all__ = ["broker_server", "cache_server", "kafka_server", "pg_server", "servers_folder"]
