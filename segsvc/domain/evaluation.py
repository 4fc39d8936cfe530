"""What a rule says of every user of a shard, as of one moment, and how to find out who changed after that moment."""

from __future__ import annotations

from dataclasses import dataclass

from segsvc.domain.bits import Packed


@dataclass(frozen=True, slots=True)
class Position:
    """Which transactions of a shard a snapshot sees.

    Attributes:
        epoch: the shard's epoch.
        oldest_xid: it sees every transaction below this one that was committed.
        snapshot: all of it, as PostgreSQL writes a ``pg_snapshot``.
    """

    epoch: int
    oldest_xid: int
    snapshot: str


@dataclass(frozen=True, slots=True)
class Evaluation:
    """A rule for every user of a shard.

    Attributes:
        position: the changes that are in it.
        next_slot: slots given out by then; users above are not in it.
        holds: by slot: there is a user, and the rule's condition holds.
        below: by slot: there is a user, and the bucket is below the rule's threshold.
        absent_attributes: names in the condition that no user had.
        took_s: how long it took, hence about how old it is.
    """

    position: Position
    next_slot: int
    holds: Packed
    below: Packed
    absent_attributes: tuple[str, ...]
    took_s: float
