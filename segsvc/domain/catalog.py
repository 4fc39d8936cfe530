"""How segments are listed and edited: the arguments of the catalog's reads and edits."""

from __future__ import annotations

from collections.abc import Mapping
from dataclasses import dataclass, field
from datetime import datetime
from enum import Enum

from segsvc.domain.errors import invalid_field


class SegmentOrder(Enum):
    """Fields that a list can be ordered by; the values are the public interface's names."""

    SLUG = "slug"
    CREATE_TIME = "create_time"
    MEMBER_COUNT = "member_count"


@dataclass(frozen=True, slots=True)
class SegmentPosition:
    """Where a page ended: the last segment's key, made unique by its id. The next page continues after it, so
    pages stay correct while segments are created and deleted."""

    key: str | int | datetime
    id: int


@dataclass(frozen=True, slots=True)
class SegmentQuery:
    """Which segments to list.

    Attributes:
        labels: only segments that have all of these; empty: all.
        descending: reverses the order.
    """

    order: SegmentOrder = SegmentOrder.SLUG
    descending: bool = False
    labels: Mapping[str, str] = field(default_factory=dict)


class EditedField(Enum):
    """Fields that can be edited; the values are the public interface's names."""

    DISPLAY_NAME = "display_name"
    DESCRIPTION = "description"
    LABELS = "labels"


def parse_order(text: str) -> tuple[SegmentOrder, bool]:
    """``order_by`` of the public interface: a field, followed by `` desc`` for descending order.

    Returns:
        The order and whether it is descending; an empty text means ascending by slug.

    Raises:
        ServiceError: FIELD_INVALID.
    """
    words = text.split()
    if not words:
        return SegmentOrder.SLUG, False

    names = {order.value: order for order in SegmentOrder}
    if words[0] not in names or words[1:] not in ([], ["desc"]):
        raise invalid_field("order_by", f'must be {", ".join(names)}, or one of these and " desc", is {text[:80]!r}')
    return names[words[0]], len(words) == 2
