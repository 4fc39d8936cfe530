"""Watches the topics of user events: notes losses in the catalog and sets Prometheus gauges. A thread of the bridge.

Kafka forgets. Retention drops messages that no consumer has read yet, a group's offsets expire when the group is away
for long, and a topic may be deleted and made again. The client then begins again wherever it can, and reports nothing.
So the catalog remembers how far each partition was read. What lies between that and where the bridge goes on is a
*loss*, which ``segsvc doctor`` names until an operator acknowledges it.

Its own thread, because the catalog and the brokers may be slow, and events must not wait for either.
"""

from __future__ import annotations

import threading
import time
from collections import deque
from collections.abc import Callable, Mapping, Sequence
from typing import Final
from uuid import uuid4

from kafka import TopicPartition
from kafka.errors import KafkaError

from segsvc import metrics
from segsvc.bootstrap import EventRecords
from segsvc.bridge.fetcher import Reset
from segsvc.bridge.kafka_state import KafkaState, position
from segsvc.bridge.waiting import Waits
from segsvc.config import Settings
from segsvc.domain.errors import ServiceError
from segsvc.domain.event_records import EventLoss, EventPosition, Wait, WaitFor
from segsvc.log import get_logger

log = get_logger(__name__)

_NOTES: Final = Wait(WaitFor.CATALOG, "notes on events")

STEP_S: Final = 1.0
STOP_S: Final = 5.0
"""Longest wait, when stopping, for the last notes. Without them the catalog knows less, and no event is lost."""
NOTE_EVERY_S: Final = 5.0
TELL_EVERY_S: Final = 15.0

RETENTION: Final = "Kafka's retention dropped them before the bridge came to read them"
EXPIRED: Final = "the group's offsets were gone, and Kafka's retention had dropped them by then"
RECREATED: Final = "the topic was deleted and made again, or cut off; what it had behind this offset is gone"


def loss_of(reset: Reset, known: EventPosition | None, topic_id: str, end: int) -> EventLoss | None:
    """The events that are lost where a position was reset; None: no loss is known.

    Args:
        known: what the catalog remembers; None: nothing, the partition is read for the first time.
        topic_id: id of the topic that exists now.
        end: the offset after its last message.
    """
    where, before = reset.where, reset.before
    if known is not None and known.topic_id != topic_id and known.topic_id and topic_id:
        return EventLoss(where.topic, where.partition, known.next_offset, None, RECREATED)

    reason = RETENTION
    if before is None:
        if known is None:
            return None
        before, reason = known.next_offset, EXPIRED

    if before > end:
        return EventLoss(where.topic, where.partition, before, None, RECREATED)
    if before < reset.to:
        return EventLoss(where.topic, where.partition, before, reset.to, reason)
    return None


class EventWatch:
    """The thread, and the methods by which the bridge informs it. The bridge never waits for the thread.

    Args:
        waits: what the bridge waits for.
    """

    def __init__(self, settings: Settings, waits: Waits) -> None:
        self._settings = settings
        self._bridge_waits = waits
        self.dead_letter_waits: Waits | None = None
        """What the bridge's dead letters wait for; None: there are none yet."""
        self._id = uuid4()
        self._waits = Waits()
        self._resets: deque[Reset] = deque()
        self._settled: deque[TopicPartition] = deque()
        self._again: deque[TopicPartition] = deque()
        self._lock = threading.Lock()
        self._news: dict[TopicPartition, int] = {}
        self._owned: set[TopicPartition] = set()
        self._said: dict[Wait, str] = {}
        self._kafka: KafkaState | None = None
        self._stop = threading.Event()
        self._wake = threading.Event()
        self._thread = threading.Thread(target=self._run, name="event-watch", daemon=True)

    # -- the bridge's side --------------------------------------------------------------------------------------------

    def start(self) -> None:
        self._thread.start()

    def stop(self) -> None:
        """Make the last notes, and end."""
        self._stop.set()
        self._wake.set()
        self._thread.join(STOP_S)

    def was_reset(self, reset: Reset) -> None:
        """A position was reset. Nothing of the partition may be committed before ``settled`` names it."""
        self._resets.append(reset)
        self._wake.set()

    def settled(self) -> list[TopicPartition]:
        """Partitions whose loss, if any, is noted by now."""
        return [self._settled.popleft() for _ in range(len(self._settled))]

    def to_read_again(self) -> list[TopicPartition]:
        """Partitions of a topic that was made again: they must be read from their beginning."""
        return [self._again.popleft() for _ in range(len(self._again))]

    def committed(self, offsets: Mapping[TopicPartition, int]) -> None:
        """The group's offsets were committed."""
        with self._lock:
            self._news.update(offsets)
            self._owned.update(offsets)

    def released(self, where: TopicPartition) -> None:
        """A partition is no longer ours."""
        with self._lock:
            self._news.pop(where, None)
            self._owned.discard(where)

    # -- the thread ---------------------------------------------------------------------------------------------------

    def _run(self) -> None:
        services = EventRecords(self._settings)
        self._records = services.records
        note_at = tell_at = 0.0

        while not self._stop.is_set():
            self._wake.wait(STEP_S)
            self._wake.clear()

            now = time.monotonic()
            self._attempt(self._settle)
            if now >= note_at and self._attempt(self._note):
                note_at = now + NOTE_EVERY_S
            self._attempt(self._say_what_waits)
            if now >= tell_at and self._attempt(self._tell):
                tell_at = now + TELL_EVERY_S

        self._attempt(self._note)
        self._attempt(self._say_nothing_waits)
        self._let_go_of_kafka()
        services.close()

    def _attempt(self, part: Callable[[], None]) -> bool:
        try:
            part()
        except ServiceError as error:
            self._waits.begins(_NOTES, error.reason.text)
        except (KafkaError, OSError) as error:
            self._waits.begins(_NOTES, type(error).__name__)
            self._let_go_of_kafka()
        except Exception:
            # A fault of ours, or a catalog that is not migrated yet. The notes are made at the next round.
            log.exception("event_watch_failed")
            self._let_go_of_kafka()
        else:
            self._waits.ends(_NOTES)
            return True
        return False

    def _let_go_of_kafka(self) -> None:
        """Close the client, whatever its state; the next question makes a new one."""
        kafka, self._kafka = self._kafka, None
        if kafka is not None:
            try:
                kafka.close()
            except (KafkaError, OSError, RuntimeError) as error:
                log.debug("consumer_not_closed", exc_info=error)

    def _state(self) -> KafkaState:
        if self._kafka is None:
            self._kafka = KafkaState(self._settings)
        return self._kafka

    def _settle(self) -> None:
        """Note the losses of positions that were reset, and only then let their partitions commit."""
        if not self._resets:
            return

        kafka = self._state()
        kafka.refresh()
        while self._resets:
            reset = self._resets[0]
            where = reset.where
            known = self._records.positions([where.topic]).get((where.topic, where.partition))
            topic_id = kafka.topic_id(where.topic)
            _, end = kafka.ranges([where])[where]
            loss = loss_of(reset, known, topic_id, end)

            # If the partition only begins again at an earlier offset, the events that it has finished stay noted so.
            read = known.next_offset if known is not None and loss is None else reset.to
            self._records.note([position(where, topic_id, max(read, reset.to))], [loss] if loss else [])
            self._log(reset, loss)
            self._resets.popleft()
            self._settled.append(where)

    @staticmethod
    def _log(reset: Reset, loss: EventLoss | None) -> None:
        where = reset.where
        if loss is None:
            log.info("reads_from", topic=where.topic, partition=where.partition, offset=reset.to, before=reset.before)
            return
        log.error(
            "events_lost",
            topic=loss.topic,
            partition=loss.partition,
            first_offset=loss.first_offset,
            end_offset=loss.end_offset,
            reason=loss.reason,
        )

    def _note(self) -> None:
        """Note how far the partitions were read, and which topics were made again."""
        with self._lock:
            news, owned = dict(self._news), sorted(self._owned)
        kafka = self._state()
        kafka.refresh()

        losses = self._losses_of_new_topics(kafka, owned)
        remade = [TopicPartition(loss.topic, loss.partition) for loss in losses]
        # An offset that was committed for a deleted topic means nothing for the new topic of that name.
        offsets = {**news, **dict.fromkeys(remade, 0)}
        if offsets:
            positions = [position(where, kafka.topic_id(where.topic), offset) for where, offset in offsets.items()]
            self._records.note(positions, losses)

        for where, loss in zip(remade, losses, strict=True):
            self._log(Reset(where, loss.first_offset, 0), loss)
            self._again.append(where)

        with self._lock:
            self._news = {where: offset for where, offset in self._news.items() if news.get(where) != offset}

    def _losses_of_new_topics(self, kafka: KafkaState, owned: Sequence[TopicPartition]) -> list[EventLoss]:
        """Losses of topics that were deleted and made again since they were read.

        If a position was reset for that reason, the loss was noted then, and the catalog knows the new topic.
        """
        known = self._records.positions(sorted({where.topic for where in owned}))

        losses: list[EventLoss] = []
        for where in owned:
            before = known.get((where.topic, where.partition))
            topic_id = kafka.topic_id(where.topic)
            if before is not None and before.topic_id and topic_id and before.topic_id != topic_id:
                losses.append(EventLoss(where.topic, where.partition, before.next_offset, None, RECREATED))
        return losses

    def _say_what_waits(self) -> None:
        """Note in the catalog what this bridge waits for, so that ``segsvc doctor`` can say why events wait."""
        waits = self._bridge_waits.now()
        if self.dead_letter_waits is not None:
            waits |= self.dead_letter_waits.now()
        if waits or self._said:
            self._records.note_waits(self._id, waits)
        self._said = waits

    def _say_nothing_waits(self) -> None:
        if self._said:
            self._records.note_waits(self._id, {})

    def _tell(self) -> None:
        """Set the gauges that only the brokers and the catalog know."""
        kafka = self._state()
        names = kafka.event_topics()

        for state in kafka.states(kafka.partitions(names)):
            metrics.event_lag.labels(names[state.where.topic], str(state.where.partition)).set(state.lag)

        for topic, name in kafka.letter_topics().items():
            done = self._records.letters_done(topic, kafka.topic_id(topic))
            metrics.dead_letters_waiting.labels(name).set(kafka.letters_waiting(topic, done))

        losses = [found.loss for found in self._records.losses()]
        for topic, name in names.items():
            of_topic = [loss for loss in losses if loss.topic == topic]
            metrics.event_losses.labels(name).set(len(of_topic))
            metrics.events_lost.labels(name).set(sum(loss.count_max or 0 for loss in of_topic))
