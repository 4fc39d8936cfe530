"""Which events of a partition are finished, and how far its offset may be committed.

A partition has three different offsets: *taken* (the next poll goes on from there), *finished* (every event before it
has its effects in PostgreSQL, or its dead letter acknowledged) and *committed* (the next owner begins there).
Taken ≥ finished ≥ committed, always.
"""

from __future__ import annotations

from collections import deque

import msgspec

from segsvc.domain.events import UserEvent


class Taken(msgspec.Struct, eq=False, gc=False):
    """One event that was taken from Kafka.

    Not tracked by the garbage collector, which would check hundreds of thousands of events again and again.
    ``PartitionProgress.lose`` breaks the reference cycle between an event and its partition.

    Attributes:
        event: its content; None: unreadable.
        key, raw: as they came, for the dead letter; None: the message had none.
        through: the last offset that this stands for: what could not be read may be more than one message.
        finished: whether it is done; see ``PartitionProgress.finish``.
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
        lost: another consumer may own it by now; this one no longer finishes its events that are still under way.
        next_offset: the lowest offset that the next poll may bring; -1: nothing was taken yet.
        unfinished_events, unfinished_bytes: events that are still under way to the shards.
        held_bytes: bytes of those events and their keys.
        dead_events, dead_bytes: events that wait for their dead letters alone.
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
        """Note that every event before this offset was taken: markers and aborted messages are no events."""
        self.next_offset = max(self.next_offset, offset)

    def die(self, taken: Taken) -> None:
        """An event now waits only for the acknowledgement of its dead letter."""
        self.unfinished_events -= 1
        self.unfinished_bytes -= taken.size
        self.held_bytes -= taken.held
        self.dead_events += 1
        self.dead_bytes += taken.held
        taken.dead = True

    def finish(self, taken: Taken) -> None:
        """An event is done. Its bytes are released; its offset waits for the events before it."""
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
        """Another consumer may own the partition by now."""
        self.lost = True
        self._open.clear()

    def committable(self) -> int | None:
        """The offset to commit: after all events before the first unfinished event. None: nothing new.

        If no event is unfinished, it is also after what was passed by: otherwise a topic whose last message is a
        transaction's marker would seem to have a waiting message for ever.
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
        """Events taken and not yet committable, including finished events that wait for an event before them."""
        return len(self._open)
