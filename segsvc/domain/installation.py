"""The names of an installation on servers that it may share with another installation."""

from __future__ import annotations

from dataclasses import dataclass
from uuid import UUID


@dataclass(frozen=True, slots=True)
class Installation:
    """One installation: a catalog, its shards, and all processes that work on them.

    Attributes:
        cluster: its name, chosen by people. Two installations may have the same name.
        id: random; drawn when its catalog was founded.
    """

    cluster: str
    id: UUID

    @property
    def tag(self) -> str:
        """The part that makes its names differ from another installation's. Eight characters only, because every key
        of the cache contains them and every read sends them."""
        return self.id.hex[:8]

    @property
    def name(self) -> str:
        """Name for people (who know the cluster's name) and for servers: ``local-1f3a99c0``."""
        return f"{self.cluster}-{self.tag}"

    @property
    def broker_prefix(self) -> str:
        """Prefix of each of its keys and channels on the broker."""
        return f"segsvc:{self.name}:"
