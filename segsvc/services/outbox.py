"""What happened to segments, told to the world: the audit trail is the outbox of the topic ``segment-events``.

At least once, after the commit, in the order of ``seq``. A message may come twice (a publisher died between the
broker's acknowledgement and the mark); it is then the same message, and ``seq`` tells.
"""

from __future__ import annotations

import json
from collections.abc import Mapping, Sequence
from contextlib import AbstractContextManager
from typing import Any, Protocol

from segsvc.domain.audit import AuditEntry

BATCH_MAX = 200
"""Messages between two marks: after a crash so many come twice at most."""


class OutboxClaim(Protocol):
    """Entries that this publisher alone may publish, until its transaction ends."""

    @property
    def entries(self) -> Sequence[AuditEntry]:
        """The oldest unpublished ones in order; none if another publisher is at it."""

    def mark_published(self, up_to_seq: int) -> None:
        """Note that the entries up to this one are on the topic."""


class OutboxStore(Protocol):
    def claim(self, entries_max: int) -> AbstractContextManager[OutboxClaim]:
        """Open a transaction that keeps other publishers out.

        Raises:
            ServiceError: CATALOG_UNAVAILABLE.
        """


class SegmentEventPublisher(Protocol):
    def publish(self, messages: Sequence[tuple[str, bytes]]) -> int:
        """Put (key, value) messages on the topic, in order.

        Returns:
            how many from the front are acknowledged. Fewer than given: the broker is out of reach, or refuses.
        """


class Outbox:
    """Publishes what the catalog's commits left behind."""

    def __init__(self, store: OutboxStore, publisher: SegmentEventPublisher) -> None:
        self._store = store
        self._publisher = publisher

    def publish_pending(self) -> tuple[int, bool]:
        """Publish the oldest unpublished entries.

        Returns:
            how many were published, and whether something went wrong with those left: try again later.

        Raises:
            ServiceError: CATALOG_UNAVAILABLE.
        """
        with self._store.claim(BATCH_MAX) as claim:
            entries = claim.entries
            if not entries:
                return 0, False
            # The transaction is open while the broker answers, so nobody publishes a later entry before these are
            # marked. It holds an advisory lock of its own and nothing else: no operation waits for it.
            acknowledged = self._publisher.publish([(entry.slug, message_of(entry)) for entry in entries])
            if acknowledged:
                claim.mark_published(entries[acknowledged - 1].seq)
        return acknowledged, acknowledged < len(entries)


def message_of(entry: AuditEntry) -> bytes:
    """The message: ``seq``, ``type``, ``slug``, ``time``, ``operation`` (of operations), and what the entry tells."""
    message: dict[str, Any] = {
        "seq": entry.seq,
        "type": entry.action,
        "slug": entry.slug,
        "time": entry.time.isoformat(),
    }
    if entry.operation_id is not None:
        message["operation"] = f"operations/{entry.operation_id}"
    details: Mapping[str, Any] = {key: value for key, value in entry.details.items() if key not in message}
    return json.dumps({**message, **details}, ensure_ascii=False, separators=(",", ":")).encode()
