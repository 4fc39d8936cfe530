"""The bridge: user events from Kafka become batches for the workers; offsets follow the effects.

    poll → parse → flow (topic, shard) → batch task → report → finished → offset commit

An offset is committed only when every event before it is finished: its effects are in PostgreSQL and the cache knows
(the worker's report says so), or its dead letter is acknowledged. So after any crash or loss the events come again
from the last commit; applying them twice has no effect.

What may fail at any time, and how the work goes on:

    Kafka              the client reconnects; a consumer that fails is replaced, and begins at the committed offsets
    the task broker    batches wait and are sent again; a batch without a result is sent again (``flows``)
    a shard, the cache the batches concerned wait; their topics pause when too much is held; all other batches go on
    a message          a message that cannot be read becomes a dead letter, whatever it is (``fetcher``)
    Kafka's retention  what it has dropped unread is noted in the catalog before the offset passes it (``event_watch``)
    this process       its partitions go to another member, or wait for its return
    the group moves    what is finished is committed before a partition is given up; the rest comes again elsewhere

Events are read here and not by the workers: reading and checking a usual event costs 1.5 µs (taking it from Kafka costs
2 µs), workers are scarcer than bridges, and an unreadable event has no shard to be sent to.
"""

from __future__ import annotations

import gc
import signal
import threading
import time
from collections.abc import Iterable, Mapping
from typing import Any, Final

from kafka import OffsetAndMetadata, TopicPartition
from kafka.consumer.subscription_state import AsyncConsumerRebalanceListener
from kafka.errors import KafkaError, RebalanceInProgressError

from segsvc import metrics
from segsvc.bootstrap import watch_shards
from segsvc.bridge.batches import FAULT, Unreadable
from segsvc.bridge.clients import make_consumer, quieten_client_log
from segsvc.bridge.dead_letters import DeadLetters
from segsvc.bridge.event_watch import EventWatch
from segsvc.bridge.flows import Batches, Flows
from segsvc.bridge.offsets import PartitionProgress
from segsvc.bridge.segment_events import SegmentEvents
from segsvc.bridge.waiting import Backoff, Waits
from segsvc.config import Settings
from segsvc.domain.event_records import Wait, WaitFor
from segsvc.domain.events import TOPICS, BadEvent, parse
from segsvc.domain.sharding import shard_of
from segsvc.failpoints import CrashPoints, failpoints
from segsvc.log import get_logger
from segsvc.postgres.installation.layout import LayoutWatch
from tasks import watchdog
from tasks.events import CeleryBatches
from tasks.pulse import Pulse

log = get_logger(__name__)

POLL_RECORDS_MAX: Final = 5000
POLL_BUSY_MS: Final = 10
"""While batches are under way: how soon their results are fetched when no events arrive."""
POLL_IDLE_MS: Final = 200
COMMIT_INTERVAL_S: Final = 0.5
COMMIT_TIMEOUT_MS: Final = 5_000
_KAFKA: Final = Wait(WaitFor.KAFKA, "Kafka")
_COMMIT: Final = Wait(WaitFor.KAFKA, "the offset commit")
LEAVE_TIMEOUT_S: Final = 10.0
"""Longest wait, when stopping, for batches that are with the workers. Without it no event is lost; some are applied
twice."""

HELD_BYTES_MAX: Final = 64 * 1024 * 1024
WINDOW_EVENTS_MAX: Final = 250_000
"""Most events of a topic between the first unfinished one and the last taken: the most that come again after a crash.
Each partition has an equal share of it, and no less than the next constant."""
WINDOW_EVENTS_MIN: Final = 2 * POLL_RECORDS_MAX
DEAD_EVENTS_MAX: Final = 2_000
DEAD_BYTES_MAX: Final = 4 * 1024 * 1024
"""Most dead letters of a partition that wait to be acknowledged."""


class BridgeConsumer:
    """One consumer and the state of its membership in the group. Replaced as a whole when it fails.

    Kafka-python calls the rebalance listener on a thread of its own, but only while ``poll`` or ``close`` waits for
    that call: so two threads never use the state here at once.
    """

    def __init__(
        self,
        settings: Settings,
        batches: Batches,
        dead_letters: DeadLetters,
        waits: Waits,
        watch: EventWatch,
        crash_points: CrashPoints,
    ) -> None:
        self._watch = watch
        self._dead_letters = dead_letters
        self._waits = waits
        self._crash = crash_points
        self._shard_count = settings.shard_count
        # Names on the brokers → names in the contract.
        self._topics = {settings.kafka_topic_prefix + topic: topic for topic in TOPICS}
        self._held_events_max = min(max(2 * settings.event_batch_max * settings.shard_count, 10_000), 100_000)
        self._progress: dict[TopicPartition, PartitionProgress] = {}
        self._full: set[str] = set()
        self._unsettled: set[TopicPartition] = set()
        """Partitions whose position was reset: nothing is committed before the loss is noted."""
        self._standing: set[Wait] = set()
        self._next_commit = 0.0
        self._flows = Flows(
            batches,
            dead_letters.put,
            waits,
            batch_max=settings.event_batch_max,
            in_flight_max=settings.event_batches_in_flight_max,
            busy_from=settings.event_worker_processes,
        )
        self._consumer = make_consumer(settings, POLL_RECORDS_MAX)
        listener: Any = _Listener(self)  # the stubs know only blocking listeners
        self._consumer.subscribe(topics=list(self._topics), listener=listener)

    # -- the loop ---------------------------------------------------------------------------------------------------

    def step(self) -> None:
        """One round: take events, take reports, send batches, commit, and pause partitions of which too much is held.

        Raises:
            KafkaError: the consumer failed; replace it.
        """
        busy = self._flows.in_flight or self._flows.held_back
        polled = self._consumer.poll(timeout_ms=POLL_BUSY_MS if busy else POLL_IDLE_MS)
        self._take(polled)
        self._follow_positions()
        self._flows.step(more=sum(map(len, polled.values())) >= POLL_RECORDS_MAX)
        self._after_step()

    def leave(self) -> None:
        """Take no more events, wait a while for the batches that are with the workers, commit, and leave the group."""
        deadline = time.monotonic() + LEAVE_TIMEOUT_S
        while self._flows.in_flight and time.monotonic() < deadline:
            self._consumer.pause(*self._consumer.assignment())
            # The membership must live until the commit; polling keeps it. Paused partitions bring no events. A
            # partition that was just assigned may bring some; they are not taken, and come again.
            self._consumer.poll(timeout_ms=POLL_BUSY_MS)
            self._flows.step(send=False)

        self._dead_letters.close(max(1.0, deadline - time.monotonic()))
        self._finish_dead()
        self._commit()
        self.close()

    def close(self) -> None:
        """Leave the group; events that are not committed come again."""
        for progress in self._progress.values():
            progress.lose()
        self._progress.clear()
        for what in self._standing:
            self._waits.ends(what)
        self._consumer.close(autocommit=False, timeout_ms=COMMIT_TIMEOUT_MS)

    def _after_step(self) -> None:
        self._finish_dead()
        if time.monotonic() >= self._next_commit:
            self._commit()
        self._pause_what_is_full()

    def _finish_dead(self) -> None:
        for taken in self._dead_letters.acknowledged():
            taken.partition.finish(taken)

    # -- taking -----------------------------------------------------------------------------------------------------

    def _take(self, polled: Mapping[TopicPartition, list[Any]]) -> None:
        for where, records in polled.items():
            topic = self._topics[where.topic]
            progress = self._progress.get(where)
            if progress is None:
                progress = self._start(where)
            elif records[0].offset < progress.next_offset and not _is_remark(records[0]):
                # The position was set back. Events taken before are still applied; new offsets do not follow theirs.
                progress = self._progress[where] = PartitionProgress(where.topic, where.partition)

            for record in records:
                if type(record) is Unreadable:
                    self._let_go(progress, topic, record)
                    continue
                try:
                    event = parse(topic, record.value)
                except BadEvent as bad:
                    taken = progress.take(record.offset, None, record.key, record.value)
                    self._dead_letters.put(taken, bad.reason)
                except Exception as error:
                    # A fault of ours. If raised, it would come again with this event for ever, and stop all events.
                    log.exception("event_not_read", topic=where.topic, partition=where.partition, offset=record.offset)
                    metrics.events_unreadable.labels(topic, FAULT).inc()
                    taken = progress.take(record.offset, None, record.key, record.value)
                    self._dead_letters.put(taken, f"event: reading it failed ({type(error).__name__})")
                else:
                    taken = progress.take(record.offset, event, record.key, record.value)
                    self._flows.add(taken, shard_of(event.user_id, self._shard_count))

    def _let_go(self, progress: PartitionProgress, topic: str, told: Unreadable) -> None:
        """Make a dead letter of what cannot be read; the partition goes on after it."""
        log.error(
            "event_unreadable",
            topic=progress.topic,
            partition=progress.partition,
            offset=told.offset,
            through=told.through,
            reason=told.reason,
            bytes=told.size,
        )
        metrics.events_unreadable.labels(topic, told.why).inc()

        if _is_remark(told):
            return
        taken = progress.take(told.offset, None, told.key, told.value, told.through)
        self._dead_letters.put_unreadable(taken, told)

    def _follow_positions(self) -> None:
        """Learn how far the client is, which positions it has reset, and which partitions stand still."""
        positions = self._consumer.positions()

        # Read after the positions: so each position among them that was reset is known to be reset.
        resets, self._consumer.fetcher.resets = self._consumer.fetcher.resets, []
        for reset in resets:
            self._unsettled.add(reset.where)
            self._watch.was_reset(reset)
        for where in self._watch.settled():
            self._unsettled.discard(where)

        for where in self._watch.to_read_again():
            if where in self._progress:
                self._progress[where] = PartitionProgress(where.topic, where.partition)
                self._consumer.seek_to_beginning(where)
                positions.pop(where, None)

        for where, offset in positions.items():
            progress = self._progress.get(where)
            if progress is not None and where not in self._unsettled:
                progress.pass_by(offset)

        standing = {
            Wait(WaitFor.MESSAGE, f"{where.topic}/{where.partition} offset {offset}", where.topic): reason
            for where, (offset, reason) in self._consumer.fetcher.trials.standing.items()
        }
        for what in self._standing - standing.keys():
            self._waits.ends(what)
        for what, reason in standing.items():
            self._waits.begins(what, reason)
        self._standing = set(standing)
        metrics.event_partitions_standing.set(len(standing))

    def _start(self, where: TopicPartition) -> PartitionProgress:
        self._lose([where])
        progress = self._progress[where] = PartitionProgress(where.topic, where.partition)
        return progress

    def _lose(self, partitions: Iterable[TopicPartition]) -> None:
        for where in partitions:
            self._unsettled.discard(where)
            self._consumer.fetcher.trials.forget(where)
            self._watch.released(where)
            progress = self._progress.pop(where, None)
            if progress is not None:
                progress.lose()

    def _pause_what_is_full(self) -> None:
        """Stop fetching a topic of which too much is held, until half of it is gone; and partitions that rest.

        The whole topic is paused, since each of its partitions holds events of all shards: pausing one partition would
        not help the rest. An event that waits for its dead letter holds up its own partition alone, and so does one
        that must be fetched again.
        """
        paused = self._consumer.paused()
        full = self._consumer.fetcher.trials.resting

        for topic in self._topics:
            held = {where: progress for where, progress in self._progress.items() if where.topic == topic}
            fullness = max(
                sum(progress.unfinished_events for progress in held.values()) / self._held_events_max,
                sum(progress.held_bytes for progress in held.values()) / HELD_BYTES_MAX,
            )
            if fullness >= 1:
                self._full.add(topic)
            elif fullness <= 0.5:
                self._full.discard(topic)

            window_max = max(WINDOW_EVENTS_MAX // max(1, len(held)), WINDOW_EVENTS_MIN)
            for where, progress in held.items():
                fullness = max(
                    progress.window_events / window_max,
                    progress.dead_events / DEAD_EVENTS_MAX,
                    progress.dead_bytes / DEAD_BYTES_MAX,
                )
                if topic in self._full or fullness >= (0.5 if where in paused else 1):
                    full.add(where)

        assigned = self._consumer.assignment()
        full &= assigned
        if full - paused:
            self._consumer.pause(*(full - paused))
        if (paused & assigned) - full:
            self._consumer.resume(*((paused & assigned) - full))

    # -- committing -------------------------------------------------------------------------------------------------

    def _committable(self, partitions: Iterable[TopicPartition]) -> dict[TopicPartition, int]:
        offsets = {}
        for where in partitions:
            progress = self._progress.get(where)
            offset = progress.committable() if progress and where not in self._unsettled else None
            if offset is not None:
                offsets[where] = offset
        return offsets

    def _commit(self) -> None:
        self._next_commit = time.monotonic() + COMMIT_INTERVAL_S
        offsets = self._committable(list(self._progress))
        if not offsets:
            return

        self._crash.reach("bridge-before-commit")
        try:
            self._consumer.commit(_with_metadata(offsets), timeout_ms=COMMIT_TIMEOUT_MS)
        except RebalanceInProgressError:
            return  # partitions that stay ours are committed later; those that move were committed in ``give_up``
        except KafkaError as error:
            # The state stays as it is: it is dropped when, and only when, the client says that the partitions are
            # lost. Dropping it here could commit past events that this consumer has taken and not finished.
            self._waits.begins(_COMMIT, type(error).__name__)
            return

        self._waits.ends(_COMMIT)
        for where, offset in offsets.items():
            self._progress[where].committed(offset)
        self._watch.committed(offsets)

    # -- rebalance --------------------------------------------------------------------------------------------------

    async def give_up(self, partitions: Iterable[TopicPartition]) -> None:
        """Partitions are going to another member: commit what is finished, forget the rest."""
        partitions = list(partitions)
        offsets = self._committable(partitions)
        if offsets:
            try:
                await self._consumer.commit_async(_with_metadata(offsets))
            except KafkaError as error:
                # The next owner applies these events once more.
                log.warning("not_committed_when_revoked", reason=type(error).__name__)
        self._lose(partitions)

    def begin(self, partitions: Iterable[TopicPartition]) -> None:
        """Partitions are ours from their committed offsets on."""
        for where in partitions:
            self._start(where)

    def forget(self, partitions: Iterable[TopicPartition]) -> None:
        """Partitions were taken away: another member may read them already, so nothing may be committed."""
        self._lose(partitions)


def _is_remark(record: Any) -> bool:
    """Whether this stands for no message, only for a fault in the batch before it."""
    return type(record) is Unreadable and record.through < record.offset


def _with_metadata(offsets: Mapping[TopicPartition, int]) -> dict[TopicPartition, OffsetAndMetadata]:
    return {where: OffsetAndMetadata(offset, "", -1) for where, offset in offsets.items()}


class _Listener(AsyncConsumerRebalanceListener):
    """Asynchronous, because the client refuses a blocking commit within a rebalance."""

    def __init__(self, bridge: BridgeConsumer) -> None:
        self._bridge = bridge

    async def on_partitions_revoked(self, revoked: Iterable[TopicPartition]) -> None:
        await self._bridge.give_up(revoked)

    async def on_partitions_assigned(self, assigned: Iterable[TopicPartition]) -> None:
        self._bridge.begin(assigned)

    async def on_partitions_lost(self, lost: Iterable[TopicPartition]) -> None:
        self._bridge.forget(lost)


pulse: Final = Pulse()
"""The pulse of this process's bridge."""


class Bridge:
    """Runs consumers, one after another, until it is stopped."""

    def __init__(self, settings: Settings, batches: Batches, crash_points: CrashPoints) -> None:
        self._settings = settings
        self._batches = batches
        self._crash = crash_points
        self._waits = Waits()

    def run(self, stop: threading.Event) -> None:
        """Bridge events until ``stop`` is set; then leave in good order."""
        watch = EventWatch(self._settings, self._waits)
        watch.start()
        try:
            self._run(stop, watch)
        finally:
            watch.stop()

    def _run(self, stop: threading.Event, watch: EventWatch) -> None:
        backoff = Backoff(0.5, 5.0)
        pulse.begins()
        shards = watch_shards(self._settings)
        shards.start()
        try:
            while not stop.is_set():
                pulse.went_round()
                self._run_consumer(stop, watch, shards, backoff)
        finally:
            shards.close()

    def _run_consumer(self, stop: threading.Event, watch: EventWatch, shards: LayoutWatch, backoff: Backoff) -> None:
        """Run one consumer until it fails, the bridge stops, or the shards have doubled: a consumer groups events by
        shard, so a new one takes again what the old one leaves."""
        settings = shards.settings
        dead_letters = DeadLetters(self._settings)
        watch.dead_letter_waits = dead_letters.waits
        consumer: BridgeConsumer | None = None

        try:
            consumer = BridgeConsumer(settings, self._batches, dead_letters, self._waits, watch, self._crash)
            self._waits.ends(_KAFKA)
            while not stop.is_set() and shards.settings is settings:
                consumer.step()
                pulse.went_round()
                backoff.succeeded()
            consumer.leave()
        except (KafkaError, OSError) as error:
            # A consumer that failed may be in any state; a new one begins at the committed offsets.
            self._waits.begins(_KAFKA, type(error).__name__)
            self._after_failure(consumer, backoff, stop)
        except Exception:
            # A fault of ours or of the client. Beginning again loses no event. If one event could stop the bridge
            # for good, it would stop all other events too.
            log.exception("consumer_failed")
            self._after_failure(consumer, backoff, stop)
        finally:
            dead_letters.close(timeout_s=1.0)

    @staticmethod
    def _after_failure(consumer: BridgeConsumer | None, backoff: Backoff, stop: threading.Event) -> None:
        if consumer is not None:
            try:
                consumer.close()
            except (KafkaError, OSError, RuntimeError) as error:
                log.debug("consumer_not_closed", exc_info=error)
        backoff.failed(0.0)
        stop.wait(backoff.ready_at)


def stop_on_signals(stop: threading.Event, ends: watchdog.Watchdog) -> None:
    """Set ``stop`` on SIGTERM and SIGINT, and have the end watched. Called by the main thread."""

    def end(*_: object) -> None:
        ends.process_ends()
        stop.set()

    for number in (signal.SIGTERM, signal.SIGINT):
        signal.signal(number, end)


def run_bridge(settings: Settings) -> None:
    """The process ``segsvc bridge``: bridges user events, and publishes segment events, until SIGTERM or SIGINT.

    Goes on by itself after any outage of Kafka, the broker, the cache or a database.
    """
    quieten_client_log()
    stop = threading.Event()
    ends = watchdog.Watchdog(pulse, end_within_s=watchdog.END_WITHIN_S, still_max_s=watchdog.STILL_MAX_S)
    ends.start()
    stop_on_signals(stop, ends)

    segment_events = SegmentEvents(settings, stop)
    segment_events.start()
    # Objects that exist by now stay; the garbage collector need not check them while thousands of events come and go.
    gc.freeze()

    log.info("bridge_started", brokers=settings.kafka_bootstrap_servers, group=settings.kafka_group)
    try:
        Bridge(settings, CeleryBatches(), failpoints(settings.failpoint_dir)).run(stop)
    finally:
        ends.process_ends()
        stop.set()
        segment_events.join()
        log.info("bridge_stopped")
