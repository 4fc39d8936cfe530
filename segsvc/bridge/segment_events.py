"""The topic ``segment-events``: a thread of the bridge that publishes the events which the catalog's commits stored."""

from __future__ import annotations

import threading
from collections.abc import Sequence
from typing import Final

from segsvc.bootstrap import OutboxServices
from segsvc.bridge.clients import Sender
from segsvc.bridge.waiting import Backoff, Waits
from segsvc.config import Settings
from segsvc.domain.errors import ServiceError
from segsvc.domain.event_records import Wait, WaitFor
from segsvc.domain.events import SEGMENT_EVENTS_TOPIC
from segsvc.log import get_logger

log = get_logger(__name__)

_PUBLISHING: Final = Wait(WaitFor.OTHER, "publishing segment events")

INTERVAL_S: Final = 1.0
"""How often the catalog is read again after it had no events."""


class KafkaSegmentEvents:
    """Implements ``services.outbox.SegmentEventPublisher``."""

    def __init__(self, settings: Settings) -> None:
        self.sender = Sender(settings)
        self._topic = settings.kafka_topic_prefix + SEGMENT_EVENTS_TOPIC

    def publish(self, messages: Sequence[tuple[str, bytes]]) -> int:
        """See ``services.outbox.SegmentEventPublisher.publish``."""
        acknowledged = self.sender.send(self._topic, [(key.encode(), value, []) for key, value in messages])
        return acknowledged.index(False) if False in acknowledged else len(acknowledged)


class SegmentEvents(threading.Thread):
    """Publishes until ``stop`` is set. Several bridges may run: only one publishes at a time."""

    def __init__(self, settings: Settings, stop: threading.Event) -> None:
        super().__init__(name="segment-events", daemon=True)
        self._settings = settings
        self._stop_event = stop

    def run(self) -> None:
        """Thread body."""
        publisher = KafkaSegmentEvents(self._settings)
        services = OutboxServices(self._settings, publisher=publisher)
        backoff = Backoff(INTERVAL_S, 10.0)
        waits = Waits()

        pause_s = 0.0
        while not self._stop_event.wait(pause_s):
            try:
                published, failed = services.outbox.publish_pending()
            except ServiceError as error:
                failed, reason = True, error.reason.text
            except Exception:
                # A fault of ours, or a catalog that is not migrated yet. Nothing is lost: the entries stay unpublished.
                log.exception("segment_events_failed")
                failed, reason = True, "an internal error"
            else:
                reason = publisher.sender.failure
                pause_s = 0.0 if published else INTERVAL_S

            if failed:
                backoff.failed(0.0)
                pause_s = backoff.ready_at
                waits.begins(_PUBLISHING, reason)
            else:
                backoff.succeeded()
                waits.ends(_PUBLISHING)

        publisher.sender.close()
        services.close()
