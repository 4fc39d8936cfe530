"""What the checker reads, as columns: the stored state exactly as it is, right or wrong."""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass
from datetime import datetime
from uuid import UUID

import numpy as np
import numpy.typing as npt

from segsvc.domain import bits
from segsvc.domain.operation import Failure, OperationPlan, OperationState
from segsvc.domain.segment import Segment

Int64s = npt.NDArray[np.int64]


@dataclass(frozen=True, slots=True)
class LedgerEntry:
    """An operation as the checker and the doctor need it. Times are by the catalog's clock; None: not reached.

    Attributes:
        shards_committed_time: all shards are known to have committed by then; recorded only when the cache cannot be
            reached.
        voted: shards that voted for it.
        failure: why it was aborted; None otherwise.
    """

    id: UUID
    plan: OperationPlan
    state: OperationState
    create_time: datetime
    start_time: datetime | None
    deadline: datetime | None
    commit_time: datetime | None
    shards_committed_time: datetime | None
    end_time: datetime | None
    voted: frozenset[int]
    failure: Failure | None

    @property
    def title(self) -> str:
        return f"operation {self.id} ({self.plan.kind.name} {self.plan.slug}, {self.state.name})"


@dataclass(frozen=True, slots=True)
class CatalogView:
    """The catalog at one moment.

    Attributes:
        time: that moment, by the catalog's clock.
        segments: all rows, RESERVED and DELETING ones included.
        operations: the ones that are not final, ended lately, or were asked for; and for each segment with an operation
            that is not final, all its earlier operations.
    """

    time: datetime
    segments: Sequence[Segment]
    operations: Sequence[LedgerEntry]


@dataclass(frozen=True, slots=True)
class StateRow:
    """The one row of a shard's ``shard_state``."""

    next_slot: int
    user_count: int


@dataclass(frozen=True, slots=True)
class UserColumns:
    """Slots and ids of users, one entry per user."""

    slots: Int64s
    ids: Int64s


@dataclass(frozen=True, slots=True)
class DirectoryRows:
    """Directory rows of the right size: their blocks, and the user ids in each (n × 1024)."""

    blocks: Int64s
    user_ids: bits.UserIds


@dataclass(frozen=True, slots=True)
class OverrideColumns:
    """Unexpired overrides: the user's slot, the segment, and whether the override includes the user (else excludes)."""

    slots: Int64s
    segment_ids: Int64s
    included: npt.NDArray[np.bool_]
