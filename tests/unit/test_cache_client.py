"""What the cache's client knows without a server."""

from __future__ import annotations

from segsvc.cache.client import CacheClient
from tests.installation import KEYS


def test_an_old_entry_can_outlive_a_change_by_a_lease_and_its_whole_life() -> None:
    client = CacheClient("redis://localhost:1/0", find_keys=lambda: KEYS, timeout_s=1.0, ttl_s=1000)
    assert 1010 < client.entries_gone_after_s < 1030
