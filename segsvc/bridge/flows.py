"""From events to batches and back: when a batch goes to the workers, and what happens to its events.

A *flow* is one topic of one shard. It has at most one batch under way: so the events of one user and topic are applied
in their order (nothing depends on it), and batches grow by themselves to the size that the shard can take. Creations,
updates and deletions go separately, because creations need no cache: they go on while it is down.
"""

from __future__ import annotations

import time
from collections import deque
from collections.abc import Callable, Collection, Mapping, Sequence
from dataclasses import dataclass
from typing import Final, Protocol

from segsvc import metrics
from segsvc.bridge.batches import FAULT
from segsvc.bridge.offsets import Taken
from segsvc.bridge.waiting import Backoff, Waits
from segsvc.domain.errors import Reason, ServiceError
from segsvc.domain.event_records import Wait, WaitFor
from segsvc.domain.events import UserEvent
from segsvc.log import get_logger
from segsvc.services.ingestion import BatchReport
from tasks.outcomes import BATCH_LOST, OUT_OF_MEMORY, RESULT_REFUSED, WORKER_ENDED, Outcome

log = get_logger(__name__)

BATCH_BYTES_MAX: Final = 4 * 1024 * 1024
"""A batch is cut at this size even if it has few events: a message of the broker must stay reasonably small."""
RESULT_WAIT_S: Final = 15.0
"""Without a result for this long the batch is sent again: its message or its result may be lost. The earlier message
then expires in the queue, so that copies do not pile up in a long outage of the workers."""
RESULT_WAIT_MAX_S: Final = 600.0
QUICK_S: Final = 2.0
"""After a batch that had to be halved, batches grow again while they are answered within this, so that a larger one is
far from its bound."""
FAULT_TRIES: Final = 6
FAULT_S: Final = 60.0
"""A single event that ends with INTERNAL, or with the end of its worker process, is sent again until that has happened
this often, over this time; then it goes to the dead letters, and its flow goes on. An outage never ends with INTERNAL,
and does not end one process after another while it works on the same event."""
FAULTS_MAX: Final = 10
FAULTS_PERIOD_S: Final = 3600.0
"""At most this many events go to the dead letters for these reasons in this time, in all flows of this bridge. A
release of the workers with a fault fails on every event: then the flows wait, and the events are safe in Kafka."""
GATHER_MAX_S: Final = 0.5
"""Longest wait for a batch to become full, while more events are at hand and the workers have other batches."""

_LANE_REASONS: Final = (
    Reason.CACHE_UNAVAILABLE.text,
    Reason.INTERNAL.text,
    Reason.BROKER_UNAVAILABLE.text,
    BATCH_LOST,
    WORKER_ENDED,
    OUT_OF_MEMORY,
    RESULT_REFUSED,
)
"""Failures that say nothing about the shard: only this topic waits. After any other failure the whole shard waits."""

_FAULTS: Final = (Reason.INTERNAL.text, WORKER_ENDED)
"""Failures of which one event may be the cause. It is found by halving, so that no other event is let go with it."""

_TOO_MANY_FAULTS: Final = Wait(WaitFor.FAULTS, "events on which the workers fail")
_BROKER: Final = Wait(WaitFor.BROKER, "the task broker")


class Batches(Protocol):
    """The workers, as the bridge uses them."""

    def send(self, topic: str, shard: int, events: Sequence[UserEvent], expire_s: float) -> str:
        """Send a batch; a worker that finds it later than ``expire_s`` discards it.

        Returns:
            the batch's id for ``collect``.

        Raises:
            ServiceError: BROKER_UNAVAILABLE (the batch may still have been sent).
        """

    def collect(self, batch_ids: Sequence[str]) -> Mapping[str, Outcome]:
        """The outcomes of those batches that have ended; each outcome is returned once.

        Raises:
            ServiceError: BROKER_UNAVAILABLE.
        """

    def begun(self, batch_ids: Sequence[str]) -> Collection[str]:
        """Those of these batches that a worker process has begun. Some may have ended meanwhile.

        Raises:
            ServiceError: BROKER_UNAVAILABLE.
        """


DeadLetterSink = Callable[[Taken, str], None]
"""Takes an event and the reason why it is dead; makes sure that the event is finished in the end."""


@dataclass(slots=True)
class _Batch:
    """Events that go together. ``id`` None: not with the workers now."""

    events: list[Taken]
    id: str | None = None
    wait_s: float = RESULT_WAIT_S
    sent_at: float = 0.0
    lost_at: float = 0.0
    faults: int = 0
    """How often it ended with one of ``_FAULTS``, since it is a single event."""
    first_fault_at: float = 0.0


class _Flow:
    def __init__(self, topic: str, shard: int, events_max: int) -> None:
        self.topic = topic
        self.shard = shard
        self.events_max = events_max
        """Most events of its next batch: fewer after a batch that did not end in time."""
        self.waiting: deque[Taken] = deque()
        self.batch: _Batch | None = None
        self.backoff = Backoff(0.2, 10.0)
        self.gathers_until: float | None = None
        """When the next batch is sent, full or not; None: it was not held up."""

    @property
    def name(self) -> str:
        return f"{self.topic} of shard {self.shard}"

    @property
    def wait(self) -> Wait:
        """What is waited for when this flow alone is held up."""
        return Wait(WaitFor.FLOW, self.name, self.topic)

    @property
    def shard_wait(self) -> Wait:
        """What is waited for when all flows of its shard are held up."""
        return Wait(WaitFor.SHARD, f"shard {self.shard}")

    @property
    def in_flight(self) -> bool:
        return self.batch is not None and self.batch.id is not None

    def halve(self) -> bool:
        """Keep the first half of the batch that did not end in time; the rest waits for its turn again, before all
        later events. False: the batch is a single event."""
        if self.batch is None or len(self.batch.events) < 2:
            return False
        self.events_max = len(self.batch.events) // 2
        self.waiting.extendleft(reversed(self.batch.events[self.events_max :]))
        del self.batch.events[self.events_max :]
        return True

    def next_batch(self) -> _Batch | None:
        """The batch that was held back, or a batch of waiting events; without events of partitions that are lost."""
        if self.batch is None:
            events: list[Taken] = []
            size = 0
            while self.waiting and len(events) < self.events_max and size < BATCH_BYTES_MAX:
                taken = self.waiting.popleft()
                size += taken.size
                events.append(taken)
            self.batch = _Batch(events)

        self.batch.events = [taken for taken in self.batch.events if not taken.partition.lost]
        if not self.batch.events:
            self.batch = None
        return self.batch


class Flows:
    """All flows of this bridge. Used by one thread.

    Args:
        batch_max: events in one batch.
        in_flight_max: batches with the workers at once.
        busy_from: number of batches that keeps all workers busy.
    """

    def __init__(
        self,
        batches: Batches,
        dead_letters: DeadLetterSink,
        waits: Waits,
        *,
        batch_max: int,
        in_flight_max: int,
        busy_from: int = 0,
        clock: Callable[[], float] = time.monotonic,
    ) -> None:
        self._batches = batches
        self._dead_letters = dead_letters
        self._waits = waits
        self._batch_max = batch_max
        self._in_flight_max = in_flight_max
        self._busy_from = busy_from
        self._clock = clock
        self._flows: dict[tuple[str, int], _Flow] = {}
        self._turn: deque[_Flow] = deque()
        self._shards: dict[int, Backoff] = {}
        self._broker = Backoff(0.2, 5.0)
        self._in_flight: dict[str, _Flow] = {}
        self._let_go_at: deque[float] = deque()
        """Times when the last events went to the dead letters because of ``_FAULTS``."""
        self._too_many_faults = False

    def add(self, taken: Taken, shard: int) -> None:
        """Let an event join its flow."""
        key = (taken.partition.topic, shard)
        flow = self._flows.get(key)
        if flow is None:
            flow = self._flows[key] = _Flow(*key, self._batch_max)
            self._turn.append(flow)
            self._shards.setdefault(shard, Backoff(0.2, 5.0))
        flow.waiting.append(taken)

    @property
    def in_flight(self) -> int:
        """Batches with the workers now."""
        return len(self._in_flight)

    @property
    def held_back(self) -> bool:
        """Whether events wait for something other than new events."""
        return any(flow.batch is not None or flow.waiting for flow in self._turn)

    def step(self, *, send: bool = True, more: bool = False) -> None:
        """Take results, and send the batches that may be sent now.

        Args:
            send: False when the bridge is leaving.
            more: whether more events are at hand. If so, and while the workers are busy, batches wait a while to
                become full: a full batch costs less for each event.
        """
        now = self._clock()
        if now < self._broker.ready_at:
            return

        try:
            self._collect(now)
            if send:
                self._dispatch(now, more=more)
        except ServiceError as error:
            self._broker.failed(now)
            self._waits.begins(_BROKER, error.reason.text)
        else:
            self._broker.succeeded()
            self._waits.ends(_BROKER)

        metrics.event_batches_in_flight.set(len(self._in_flight))

    # -- results ----------------------------------------------------------------------------------------------------

    def _collect(self, now: float) -> None:
        if not self._in_flight:
            return

        for batch_id, outcome in self._batches.collect(list(self._in_flight)).items():
            flow = self._in_flight.pop(batch_id)
            if isinstance(outcome, BatchReport):
                self._finish(flow, outcome, now)
            else:
                self._hold_back(flow, outcome.reason, now)

        lost = [
            batch_id
            for batch_id, flow in self._in_flight.items()
            if flow.batch is not None and now >= flow.batch.lost_at
        ]
        if not lost:
            return
        begun = self._batches.begun(lost)
        for batch_id in lost:
            self._give_up_waiting(self._in_flight.pop(batch_id), now, begun=batch_id in begun)

    def _give_up_waiting(self, flow: _Flow, now: float, *, begun: bool) -> None:
        """Send a batch without a result again. It is lost, or only late: applied twice, it has no further effect.

        Args:
            begun: whether a worker process has begun it. Then it may have ended that process, and the whole worker with
                it: nothing puts its message back in time, and there is no other sign of it.
        """
        batch = flow.batch
        if batch is None:
            raise AssertionError("only a batch can be lost")
        log.warning("batch_sent_again", lane=flow.name, after_s=batch.wait_s, begun=begun)
        batch.id = None
        if flow.halve() and begun:
            return  # workers take what is sent, so its half needs no longer wait
        batch.wait_s = min(batch.wait_s * 2, RESULT_WAIT_MAX_S)
        if begun and self._is_to_be_let_go(flow, now):
            self._let_go(flow, WORKER_ENDED)

    def _finish(self, flow: _Flow, report: BatchReport, now: float) -> None:
        batch, flow.batch = flow.batch, None
        if batch is None:
            raise AssertionError("a report belongs to a batch")

        if now - batch.sent_at < QUICK_S:
            flow.events_max = min(flow.events_max * 2, self._batch_max)

        flow.backoff.succeeded()
        self._shards[flow.shard].succeeded()
        self._waits.ends(flow.wait)
        self._waits.ends(flow.shard_wait)

        dead = dict(report.dead)
        for index, taken in enumerate(batch.events):
            if index in dead:
                self._dead_letters(taken, dead[index])
            else:
                taken.partition.finish(taken)

        metrics.events.labels(flow.topic, "applied").inc(report.applied)
        metrics.events.labels(flow.topic, "ignored").inc(report.ignored)

    def _hold_back(self, flow: _Flow, reason: str, now: float) -> None:
        if flow.batch is not None:
            flow.batch.id = None

        if reason == Reason.DEADLINE_EXCEEDED.text and flow.halve():
            # The database worked on the batch and did not finish in time: half of it is tried at once. A single event
            # that takes longer than a statement may waits below: rules become cheaper and machines free, and the event
            # is as good as any other.
            log.warning("batch_halved", lane=flow.name, events=flow.events_max)
            return

        if reason in _FAULTS:
            if flow.halve():
                log.warning("batch_halved", lane=flow.name, events=flow.events_max, reason=reason)
                return
            if self._is_to_be_let_go(flow, now):
                self._let_go(flow, reason)
                return

        if reason in (RESULT_REFUSED, OUT_OF_MEMORY):
            flow.halve()
        if reason in _LANE_REASONS:
            flow.backoff.failed(now)
            self._waits.begins(flow.wait, reason)
        else:
            self._shards[flow.shard].failed(now)
            self._waits.begins(flow.shard_wait, reason)

    def _is_to_be_let_go(self, flow: _Flow, now: float) -> bool:
        """Count a failure of a single event with one of ``_FAULTS``. Returns whether the event is let go now."""
        batch = flow.batch
        if batch is None or len(batch.events) != 1:
            return False
        if not batch.faults:
            batch.first_fault_at = now
        batch.faults += 1
        if batch.faults < FAULT_TRIES or now - batch.first_fault_at < FAULT_S:
            return False

        while self._let_go_at and now - self._let_go_at[0] >= FAULTS_PERIOD_S:
            self._let_go_at.popleft()
        if len(self._let_go_at) < FAULTS_MAX:
            self._too_many_faults = False
            self._waits.ends(_TOO_MANY_FAULTS)
            self._let_go_at.append(now)
            return True
        if not self._too_many_faults:
            self._too_many_faults = True
            log.error("workers_fail_on_too_many_events", let_go=FAULTS_MAX, within_s=FAULTS_PERIOD_S)
        self._waits.begins(_TOO_MANY_FAULTS, f"{FAULTS_MAX} were let go within an hour; the workers have a fault")
        return False

    def _let_go(self, flow: _Flow, reason: str) -> None:
        """Send the flow's single event to the dead letters, and raise an alarm: the fault is ours."""
        batch, flow.batch = flow.batch, None
        if batch is None:
            raise AssertionError("only a batch can fail")

        [taken] = batch.events
        log.error(
            "event_let_go",
            lane=flow.name,
            topic=taken.partition.topic,
            partition=taken.partition.partition,
            offset=taken.offset,
            reason=reason,
            tries=batch.faults,
        )

        metrics.events_unreadable.labels(flow.topic, FAULT).inc()
        self._dead_letters(taken, f"{reason}: applying it failed {batch.faults} times; see the workers' logs")
        flow.backoff.succeeded()
        self._waits.ends(flow.wait)

    # -- sending ----------------------------------------------------------------------------------------------------

    def _dispatch(self, now: float, *, more: bool) -> None:
        for _ in range(len(self._turn)):
            if len(self._in_flight) >= self._in_flight_max:
                return
            flow = self._turn[0]
            self._turn.rotate(-1)  # a flow that had a turn is last the next time
            if self._may_go(flow, now) and not (more and self._gathers(flow, now)):
                self._send(flow, now)

    def _gathers(self, flow: _Flow, now: float) -> bool:
        """Whether the flow's next batch should become larger first: no worker is free to start it sooner."""
        if len(self._in_flight) < self._busy_from or flow.batch is not None or len(flow.waiting) >= flow.events_max:
            return False
        if flow.gathers_until is None:
            flow.gathers_until = now + GATHER_MAX_S
        return now < flow.gathers_until

    def _may_go(self, flow: _Flow, now: float) -> bool:
        if flow.in_flight or not (flow.batch or flow.waiting):
            return False
        shard = self._shards[flow.shard]
        if now < max(flow.backoff.ready_at, shard.ready_at):
            return False
        # A shard in trouble gets one batch at a time: each keeps a worker busy until it times out.
        return not (shard.failing and any(other.shard == flow.shard for other in self._in_flight.values()))

    def _send(self, flow: _Flow, now: float) -> None:
        batch = flow.next_batch()
        flow.gathers_until = None
        if batch is None:
            return
        # Unreadable events have no shard, so they never come here.
        events = [taken.event for taken in batch.events if taken.event is not None]
        batch.id = self._batches.send(flow.topic, flow.shard, events, batch.wait_s)
        batch.sent_at = now
        batch.lost_at = now + batch.wait_s
        self._in_flight[batch.id] = flow
