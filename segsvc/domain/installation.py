"""What an installation is called in servers that it may share with another one."""

from __future__ import annotations

from dataclasses import dataclass
from uuid import UUID


@dataclass(frozen=True, slots=True)
class Installation:
    """One installation: a catalog, its shards, and all processes that work on them.

    Attributes:
        cluster: its name, which people choose. Two installations may have the same one.
        id: drawn when its catalog was founded.
    """

    cluster: str
    id: UUID

    @property
    def tag(self) -> str:
        """What tells its names apart from another installation's: eight characters, since every key of the cache has
        them, and every read sends them."""
        return self.id.hex[:8]

    @property
    def name(self) -> str:
        """For people, who know the cluster's name, and for servers: ``local-1f3a99c0``."""
        return f"{self.cluster}-{self.tag}"

    @property
    def broker_prefix(self) -> str:
        """What each of its keys and channels on the broker begins with."""
        return f"segsvc:{self.name}:"
