"""What ``segsvc doctor`` says of user events: how many wait, for what, which are dead, which are lost."""

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
from segsvc.domain.errors import ServiceError
from segsvc.domain.event_records import FoundLoss

WATCH_S: Final = 5.0
"""For how long a lag that does not move is watched before anything is made of it."""
WATCH_MAX_S: Final = 20.0
"""The same where nobody says what it waits for: a batch may be on its way for 15 s, an operation may hold the shard."""
_WATCH_STEP_S: Final = 0.25
_READ_S: Final = 3.0
TRANSACTION_MAX_S: Final = 60.0
"""How long a producer's transaction may be open, unless it is told otherwise (``transaction.timeout.ms``)."""
_PASSING: Final = frozenset({"LOCK_TIMEOUT", "BATCH_LOST"})
"""Reasons to wait that usually pass by themselves within seconds."""
_PLACES_MAX: Final = 5
_RUNBOOK: Final = "operations.md#events-do-not-arrive"


@dataclass(frozen=True, slots=True)
class Seen:
    """What was seen of the event topics.

    Attributes:
        stuck: of each partition that did not move while it was watched, how many events wait.
        moving: likewise of those that did, or that nothing waits in.
        open_transactions: partitions whose first unread message belongs to a transaction, which did not end meanwhile;
            that offset, the messages from there on, and for how many seconds it is open, if that is known.
    """

    stuck: Mapping[TopicPartition, int]
    moving: Mapping[TopicPartition, int]
    open_transactions: Mapping[TopicPartition, tuple[int, int, float | None]]


class EventTopics:
    """Looks at the topics of user events. Used once.

    Args:
        committed: asks for what may be read; and for all there is (``everything``).
    """

    def __init__(
        self, committed: KafkaState, everything: KafkaState, clock: Callable[[], float] = time.monotonic
    ) -> None:
        self._kafka = committed
        self._everything = everything
        self._clock = clock
        self.partitions = committed.partitions(committed.event_topics())
        self._begun = clock()
        self.first = self._states()
        self._ends = self._high_ends()
        self._last = self.first
        self._still = {where for where, state in self.first.items() if state.lag}
        self._open = {where for where, state in self.first.items() if state.stable_end < self._ends[where]}

    def _states(self) -> dict[TopicPartition, PartitionState]:
        return {state.where: state for state in self._kafka.states(self.partitions)}

    def _high_ends(self) -> dict[TopicPartition, int]:
        return {where: end for where, (_, end) in self._everything.ranges(self.partitions).items()}

    def watch(self, seconds: float, *, transactions: bool = True) -> None:
        """Watch what does not move until it does, until so many seconds after the beginning at most.

        Args:
            transactions: whether to watch open transactions, too.
        """
        while (self._still or (transactions and self._open)) and self._clock() - self._begun < seconds:
            time.sleep(_WATCH_STEP_S)
            self._last = self._states()
            for where, state in self._last.items():
                before = self.first[where]
                if state.lag == 0 or (state.committed or 0) > (before.committed or 0):
                    self._still.discard(where)
                if state.stable_end != before.stable_end:
                    self._open.discard(where)

    @property
    def still(self) -> bool:
        """Whether something waits that did not move."""
        return bool(self._still)

    def count(self) -> None:
        """Leave out what is no event: the offsets of markers and of aborted events wait for nobody."""
        starts = {where: max(self._last[where].start, self._last[where].committed or 0) for where in self._still}
        ends = {where: self._last[where].stable_end for where in self._still}
        counts = self._kafka.read(starts, ends, _READ_S) if starts else {}
        self._counts = {where: counts.get(where, ends[where] - starts[where]) for where in self._still}
        self._still = {where for where, count in self._counts.items() if count}

    def seen(self) -> Seen:
        """What was seen; ``count`` first."""
        stuck = {where: self._counts[where] for where in self._still}
        moving = {where: self._last[where].lag for where in self.partitions if where not in self._counts}
        transactions: dict[TopicPartition, tuple[int, int, float | None]] = {}
        for where in sorted(self._open):
            offset = self._last[where].stable_end
            written = self._everything.first_time(where, offset, _READ_S)
            age_s = None if written is None else max(0.0, time.time() - written)
            transactions[where] = (offset, self._ends[where] - offset, age_s)
        return Seen(stuck, moving, transactions)


def items(settings: Settings, members: Callable[[], int | None]) -> Sequence[Item]:
    """All that there is to say of user events.

    Args:
        members: how many bridges are in the group; None: the brokers cannot be asked.

    Raises:
        KafkaError, OSError: the brokers broke off.
    """
    services = EventRecords(settings)
    committed = everything = None
    try:
        committed = KafkaState(settings, 500)
        everything = KafkaState(settings, 1, read_uncommitted=True)
        topics = EventTopics(committed, everything)
        topics.watch(WATCH_S)
        waits = _waits(services) if topics.still else {}
        bridges = members() if topics.still else None
        if topics.still and bridges != 0 and not set(waits.values()) - _PASSING:
            topics.watch(WATCH_MAX_S, transactions=False)
            waits = _waits(services)
        topics.count()
        seen = topics.seen()
        return [
            *_waiting(settings, committed, seen, waits, bridges),
            *_transactions(seen),
            *_passed_by(list(topics.first.values())),
            *_of_catalog(services, committed),
        ]
    finally:
        for kafka in (committed, everything):
            if kafka is not None:
                kafka.close()
        services.close()


def _waits(services: EventRecords) -> Mapping[str, str]:
    """What the bridges say that they wait for. They say it in the catalog, so without that, that is all there is."""
    try:
        return services.records.waits()
    except ServiceError as error:
        return {"the catalog": error.reason.text}


def _waiting(
    settings: Settings, kafka: KafkaState, seen: Seen, waits: Mapping[str, str], bridges: int | None
) -> Sequence[Item]:
    found: list[Item] = []
    for topic in kafka.event_topics():
        moving = sum(count for where, count in seen.moving.items() if where.topic == topic)
        stuck = {where.partition: count for where, count in seen.stuck.items() if where.topic == topic}
        if not any(where.topic == topic for where in (*seen.moving, *seen.stuck)):
            continue  # there is no such topic, as is said above
        if not stuck:
            found.append(Item(f"{topic}: {moving:,} events wait" + (", and move" if moving else "")))
            continue
        numbers = ", ".join(map(str, sorted(stuck)))
        where = f"partition{'s' if len(stuck) > 1 else ''} {numbers}"
        text = f"{topic}: {sum(stuck.values()):,} events wait in {where}, and do not become fewer"
        cause, remedy = _cause(settings, topic, waits, bridges)
        found.append(Item(f"{text}: {cause}", f"{remedy} ({_RUNBOOK})"))
    return found


def _cause(settings: Settings, topic: str, waits: Mapping[str, str], bridges: int | None) -> tuple[str, str]:
    """Why the events of a topic wait, and what to do."""
    if bridges == 0:
        return f"nobody is in the consumer group {settings.kafka_group}", "start `segsvc bridge`, or read its log"
    concerned = {what: reason for what, reason in waits.items() if _concerns(what, topic, settings)}
    if not concerned:
        return (
            "nobody says for what",
            "look whether `segsvc worker --queue events` runs and an operation holds the shards, and read their logs",
        )
    said = "; ".join(f"{what} ({reason})" for what, reason in sorted(concerned.items()))
    remedies = dict.fromkeys(_remedy(what, reason) for what, reason in sorted(concerned.items()))
    return f"the bridge waits for {said}", "; ".join(remedies)


def _concerns(what: str, topic: str, settings: Settings) -> bool:
    """Whether what a bridge waits for can hold up events of this topic."""
    others = {name for name in _names(settings) if name != topic}
    return not any(what.startswith((f"{name}/", f"{name} of ")) or f" {name}.dlq," in what for name in others)


def _names(settings: Settings) -> Sequence[str]:
    from segsvc.domain.events import TOPICS  # noqa: PLC0415

    return [settings.kafka_topic_prefix + topic for topic in TOPICS]


def _remedy(what: str, reason: str) -> str:
    if what.startswith("shard "):
        if reason in _PASSING:
            return "an operation holds that shard: see what is in doubt above"
        return "bring that shard back, and nothing else: its events go on by themselves"
    if "max.message.bytes" in what or what == "the dead-letter topics":
        return "mend the dead-letter topic: a letter must be there before its event is passed over"
    if " offset " in what:
        return "something at that offset cannot be read, or the brokers do not give it out: read the bridge's log"
    if what == "the task broker":
        return "see the broker above"
    if what == "the catalog":
        return "see the databases above"
    if "CACHE" in reason:
        return "see the cache above"
    return "read the bridge's log and the events worker's"


def _transactions(seen: Seen) -> Sequence[Item]:
    """Events that a producer has sent and not committed are not ours to read yet: that is no lag."""
    found: list[Item] = []
    for where, (offset, count, age_s) in seen.open_transactions.items():
        place = f"{where.topic}/{where.partition}"
        since = "" if age_s is None else f", open for {age_s:,.0f} s"
        text = f"{place}: {count:,} messages from offset {offset} on are behind a producer's transaction{since}"
        if age_s is None or age_s <= TRANSACTION_MAX_S:
            found.append(Item(text))
            continue
        remedy = "let that producer commit or abort; if it is gone for good, abort the transaction for it"
        found.append(Item(text, f"{remedy} (operations.md#a-transaction-stays-open)"))
    return found


def _passed_by(states: Sequence[PartitionState]) -> Sequence[Item]:
    """What is lost already, though no bridge has come to notice it."""
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


def _of_catalog(services: EventRecords, kafka: KafkaState) -> Sequence[Item]:
    """Gaps that nobody has acknowledged, and dead letters that wait."""
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
        count = f"at most {sum(known):,} events" if len(known) == len(counts) else "events, nobody knows how many"
        text = f"{topic}: lost {count}, in partition {places}{more}: {reason}"
        remedy = "let their producers send them again, then `segsvc events lost acknowledge`"
        items.append(Item(text, f"{remedy} (operations.md#events-were-lost)"))
    return items
