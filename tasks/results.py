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

    def _add_global_keyprefix(self) -> None:
        """Nothing yet: a backend is made before it is known whose names its keys carry."""

    def _get_key_for(self, prefix: bytes, id: Any, key: Any = "") -> bytes:  # noqa: A002  # Celery's name for it
        """The key of a task or chord, under the installation's names as everything else on the broker.

        Raises:
            InstallationUnknown: no database could say which one it is; as if the server could not be reached.
        """
        name: bytes = super()._get_key_for(prefix, id, key)  # type: ignore[misc]  # the stubs lack it
        return self._installation() + name

    def _strip_prefix(self, key: bytes) -> str:
        """The id in a key."""
        found: str = super()._strip_prefix(key.removeprefix(self._installation()))  # type: ignore[misc]
        return found

    def _installation(self) -> bytes:
        prefix: str = self.app.conf.result_backend_transport_options["global_keyprefix"]()  # type: ignore[attr-defined]
        return prefix.encode()

    def remove_pending_result(self, result: Any) -> Any:
        """Nothing is pending."""
        return result
