"""Celery's consumer, which no single message can end."""

from __future__ import annotations

from collections.abc import Callable
from typing import Any

import redis
from celery.utils.log import get_logger as celery_logger
from celery.worker.consumer import Consumer as CeleryConsumer

from tasks.broker import refused


class Consumer(CeleryConsumer):
    """Refuses a message that Celery cannot turn into a task, whatever Celery raises.

    The transport has already checked everything that is known to go wrong. Any other bad message would end this worker,
    and then the next worker that receives it: so it is refused here, and not put back.
    """

    def create_task_handler(self, *args: Any, **kwargs: Any) -> Callable[[Any], Any]:
        """The function that is called with each message."""
        lost: Any = self.connection_errors  # type: ignore[attr-defined]  # the stubs lack it
        handle = super().create_task_handler(*args, **kwargs)

        def handle_or_refuse(message: Any) -> Any:
            try:
                return handle(message)
            except (redis.RedisError, OSError, MemoryError):
                # An error of the broker or the machine, not of the message. (kombu counts KeyError as an error of the
                # broker; here it concerns the message.)
                raise
            except Exception as error:  # noqa: BLE001  # whatever Celery raises about a message
                message.reject_log_error(celery_logger(__name__), lost)
                headers = message.headers if isinstance(message.headers, dict) else {}
                refused("failed", "a worker", type(error).__name__, task=str(headers.get("task"))[:100])
                return None

        return handle_or_refuse
