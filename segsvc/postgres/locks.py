"""Keys of all advisory locks, in one place, so that no two locks share a key by accident.

A key is a number within one database. Each lock has its own number across all databases, since catalog and shards share
code.
"""

from __future__ import annotations

from typing import Final

SHARD_LOCK: Final = 0x5E65_0001
"""Of a shard: operations hold it exclusively, changes of users share it."""

COMMIT_ORDER_LOCK: Final = 0x5E65_0002
"""Of the catalog: under it, commit sequence numbers are drawn."""

OUTBOX_LOCK: Final = 0x5E65_0003
"""Of the catalog: its holder is the one publisher. Skipping locked rows instead would break the order."""

WARM_LOCK: Final = 0x5E65_0004
"""Of a shard: a warmer holds it for the length of its session."""

MIGRATION_LOCK: Final = 0x5E65_0005
"""Of every database: one migrator holds it at a time."""

ACCEPT_LOCK: Final = 0x5E65_0006
"""Of the catalog: under it, operations enter the queue, so that their bound holds and they appear in their order."""

MOVE_LOCK: Final = 0x5E65_0007
"""Of the catalog: a command that moves shards or doubles their number holds it for as long as it runs."""
