"""Which events of a partition are finished, and how far its offset may be committed.

Three offsets of a partition are not the same: what the consumer has *taken* (the next poll goes on from there), up to
where every event is *finished* (its effects are in PostgreSQL, or its dead letter is acknowledged), and what is
*committed* (where the next owner begins). Taken ≥ finished ≥ committed, always.
"""

from __future__ import annotations

from collections import deque

import msgspec

from segsvc.domain.events import UserEvent


class Taken(msgspec.Struct, eq=False, gc=False):
    """One event on its way.

    Not tracked by the collector of garbage, which would look through hundreds of thousands of them time and again:
    ``PartitionProgress.lose`` undoes the circle of an event and its partition.

    Attributes:
        event: what it says; None: unreadable.
        key, raw: as they came, for the dead letter; None: the message had none.
        finished: whether its way has ended; see ``PartitionProgress.finish``.
    """

    partition: PartitionProgress
    offset: int
    event: UserEvent | None
    key: bytes | None
    raw: bytes | None
    finished: bool = False

    @property
    def size(self) -> int:
        """Bytes of the event."""
        return 0 if self.raw is None else len(self.raw)


class PartitionProgress:
    """One partition for as long as this consumer owns it.

    Attributes:
        lost: somebody else may own it by now; its events still under way are no longer ours to finish.
        next_offset: the least offset that the next poll may bring; -1: nothing was taken yet.
        unfinished_events, unfinished_bytes: what is still under way.
    """

    def __init__(self, topic: str, partition: int) -> None:
        self.topic = topic
        self.partition = partition
        self.lost = False
        self.next_offset = -1
        self.unfinished_events = 0
        self.unfinished_bytes = 0
        self._open: deque[Taken] = deque()
        self._finished: int | None = None
        self._committed: int | None = None

    def take(self, offset: int, event: UserEvent | None, key: bytes | None, raw: bytes | None) -> Taken:
        """Note an event; offsets come ascending, gaps are normal (compaction, transaction markers)."""
        taken = Taken(self, offset, event, key, raw)
        self._open.append(taken)
        self.next_offset = offset + 1
        self.unfinished_events += 1
        self.unfinished_bytes += taken.size
        return taken

    def finish(self, taken: Taken) -> None:
        """An event's way has ended. What it held is let go; its offset waits for those before it."""
        self.unfinished_events -= 1
        self.unfinished_bytes -= taken.size
        taken.finished = True
        taken.event = taken.key = taken.raw = None

    def lose(self) -> None:
        """Somebody else may own the partition by now."""
        self.lost = True
        self._open.clear()

    def committable(self) -> int | None:
        """The offset to commit: after the last event before the first that is not finished. None: nothing new."""
        while self._open and self._open[0].finished:
            self._finished = self._open.popleft().offset + 1
        return self._finished if self._finished != self._committed else None

    def committed(self, offset: int) -> None:
        """The broker has confirmed this offset."""
        self._committed = offset

    @property
    def window_events(self) -> int:
        """Events taken and not yet committable, finished ones included that wait for one before them."""
        return len(self._open)
