"""Sends operations as chords, from fronts and workers alike."""

from __future__ import annotations

from collections.abc import Sequence
from typing import Any

from celery import Celery, Signature, chord
from kombu.exceptions import OperationalError
from redis.exceptions import RedisError

from segsvc.domain.errors import broker_unavailable
from segsvc.domain.operation import Operation
from tasks.logs import caused_by

PREPARE_SHARD = "segsvc.prepare_shard"
FINALIZE = "segsvc.finalize"
CHECK_TIMEOUT_S = 0.5
"""A PING takes milliseconds. After a failed check the caller still has to answer its call, with the reason."""


class CeleryDispatcher:
    """Implements ``twophase.Dispatcher`` and ``services.acceptance.Broker``."""

    def __init__(self, app: Celery) -> None:
        self._app = app

    def dispatch(self, operation: Operation, shards: Sequence[int]) -> None:
        """Send one header task for each of these shards, then the finalizer; all under one readable root id.

        Raises:
            ServiceError: BROKER_UNAVAILABLE; some of the messages may have been sent.
        """
        # Publishing waits and tries again for longer than a caller with a deadline can wait.
        self.check()

        root_id = f"{operation.plan.kind.name.lower()}-{operation.plan.slug}-{operation.id}"
        known: dict[str, Any] = {"operation_id": str(operation.id), "title": operation.title}
        header = [
            self._signature(PREPARE_SHARD, {**known, "shard": shard}, root_id, f"{{{operation.title}, shard {shard}}}")
            for shard in shards
        ]
        body = self._signature(FINALIZE, known, root_id, f"{{{operation.title}}}")

        try:
            chord(header, body, app=self._app).apply_async()
        except (OperationalError, RedisError, OSError) as error:
            raise broker_unavailable() from error
        except RuntimeError as error:
            # Celery 5.7 raises this when the result store cannot be reached ("must be restarted", which is not true).
            if not isinstance(error.__cause__, OperationalError | RedisError | OSError):
                raise
            raise broker_unavailable() from error

    def _signature(self, task: str, kwargs: dict[str, Any], root_id: str, shown: str) -> Signature[Any]:
        """A task as Flower shows it: its arguments as ``shown``, all tasks of an operation under one root id."""
        signature = self._app.signature(task, kwargs=kwargs)
        signature.options.update(root_id=root_id, kwargsrepr=shown, headers=caused_by())
        return signature

    def check(self) -> None:
        """Raises BROKER_UNAVAILABLE unless the broker answers within about half a second."""
        try:
            with self._app.connection_for_write() as connection:
                # A server that hangs accepts connections and answers nothing.
                options = connection.transport_options or {}
                bounds = {"socket_timeout": CHECK_TIMEOUT_S, "socket_connect_timeout": CHECK_TIMEOUT_S}
                connection.transport_options = {**options, **bounds}
                # Only once: the connection is new, so a second attempt would not replace a broken connection.
                connection.ensure_connection(max_retries=0)
                # Opening a channel of the Redis transport sends a PING; the connection closes its channels.
                connection.channel()
        except (OperationalError, RedisError, OSError) as error:
            raise broker_unavailable() from error
