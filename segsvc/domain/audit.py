"""Entries of the audit trail."""

from __future__ import annotations

from collections.abc import Mapping
from dataclasses import dataclass
from datetime import datetime
from typing import Any
from uuid import UUID


@dataclass(frozen=True, slots=True)
class AuditEntry:
    """One change of a segment that was committed.

    Attributes:
        seq: orders all commits and edits; gaps are normal.
        action: created, edited, rolled_out or deleted.
        operation_id: the operation that made the change; None: an edit, which is not an operation.
        actor: name of the principal that made the change; empty: nobody has a name.
        details: JSON; its fields depend on the action: counts, the rule, the edited fields.
    """

    seq: int
    time: datetime
    action: str
    slug: str
    operation_id: UUID | None
    actor: str
    details: Mapping[str, Any]
