"""Events that cannot be applied go to ``<topic>.dlq`` with the reason, unchanged unless they are too large for it.

A thread of its own sends them, because a dead-letter topic that is missing or full must not hold up good events.
"""

from __future__ import annotations

import threading
import time
from collections import deque
from dataclasses import dataclass
from typing import Final

from segsvc import metrics
from segsvc.bridge.batches import Unreadable
from segsvc.bridge.clients import SEND_TIMEOUT_S, Sender
from segsvc.bridge.offsets import Taken
from segsvc.bridge.waiting import Backoff, Waits
from segsvc.config import Settings
from segsvc.domain.event_records import Wait, WaitFor
from segsvc.log import get_logger

log = get_logger(__name__)

SUFFIX: Final = ".dlq"
AT_ONCE: Final = 500
TOO_LARGE_AGAIN_S: Final = 15.0
"""How long a letter waits between tries when it is too large for its topic."""
TOO_LARGE_TRIES: Final = 20
"""How often it is tried whole; then a part of it is sent, as large as the topic takes. The event's partition waits for
it meanwhile, and must not wait for ever."""

TOPIC_HEADER: Final = "segsvc-topic"
PARTITION_HEADER: Final = "segsvc-partition"
OFFSET_HEADER: Final = "segsvc-offset"
REASON_HEADER: Final = "segsvc-reason"
THROUGH_HEADER: Final = "segsvc-through"
CONTENT_HEADER: Final = "segsvc-content"
BYTES_HEADER: Final = "segsvc-bytes"
EVENT: Final = "event"

_TOPICS: Final = Wait(WaitFor.DEAD_LETTERS, "the dead-letter topics")


@dataclass(slots=True)
class _Letter:
    """A dead letter on its way.

    Attributes:
        content: what its value is; see ``batches.Unreadable``.
        size: how many bytes the value had; None: it is whole.
        tries: how often it was refused as too large.
        bytes_max: how much of the value is sent; None: all of it.
    """

    taken: Taken
    reason: str
    content: str = EVENT
    size: int | None = None
    tries: int = 0
    bytes_max: int | None = None

    @property
    def key(self) -> bytes | None:
        """The event's key. A message needs a key or a value, so an event that had neither gets an empty key."""
        if self.bytes_max == 0:
            return b""
        return b"" if self.taken.key is None and self.taken.raw is None else self.taken.key

    @property
    def value(self) -> bytes | None:
        """The event's value, or the part of it that is sent."""
        raw = self.taken.raw
        return raw if raw is None or self.bytes_max is None else raw[: self.bytes_max]

    def cut(self) -> None:
        """Send less of it than the last time: half of the value, in the end nothing."""
        value = self.value or b""
        if self.size is None:
            self.size = len(value)
        self.bytes_max = len(value) // 2

    @property
    def room(self) -> Wait:
        """What this letter waits for when it is too large."""
        taken = self.taken
        place = f"{taken.partition.topic}/{taken.partition.partition} offset {taken.offset}"
        words = f"a larger max.message.bytes of {taken.partition.topic}{SUFFIX}, for {place}"
        return Wait(WaitFor.DEAD_LETTER_SIZE, words, taken.partition.topic)

    @property
    def headers(self) -> list[tuple[str, bytes]]:
        taken, partition = self.taken, self.taken.partition
        headers = [
            (TOPIC_HEADER, partition.topic.encode()),
            (PARTITION_HEADER, str(partition.partition).encode()),
            (OFFSET_HEADER, str(taken.offset).encode()),
            (REASON_HEADER, self.reason.encode("utf-8", "backslashreplace")),
        ]

        if taken.through > taken.offset:
            headers.append((THROUGH_HEADER, str(taken.through).encode()))
        if self.content != EVENT:
            headers.append((CONTENT_HEADER, self.content.encode()))
        if self.size is not None:
            headers.append((BYTES_HEADER, str(self.size).encode()))

        return headers


class DeadLetters:
    """The bridge's dead letters.

    ``put`` takes an event over; ``acknowledged`` returns the events whose letters the broker has: only then may their
    offsets be committed. A letter is never given up; after a crash, its event comes again and so does the letter.

    A letter is larger than its event, by the headers. If its topic does not take that size, the letter waits by itself
    until the topic does, and its partition's offset waits too; all other partitions go on. It does not wait for ever:
    after ``TOO_LARGE_TRIES`` tries the part of it that the topic takes is sent.
    """

    def __init__(self, settings: Settings) -> None:
        self._sender = Sender(settings)
        self._incoming: deque[_Letter] = deque()
        self._acknowledged: deque[Taken] = deque()
        self._too_large: deque[_Letter] = deque()
        self._too_large_at = 0.0
        self._failing: set[str] = set()
        """Topics whose letters could not be sent the last time."""
        self._waits = Waits()
        self._wake = threading.Event()
        self._stop = threading.Event()
        self._deadline = float("inf")
        self._thread = threading.Thread(target=self._run, name="dead-letters", daemon=True)
        self._thread.start()

    def put(self, taken: Taken, reason: str) -> None:
        """Take an event over, until ``acknowledged`` gives it back."""
        taken.partition.die(taken)
        self._incoming.append(_Letter(taken, reason))
        self._wake.set()

    def put_unreadable(self, taken: Taken, told: Unreadable) -> None:
        """As ``put``, for data that could not be read, or only in part."""
        taken.partition.die(taken)
        whole = told.content == EVENT and told.size == len(told.value or b"")
        self._incoming.append(_Letter(taken, told.reason, told.content, None if whole else told.size))
        self._wake.set()

    @property
    def waits(self) -> Waits:
        """What the letters wait for."""
        return self._waits

    def acknowledged(self) -> list[Taken]:
        """Events whose letters the broker has acknowledged since the last call."""
        events: list[Taken] = []
        while self._acknowledged:
            events.append(self._acknowledged.popleft())
        return events

    def close(self, timeout_s: float) -> None:
        """Send the remaining letters, for at most this long. The rest comes again: its offsets are not committed."""
        self._deadline = min(self._deadline, time.monotonic() + timeout_s)
        self._stop.set()
        self._wake.set()
        self._thread.join(timeout_s + SEND_TIMEOUT_S)

    def _run(self) -> None:
        pending: list[_Letter] = []
        backoff = Backoff(0.5, 15.0)

        while True:
            if not pending:
                self._wake.wait(max(0.0, self._too_large_at - time.monotonic()) if self._too_large else None)

            self._wake.clear()
            while self._incoming and len(pending) < AT_ONCE:
                letter = self._incoming.popleft()
                if not letter.taken.partition.lost:  # its new owner sends it
                    pending.append(letter)

            if self._stop.is_set() and (not pending or time.monotonic() >= self._deadline):
                break

            pending = self._send(pending)
            pending += self._one_by_one(self._next_too_large())

            if pending:
                backoff.failed(0.0)
                self._waits.begins(_TOPICS, self._sender.failure)
                self._stop.wait(backoff.ready_at)
            else:
                backoff.succeeded()
                self._waits.ends(_TOPICS)

            if self._incoming or self._stop.is_set():
                self._wake.set()

        self._sender.close()

    def _next_too_large(self) -> list[_Letter]:
        """One of the letters that are too large, if it is time to try them again."""
        while self._too_large and time.monotonic() >= self._too_large_at:
            letter = self._too_large.popleft()
            if not letter.taken.partition.lost:
                return [letter]
        return []

    def _send(self, letters: list[_Letter]) -> list[_Letter]:
        """Send letters topic by topic. Returns those that must be sent again."""
        left: list[_Letter] = []
        for topic in sorted({letter.taken.partition.topic for letter in letters}):
            of_topic = [letter for letter in letters if letter.taken.partition.topic == topic]
            unsent = self._one_by_one(of_topic) if topic in self._failing else self._together(of_topic)
            if unsent:
                self._failing.add(topic)
            else:
                self._failing.discard(topic)
            left += unsent
        return left

    def _one_by_one(self, letters: list[_Letter]) -> list[_Letter]:
        """Send letters of one topic after a failure, up to the first one that fails for now. Returns it and the rest.

        The broker refuses all letters of a request together, and the client gives up all others that are under way. So
        only a letter that is sent alone can be found to be too large. It is put aside.
        """
        for index, letter in enumerate(letters):
            if not self._together([letter]):
                continue
            if not self._sender.too_large:
                return letters[index:]
            if self._cut_to_size(letter):
                continue
            self._waits.begins(letter.room, self._sender.failure)
            self._too_large.append(letter)
            self._too_large_at = time.monotonic() + TOO_LARGE_AGAIN_S
        return []

    def _cut_to_size(self, letter: _Letter) -> bool:
        """Count a try of a letter that is too large. After enough tries, send the part that the topic takes. Returns
        whether it was sent."""
        letter.tries += 1
        if letter.tries < TOO_LARGE_TRIES:
            return False
        while letter.bytes_max != 0:
            letter.cut()
            if not self._together([letter]):
                log.warning("dead_letter_cut", what=str(letter.room), bytes=letter.size, sent=letter.bytes_max)
                return True
            if not self._sender.too_large:
                return False
        return False

    def _together(self, letters: list[_Letter]) -> list[_Letter]:
        """Send letters of one topic. Returns those that were not acknowledged."""
        topic = letters[0].taken.partition.topic
        outcomes = self._sender.send(topic + SUFFIX, [(letter.key, letter.value, letter.headers) for letter in letters])
        left: list[_Letter] = []
        for letter, done in zip(letters, outcomes, strict=True):
            if done:
                self._waits.ends(letter.room)
                self._acknowledged.append(letter.taken)
                metrics.events.labels(topic, "dead").inc()
            else:
                left.append(letter)
        return left
