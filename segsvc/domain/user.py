"""A user, as described by the events."""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from datetime import datetime

AttributeValue = str | bool | int | float | Sequence[str]
"""The types of an attribute's value. An attribute that is null counts as absent."""


@dataclass(frozen=True, slots=True)
class User:
    """One row of a shard.

    Attributes:
        version: version of the newest event applied; 0 after the creation.
        shard: the shard that stores the user.
    """

    id: int
    attributes: Mapping[str, AttributeValue]
    version: int
    create_time: datetime
    update_time: datetime
    shard: int
