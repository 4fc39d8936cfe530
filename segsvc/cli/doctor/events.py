"""What ``segsvc doctor`` reports about user events: how many wait and for what, dead letters, lost events."""

from __future__ import annotations

import time
from collections import defaultdict
from collections.abc import Callable, Mapping, Sequence
from dataclasses import dataclass
from typing import Final

from kafka import TopicPartition

from segsvc.bootstrap import EventRecords
from segsvc.bridge.kafka_state import KafkaState, PartitionState
from segsvc.cli.doctor.items import Item
from segsvc.config import Settings
from segsvc.domain.errors import Reason, ServiceError
from segsvc.domain.event_records import FoundLoss, Wait, WaitFor
from tasks.outcomes import WORKER_ENDED

WATCH_S: Final = 5.0
"""How long a lag that does not move is watched before it is reported."""
WATCH_MAX_S: Final = 20.0
"""The same if the cause is unknown: a batch may be on its way for 15 s, or an operation may hold the shard."""
_WATCH_STEP_S: Final = 0.25
_READ_S: Final = 3.0
TRANSACTION_MAX_S: Final = 60.0
"""How long a producer's transaction may be open by default (``transaction.timeout.ms``)."""
_PASSING: Final = frozenset({"LOCK_TIMEOUT", "BATCH_LOST", "OTHER_SHARDS"})
"""Reasons to wait that usually pass within seconds."""
_PLACES_MAX: Final = 5
_RUNBOOK: Final = "operations.md#events-do-not-arrive"


@dataclass(frozen=True, slots=True)
class Observation:
    """What was observed in the event topics.

    Attributes:
        stuck: for each partition that did not move while it was watched, the number of waiting events.
        moving: the same for partitions that moved, or in which nothing waits.
        open_transactions: partitions whose first unread message belongs to a transaction that did not end while it was
            watched: that offset, the number of messages from there on, and the transaction's age in seconds, if known.
    """

    stuck: Mapping[TopicPartition, int]
    moving: Mapping[TopicPartition, int]
    open_transactions: Mapping[TopicPartition, tuple[int, int, float | None]]


class EventTopics:
    """Watches the topics of user events. Used once.

    Args:
        committed: reads committed messages only.
        everything: reads uncommitted messages as well.
    """

    def __init__(
        self, committed: KafkaState, everything: KafkaState, clock: Callable[[], float] = time.monotonic
    ) -> None:
        self._kafka = committed
        self._everything = everything
        self._clock = clock
        self.partitions = committed.partitions(committed.event_topics())
        self._start_s = clock()
        self.first = self._states()
        self._ends = self._high_ends()
        self._last = self.first
        self._stuck = {where for where, state in self.first.items() if state.lag}
        self._open = {where for where, state in self.first.items() if state.stable_end < self._ends[where]}

    def _states(self) -> dict[TopicPartition, PartitionState]:
        return {state.where: state for state in self._kafka.states(self.partitions)}

    def _high_ends(self) -> dict[TopicPartition, int]:
        return {where: end for where, (_, end) in self._everything.ranges(self.partitions).items()}

    def watch(self, seconds: float, *, transactions: bool = True) -> None:
        """Watch the partitions that do not move until they do, for at most ``seconds`` after the beginning.

        Args:
            transactions: whether to watch open transactions as well.
        """
        while (self._stuck or (transactions and self._open)) and self._clock() - self._start_s < seconds:
            time.sleep(_WATCH_STEP_S)
            self._last = self._states()
            for where, state in self._last.items():
                before = self.first[where]
                if state.lag == 0 or (state.committed or 0) > (before.committed or 0):
                    self._stuck.discard(where)
                if state.stable_end != before.stable_end:
                    self._open.discard(where)

    @property
    def has_stuck(self) -> bool:
        """Whether events wait in a partition that did not move."""
        return bool(self._stuck)

    def count(self) -> None:
        """Count only events: the offsets of markers and of aborted events do not wait."""
        starts = {where: max(self._last[where].start, self._last[where].committed or 0) for where in self._stuck}
        ends = {where: self._last[where].stable_end for where in self._stuck}
        counts = self._kafka.read(starts, ends, _READ_S) if starts else {}
        self._counts = {where: counts.get(where, ends[where] - starts[where]) for where in self._stuck}
        self._stuck = {where for where, count in self._counts.items() if count}

    def observation(self) -> Observation:
        """What was observed; call ``count`` first."""
        stuck = {where: self._counts[where] for where in self._stuck}
        moving = {where: self._last[where].lag for where in self.partitions if where not in self._counts}
        transactions: dict[TopicPartition, tuple[int, int, float | None]] = {}
        for where in sorted(self._open):
            offset = self._last[where].stable_end
            written = self._everything.first_time(where, offset, _READ_S)
            age_s = None if written is None else max(0.0, time.time() - written)
            transactions[where] = (offset, self._ends[where] - offset, age_s)
        return Observation(stuck, moving, transactions)


def items(settings: Settings, members: Callable[[], int | None]) -> Sequence[Item]:
    """Everything to report about user events.

    Args:
        members: number of bridges in the group; None: the brokers cannot be asked.

    Raises:
        KafkaError, OSError: the brokers closed the connection.
    """
    services = EventRecords(settings)
    committed = everything = None
    try:
        committed = KafkaState(settings, 500)
        everything = KafkaState(settings, 1, read_uncommitted=True)
        topics = EventTopics(committed, everything)

        topics.watch(WATCH_S)
        waits = _waits(services) if topics.has_stuck else {}
        bridges = members() if topics.has_stuck else None
        if topics.has_stuck and bridges != 0 and not set(waits.values()) - _PASSING:
            topics.watch(WATCH_MAX_S, transactions=False)
            waits = _waits(services)

        topics.count()
        observation = topics.observation()
        return [
            *_waiting(settings, committed, observation, waits, bridges),
            *_transactions(observation),
            *_unread_losses(list(topics.first.values())),
            *_recorded(services, committed),
        ]
    finally:
        for kafka in (committed, everything):
            if kafka is not None:
                kafka.close()
        services.close()


def _waits(services: EventRecords) -> Mapping[Wait, str]:
    """What the bridges wait for, as they write it to the catalog. If it cannot be reached, they wait for it."""
    try:
        return services.records.waits()
    except ServiceError as error:
        return {Wait(WaitFor.CATALOG, "the catalog"): error.reason.text}


def _waiting(
    settings: Settings, kafka: KafkaState, observation: Observation, waits: Mapping[Wait, str], bridges: int | None
) -> Sequence[Item]:
    found: list[Item] = []
    for topic in kafka.event_topics():
        moving = sum(count for where, count in observation.moving.items() if where.topic == topic)
        stuck = {where.partition: count for where, count in observation.stuck.items() if where.topic == topic}
        if not any(where.topic == topic for where in (*observation.moving, *observation.stuck)):
            continue  # there is no such topic, which is reported above
        if not stuck:
            found.append(Item(f"{topic}: {moving:,} events wait" + (", and move" if moving else "")))
            continue
        numbers = ", ".join(map(str, sorted(stuck)))
        where = f"partition{'s' if len(stuck) > 1 else ''} {numbers}"
        text = f"{topic}: {sum(stuck.values()):,} events wait in {where}, and their number does not fall"
        cause, remedy = _cause(settings, topic, waits, bridges)
        found.append(Item(f"{text}: {cause}", f"{remedy} ({_RUNBOOK})"))
    return found


def _cause(settings: Settings, topic: str, waits: Mapping[Wait, str], bridges: int | None) -> tuple[str, str]:
    """Why the events of a topic wait, and what to do."""
    if bridges == 0:
        return f"the consumer group {settings.kafka_group} has no members", "start `segsvc bridge`, or read its log"
    concerned = {what: reason for what, reason in waits.items() if what.topic in ("", topic)}
    if not concerned:
        return (
            "the cause is unknown",
            "check whether `segsvc worker --queue events` runs and an operation holds the shards, and read their logs",
        )
    reported = "; ".join(f"{what} ({reason})" for what, reason in sorted(concerned.items()))
    remedies = dict.fromkeys(_remedy(what, reason) for what, reason in sorted(concerned.items()))
    return f"the bridge waits for {reported}", "; ".join(remedies)


_REMEDIES: Final[Mapping[WaitFor, str]] = {
    WaitFor.SHARD: "bring that shard back, and do nothing else: its events continue by themselves",
    WaitFor.DEAD_LETTERS: "fix the dead-letter topic: a dead letter must be there before its event is skipped",
    WaitFor.DEAD_LETTER_SIZE: "fix the dead-letter topic: a dead letter must be there before its event is skipped",
    WaitFor.MESSAGE: "that message cannot be read, or the brokers do not deliver it: read the bridge's log",
    WaitFor.FAULTS: "the release of the events workers has a fault, or they lack memory: read their log",
    WaitFor.BROKER: "see the broker above",
    WaitFor.CATALOG: "see the databases above",
}


def _remedy(what: Wait, reason: str) -> str:
    if what.kind is WaitFor.SHARD and reason in _PASSING:
        return "an operation holds that shard: see what is in doubt above"
    if what.kind is WaitFor.FLOW and reason == Reason.CACHE_UNAVAILABLE.text:
        return "see the cache above"
    if what.kind is WaitFor.FLOW and reason == WORKER_ENDED:
        return "an event ends its worker process; it becomes a dead letter within minutes: read the events worker's log"
    return _REMEDIES.get(what.kind, "read the bridge's log and the events worker's")


def _transactions(observation: Observation) -> Sequence[Item]:
    """Open transactions. Events that a producer has sent but not committed may not be read yet: they are no lag."""
    found: list[Item] = []
    for where, (offset, count, age_s) in observation.open_transactions.items():
        place = f"{where.topic}/{where.partition}"
        since = "" if age_s is None else f", open for {age_s:,.0f} s"
        text = f"{place}: {count:,} messages from offset {offset} on are behind a producer's transaction{since}"
        if age_s is None or age_s <= TRANSACTION_MAX_S:
            found.append(Item(text))
            continue
        remedy = "let that producer commit or abort; if it is gone for good, abort the transaction for it"
        found.append(Item(text, f"{remedy} (operations.md#a-transaction-stays-open)"))
    return found


def _unread_losses(states: Sequence[PartitionState]) -> Sequence[Item]:
    """Events that are lost, but that no bridge has noticed yet."""
    found: list[Item] = []
    for state in states:
        committed = state.committed
        if committed is None:
            continue
        place = f"{state.where.topic}/{state.where.partition}"
        if committed < state.start:
            count = state.start - committed
            text = f"{place}: Kafka's retention has dropped offsets {committed} to {state.start - 1} unread ({count:,})"
        elif committed > state.stable_end:
            text = f"{place}: the bridge has read to offset {committed}, and the topic ends at {state.stable_end}"
        else:
            continue
        found.append(Item(text, "start `segsvc bridge`, which notes what is lost (operations.md#events-were-lost)"))
    return found


def _recorded(services: EventRecords, kafka: KafkaState) -> Sequence[Item]:
    """Lost events that are not acknowledged, and dead letters that wait."""
    try:
        losses = services.records.losses()
        done = {
            topic: services.records.letters_done(topic, kafka.topic_id(topic))
            for topic in kafka.letter_topics()
            if kafka.partitions([topic])
        }
    except ServiceError as error:
        return [Item(f"lost events and dead letters are not counted ({error.reason.text})", "see the databases above")]
    letters = {topic: kafka.letters_waiting(topic, of_topic) for topic, of_topic in done.items()}
    return [
        *_losses(losses),
        *(
            Item(f"{topic}: {count:,} dead letters wait; see `segsvc events dead list --new`")
            for topic, count in letters.items()
            if count
        ),
    ]


def _losses(losses: Sequence[FoundLoss]) -> Sequence[Item]:
    by_cause: dict[tuple[str, str], list[FoundLoss]] = defaultdict(list)
    for found in losses:
        by_cause[found.loss.topic, found.loss.reason].append(found)
    items: list[Item] = []
    for (topic, reason), of_cause in by_cause.items():
        places = ", ".join(f"{one.loss.partition}: {one.loss.offsets}" for one in of_cause[:_PLACES_MAX])
        more = f" and {len(of_cause) - _PLACES_MAX} more" if len(of_cause) > _PLACES_MAX else ""
        counts = [one.loss.count_max for one in of_cause]
        known = [count for count in counts if count is not None]
        count = f"at most {sum(known):,} events" if len(known) == len(counts) else "an unknown number of events"
        text = f"{topic}: lost {count}, in partition {places}{more}: {reason}"
        remedy = "let their producers send them again, then `segsvc events lost acknowledge`"
        items.append(Item(text, f"{remedy} (operations.md#events-were-lost)"))
    return items
