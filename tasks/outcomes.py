"""How the task of a batch of user events ended, as the bridge learns it."""

from __future__ import annotations

from dataclasses import dataclass
from typing import Final

from segsvc.services.ingestion import BatchReport

BATCH_LOST: Final = "BATCH_LOST"
"""Why a batch must come again: its task came without its events. The broker has lost them, or the task was late."""


@dataclass(frozen=True, slots=True)
class TryAgain:
    """A batch could not be finished now, for a reason that is none of its events' fault."""

    reason: str


Outcome = BatchReport | TryAgain
