"""What one operation changed in the lists of a shard's users, to be laid over older cache entries."""

from __future__ import annotations

from dataclasses import dataclass

import numpy as np
import numpy.typing as npt

from segsvc.domain.bits import Packed


@dataclass(frozen=True, slots=True)
class Patch:
    """The change of one shard's lists by one operation; all of it is of one snapshot.

    An entry of the epoch before becomes an entry of this epoch: the segment is in the list or not, as ``members`` says.
    It becomes nothing if the user is among ``changed``: then the entry and the bits may be of two versions of the user.

    Attributes:
        epoch: the one that the operation began on this shard.
        slots: slots given out on the shard; there is no member at or above this one.
        members: the segment's members by slot, unexpired overrides laid over the rule's bits, as blocks of bits. None:
            the segment was deleted, so no list has it any more.
        changed: slots of all users who were changed or deleted in the epoch before this one or since; ascending, each
            slot once.
        valid_until_us: the nearest end of an override that the operation itself made, in microseconds since 1970 by
            the shard's clock; entries of earlier epochs are no use from then on. None: it made none that ends.
    """

    epoch: int
    segment_id: int
    slots: int
    members: Packed | None
    changed: npt.NDArray[np.uint32]
    valid_until_us: int | None = None


@dataclass(frozen=True, slots=True)
class PublishedPatch:
    """A patch in the list of a shard's cache.

    Attributes:
        token: names its chunks.
    """

    epoch: int
    segment_id: int
    token: bytes


@dataclass(frozen=True, slots=True)
class SlotState:
    """What a patch says of one slot."""

    member: bool
    changed: bool
