"""Publishes what happened to segments: the audit trail is the outbox of the topic ``segment-events``.

Each entry is published at least once, after its commit, in the order of ``seq``. A message may come twice (if a
publisher died between the broker's acknowledgement and the mark); it is then the same message, with the same ``seq``.
"""

from __future__ import annotations

import json
from collections.abc import Mapping, Sequence
from contextlib import AbstractContextManager
from typing import Any, Protocol

from segsvc.domain.audit import AuditEntry

BATCH_MAX = 200
"""Messages between two marks: the most that come twice after a crash."""


class OutboxClaim(Protocol):
    """Entries that this publisher alone may publish, until its transaction ends."""

    @property
    def entries(self) -> Sequence[AuditEntry]:
        """The oldest unpublished entries in order; none if another publisher holds the claim."""

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
            How many of the first messages are acknowledged. Fewer than given: the broker is out of reach, or refuses.
        """


class Outbox:
    """Publishes the audit entries that commits have written to the catalog."""

    def __init__(self, store: OutboxStore, publisher: SegmentEventPublisher) -> None:
        self._store = store
        self._publisher = publisher

    def publish_pending(self) -> tuple[int, bool]:
        """Publish the oldest unpublished entries.

        Returns:
            How many were published, and whether some could not be: try again later.

        Raises:
            ServiceError: CATALOG_UNAVAILABLE.
        """
        with self._store.claim(BATCH_MAX) as claim:
            entries = claim.entries
            if not entries:
                return 0, False

            # The transaction is open until the broker answers, so no publisher publishes a later entry before these are
            # marked. It holds an advisory lock of its own and nothing else: no operation waits for it.
            acknowledged = self._publisher.publish([(entry.slug, message_of(entry)) for entry in entries])
            if acknowledged:
                claim.mark_published(entries[acknowledged - 1].seq)
        return acknowledged, acknowledged < len(entries)


def message_of(entry: AuditEntry) -> bytes:
    """The message: ``seq``, ``type``, ``slug``, ``time``, ``operation`` (if one did it), ``actor`` (if it has a name),
    and the entry's details."""
    message: dict[str, Any] = {
        "seq": entry.seq,
        "type": entry.action,
        "slug": entry.slug,
        "time": entry.time.isoformat(),
    }
    if entry.operation_id is not None:
        message["operation"] = f"operations/{entry.operation_id}"
    if entry.actor:
        message["actor"] = entry.actor
    details: Mapping[str, Any] = {key: value for key, value in entry.details.items() if key not in message}
    return json.dumps({**message, **details}, ensure_ascii=False, separators=(",", ":")).encode()
