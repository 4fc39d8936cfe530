"""Celery's Redis result backend for publishers that never wait on a result object."""

from __future__ import annotations

from typing import Any

from celery.backends.redis import RedisBackend


class UnsubscribedRedisBackend(RedisBackend):
    """Chords count their headers in Redis as usual; result objects leave the subscriptions alone.

    Outcomes come from the ledger, and the bridge reads results by key, so nothing here ever subscribes. Celery's
    result objects would all the same *un*subscribe when they are collected: a connection for nothing in a front, and
    a traceback on standard error when that happens at the end of a process or without a server.
    """

    def remove_pending_result(self, result: Any) -> Any:
        """Nothing is pending."""
        return result
