"""Events that nobody can apply go to ``<topic>.dlq``, unchanged, with the reason. A thread of its own sends them.

Its own thread, because a dead-letter topic that is missing or full must not hold up the events that are well.
"""

from __future__ import annotations

import threading
import time
from collections import deque
from dataclasses import dataclass
from typing import Final

from segsvc import metrics
from segsvc.config import Settings
from tasks.kafka_clients import SEND_TIMEOUT_S, Sender
from tasks.kafka_offsets import Taken
from tasks.waiting import Backoff, Waits

SUFFIX: Final = ".dlq"
AT_ONCE: Final = 500


@dataclass(slots=True)
class _Letter:
    taken: Taken
    reason: str

    @property
    def key(self) -> bytes | None:
        """The event's own; a message needs a key or a value, so one that had neither gets an empty key."""
        return b"" if self.taken.key is None and self.taken.raw is None else self.taken.key

    @property
    def headers(self) -> list[tuple[str, bytes]]:
        partition = self.taken.partition
        return [
            ("segsvc-topic", partition.topic.encode()),
            ("segsvc-partition", str(partition.partition).encode()),
            ("segsvc-offset", str(self.taken.offset).encode()),
            ("segsvc-reason", self.reason.encode("utf-8", "backslashreplace")),
        ]


class DeadLetters:
    """The bridge's dead letters.

    ``put`` hands one over, ``acknowledged`` returns those that the broker has: only then may their offsets be
    committed. A letter is never given up; after a crash, its event comes again and so does the letter.
    """

    def __init__(self, settings: Settings) -> None:
        self._sender = Sender(settings)
        self._incoming: deque[_Letter] = deque()
        self._acknowledged: deque[Taken] = deque()
        self._wake = threading.Event()
        self._stop = threading.Event()
        self._deadline = float("inf")
        self._thread = threading.Thread(target=self._run, name="dead-letters", daemon=True)
        self._thread.start()

    def put(self, taken: Taken, reason: str) -> None:
        """Take an event over, until ``acknowledged`` gives it back."""
        self._incoming.append(_Letter(taken, reason))
        self._wake.set()

    def acknowledged(self) -> list[Taken]:
        """Events whose letters the broker has acknowledged since the last call."""
        events: list[Taken] = []
        while self._acknowledged:
            events.append(self._acknowledged.popleft())
        return events

    def close(self, timeout_s: float) -> None:
        """Send what is there, for this long at most. The rest comes again, since its offsets are not committed."""
        self._deadline = min(self._deadline, time.monotonic() + timeout_s)
        self._stop.set()
        self._wake.set()
        self._thread.join(timeout_s + SEND_TIMEOUT_S)

    def _run(self) -> None:
        pending: list[_Letter] = []
        backoff = Backoff(0.5, 15.0)
        waits = Waits()
        while True:
            if not pending:
                self._wake.wait()
            self._wake.clear()
            while self._incoming and len(pending) < AT_ONCE:
                letter = self._incoming.popleft()
                if not letter.taken.partition.lost:  # its new owner sends it
                    pending.append(letter)
            if self._stop.is_set() and (not pending or time.monotonic() >= self._deadline):
                break
            pending = self._send(pending)
            if pending:
                backoff.failed(0.0)
                waits.begins("the dead-letter topics", self._sender.failure)
                self._stop.wait(backoff.ready_at)
            else:
                backoff.succeeded()
                waits.ends("the dead-letter topics")
            if self._incoming or self._stop.is_set():
                self._wake.set()
        self._sender.close()

    def _send(self, letters: list[_Letter]) -> list[_Letter]:
        """Send letters topic by topic; those that are not acknowledged."""
        left: list[_Letter] = []
        for topic in sorted({letter.taken.partition.topic for letter in letters}):
            of_topic = [letter for letter in letters if letter.taken.partition.topic == topic]
            outcomes = self._sender.send(
                topic + SUFFIX,
                [(letter.key, letter.taken.raw, letter.headers) for letter in of_topic],
            )
            for letter, done in zip(of_topic, outcomes, strict=True):
                if done:
                    self._acknowledged.append(letter.taken)
                    metrics.events.labels(topic, "dead").inc()
                else:
                    left.append(letter)
        return left
