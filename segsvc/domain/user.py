"""A user, as the events have described them."""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from datetime import datetime

AttributeValue = str | bool | int | float | Sequence[str]
"""What an attribute can be; one that is null is absent."""


@dataclass(frozen=True, slots=True)
class User:
    """One row of a shard.

    Attributes:
        version: of the newest event applied; 0 after the creation.
        shard: where the user lives.
    """

    id: int
    attributes: Mapping[str, AttributeValue]
    version: int
    create_time: datetime
    update_time: datetime
    shard: int
