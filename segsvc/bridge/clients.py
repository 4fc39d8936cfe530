"""Kafka clients as the bridge needs them, for a real broker and for the stand-in alike."""

from __future__ import annotations

import logging
from collections.abc import Sequence
from typing import Any, Final

from kafka import KafkaConsumer, KafkaProducer, TopicPartition
from kafka.coordinator.assignors.cooperative_sticky import CooperativeStickyAssignor
from kafka.errors import InvalidRecordError, KafkaError, MessageSizeTooLargeError, RecordListTooLargeError

from segsvc.bridge.fetcher import make_safe
from segsvc.bridge.waiting import Sparse
from segsvc.config import Settings
from segsvc.kafka_options import connection_options
from segsvc.log import get_logger

log = get_logger(__name__)

SEND_TIMEOUT_S: Final = 10.0
"""Longest wait for a message's acknowledgement before the message is sent again."""
CLOSE_TIMEOUT_S: Final = 2.0
"""Longest wait for a producer's thread to end."""
REQUEST_BYTES_MAX: Final = 64 * 1024 * 1024
"""Largest request of a producer: far above what topics allow, since the broker decides which message is too large."""


def _common(settings: Settings) -> dict[str, Any]:
    return {
        **connection_options(settings),
        "bootstrap_timeout_ms": 5_000,
        "request_timeout_ms": 10_000,
        # The client reconnects soon after an outage: the default delay grows to half a minute.
        "reconnect_backoff_max_ms": 1_000,
        # A topic that is created later is noticed.
        "metadata_max_age_ms": 10_000,
        "allow_auto_create_topics": settings.kafka_stand_in,
        "metrics_enabled": False,
    }


class GroupConsumer(KafkaConsumer):
    """A consumer that finishes what it began. It makes up for two faults of kafka-python 3.0.12:

    The group's leader joins again when a topic appears or grows. If ``poll`` times out between the two halves of that
    join, the client considers the join unneeded, because it has noted the new metadata already: the assignment is never
    taken, no heartbeat is sent, and the member stays outside its group for ever.

    When a partition is paused after some of its fetched records were given out, the client puts the rest of them aside.
    It takes them up again only when it holds no other fetched records, and records that are used up still count as
    held: once it holds such records, the partition is never read again.
    """

    def poll(self, *args: Any, **options: Any) -> Any:
        """As ``KafkaConsumer.poll``."""
        coordinator, fetcher = self.__dict__["_coordinator"], self.__dict__["_fetcher"].__dict__
        if coordinator.rejoining and not coordinator.need_rejoin():
            coordinator.request_rejoin()  # waits for the join that is under way; begins a new one if that has ended
        if not fetcher["_next_partition_records"]:  # used up: they are false then
            fetcher["_next_partition_records"] = None
        return super().poll(*args, **options)

    def __init__(self, **options: Any) -> None:
        super().__init__(**options)
        self.fetcher: Final = make_safe(self)

    def positions(self) -> dict[TopicPartition, int]:
        """For each assigned partition with a known position: the offset after everything that ``poll`` has given out.

        A message before this offset that was not given out is no event: it is a transaction's marker, or belongs to a
        transaction that was aborted.
        """
        subscription = self.__dict__["_subscription"]
        found: dict[TopicPartition, int] = {}
        for where in self.assignment():
            state = subscription.assignment.get(where)
            if state is not None and state.has_valid_position and not state.awaiting_reset:
                found[where] = state.position.offset
        return found


def make_consumer(settings: Settings, max_poll_records: int, *, read_uncommitted: bool = False) -> GroupConsumer:
    """A member of the bridge's group, not yet subscribed.

    Args:
        read_uncommitted: also read messages of transactions that are not committed yet, or never will be.

    Raises:
        KafkaError: the brokers cannot be reached.
    """
    # The stubs want the assignor's class; the client wants an instance.
    assignors: list[Any] = [CooperativeStickyAssignor()]
    return GroupConsumer(
        **_common(settings),
        group_id=settings.kafka_group,
        client_id="segsvc-bridge",
        enable_auto_commit=False,
        # A new group begins with the first event in the topic: none may be missed.
        auto_offset_reset="earliest",
        # An event of a transaction that was aborted never happened.
        isolation_level="read_uncommitted" if settings.kafka_stand_in or read_uncommitted else "read_committed",
        # Only partitions that move are interrupted when a bridge comes or goes.
        partition_assignment_strategy=assignors,
        max_poll_records=max_poll_records,
        # A bridge that was killed is replaced within session_timeout; a stuck one within max_poll_interval.
        session_timeout_ms=10_000,
        heartbeat_interval_ms=2_000,
        max_poll_interval_ms=120_000,
    )


def make_producer(settings: Settings) -> KafkaProducer:
    """A producer whose messages are acknowledged by all replicas and keep their order.

    Raises:
        KafkaError: the brokers cannot be reached.
    """
    return KafkaProducer(
        **_common(settings),
        client_id="segsvc-bridge",
        acks="all",
        enable_idempotence=not settings.kafka_stand_in,
        # Idempotence keeps the order by itself; without it, only sending one request at a time keeps the order.
        max_in_flight_requests_per_connection=1 if settings.kafka_stand_in else 5,
        linger_ms=5,
        max_block_ms=5_000,
        delivery_timeout_ms=int(SEND_TIMEOUT_S * 1000) + 1_000,
        max_request_size=REQUEST_BYTES_MAX,
    )


_REFUSALS: Final = (MessageSizeTooLargeError, RecordListTooLargeError, InvalidRecordError)
"""A message that failed with one of these errors fails again, until the message or its topic is changed."""

Message = tuple[bytes | None, bytes | None, list[tuple[str, bytes]]]
"""Key, value and headers."""


class Sender:
    """Sends messages and waits for their acknowledgements. Connects at the first message, and again after a failure.

    Used by one thread.
    """

    def __init__(self, settings: Settings) -> None:
        self._settings = settings
        self._producer: KafkaProducer | None = None
        self.failure = ""
        """Why a message failed most recently; for the log."""
        self.too_large = False
        """Whether the last ``send`` had a message that was refused for its content or size: most often, it is too
        large."""

    def send(self, topic: str, messages: Sequence[Message]) -> list[bool]:
        """Send (key, value, headers) messages, in order. Returns, for each message, whether it was acknowledged."""
        futures: list[Any] = []
        # The client refuses some messages before it sends them; the broker refuses some after.
        raised: BaseException | None = None

        try:
            if self._producer is None:
                self._producer = make_producer(self._settings)
            for key, value, headers in messages:
                futures.append(self._producer.send(topic, key=key, value=value, headers=headers))
            self._producer.flush(timeout=SEND_TIMEOUT_S)
        except (KafkaError, OSError) as error:
            raised = error
        except Exception as error:
            # Kafka-python reads a topic's metadata more than once for a message, and raises a ValueError or TypeError
            # if the topic is deleted in between. The caller must survive that, and sends again.
            log.exception("producer_failed", topic=topic)
            raised = error

        acknowledged = [future.succeeded() for future in futures] + [False] * (len(messages) - len(futures))
        errors = [future.exception for future in futures if future.failed()]
        if raised is not None:
            errors.append(raised)
        self.too_large = any(isinstance(error, _REFUSALS) for error in errors)

        if not all(acknowledged):
            self.failure = type(errors[-1]).__name__ if errors else "KafkaTimeoutError"
            # We send the producer's unsent messages again, in order; once it is closed, it cannot send them as well.
            self.close()
        return acknowledged

    def close(self) -> None:
        """Drop the producer and the messages that it has not sent."""
        producer, self._producer = self._producer, None
        if producer is None:
            return

        # Kafka-python 3.0.12: ``close`` first waits until all messages are sent, and if they are not sent in time it
        # raises, while its thread still sends. So the thread is first made to give up all messages.
        producer.__dict__["_sender"].force_close()
        try:
            producer.close(timeout=CLOSE_TIMEOUT_S)
        except Exception as error:  # noqa: BLE001  # there is nothing more to do with any error: a new one is made
            log.warning("producer_still_closing", reason=type(error).__name__)  # its thread ends when it can


def quieten_client_log() -> None:
    """Make kafka-python log an outage now and then instead of at every attempt to reconnect."""
    library = logging.getLogger("kafka")
    library.handlers[:] = [Sparse(logging.getLogger("kafka-client"))]
    library.propagate = False
    library.setLevel(logging.WARNING)
