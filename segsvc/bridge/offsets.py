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
        through: the last offset that this stands for: what could not be read may be more than one message.
        finished: whether its way has ended; see ``PartitionProgress.finish``.
        dead: whether it waits for its dead letter alone.
    """

    partition: PartitionProgress
    offset: int
    through: int
    event: UserEvent | None
    key: bytes | None
    raw: bytes | None
    finished: bool = False
    dead: bool = False

    @property
    def size(self) -> int:
        """Bytes of the event."""
        return 0 if self.raw is None else len(self.raw)

    @property
    def held(self) -> int:
        """Bytes of the event and its key."""
        return self.size + (0 if self.key is None else len(self.key))


class PartitionProgress:
    """One partition for as long as this consumer owns it.

    Attributes:
        lost: somebody else may own it by now; its events still under way are no longer ours to finish.
        next_offset: the least offset that the next poll may bring; -1: nothing was taken yet.
        unfinished_events, unfinished_bytes: what is still under way to the shards.
        held_bytes: that and its keys.
        dead_events, dead_bytes: what waits for its dead letter alone.
    """

    def __init__(self, topic: str, partition: int) -> None:
        self.topic = topic
        self.partition = partition
        self.lost = False
        self.next_offset = -1
        self.unfinished_events = 0
        self.unfinished_bytes = 0
        self.held_bytes = 0
        self.dead_events = 0
        self.dead_bytes = 0
        self._open: deque[Taken] = deque()
        self._finished: int | None = None
        self._committed: int | None = None

    def take(
        self, offset: int, event: UserEvent | None, key: bytes | None, raw: bytes | None, through: int | None = None
    ) -> Taken:
        """Note an event; offsets come ascending, gaps are normal (compaction, transaction markers)."""
        taken = Taken(self, offset, offset if through is None else through, event, key, raw)
        self._open.append(taken)
        self.next_offset = taken.through + 1
        self.unfinished_events += 1
        self.unfinished_bytes += taken.size
        self.held_bytes += taken.held
        return taken

    def pass_by(self, offset: int) -> None:
        """Note that there is no event before this offset that was not taken: markers and aborted events are none."""
        self.next_offset = max(self.next_offset, offset)

    def die(self, taken: Taken) -> None:
        """All that an event waits for now is the acknowledgement of its dead letter."""
        self.unfinished_events -= 1
        self.unfinished_bytes -= taken.size
        self.held_bytes -= taken.held
        self.dead_events += 1
        self.dead_bytes += taken.held
        taken.dead = True

    def finish(self, taken: Taken) -> None:
        """An event's way has ended. What it held is let go; its offset waits for those before it."""
        if taken.dead:
            self.dead_events -= 1
            self.dead_bytes -= taken.held
        else:
            self.unfinished_events -= 1
            self.unfinished_bytes -= taken.size
            self.held_bytes -= taken.held
        taken.finished = True
        taken.event = taken.key = taken.raw = None

    def lose(self) -> None:
        """Somebody else may own the partition by now."""
        self.lost = True
        self._open.clear()

    def committable(self) -> int | None:
        """The offset to commit: after all that comes before the first event that is not finished. None: nothing new.

        Where none is unfinished, that is behind what was passed by, too: otherwise a topic whose last message is a
        transaction's marker would look for ever as if something waited in it.
        """
        while self._open and self._open[0].finished:
            self._finished = self._open.popleft().through + 1
        if not self._open and self.next_offset > (self._finished or 0):
            self._finished = self.next_offset
        return self._finished if self._finished != self._committed else None

    def committed(self, offset: int) -> None:
        """The broker has confirmed this offset."""
        self._committed = offset

    @property
    def window_events(self) -> int:
        """Events taken and not yet committable, finished ones included that wait for one before them."""
        return len(self._open)
