"""Celery's Redis result backend for publishers that never wait on a result object."""

from __future__ import annotations

from typing import Any

from celery import states
from celery.backends.redis import RedisBackend
from redis.exceptions import RedisError

from tasks.broker import refused


class UnsubscribedRedisBackend(RedisBackend):
    """Chords count their headers in Redis as usual; result objects do not touch the subscriptions.

    Outcomes come from the ledger, and the bridge reads results by key, so nothing here ever subscribes. Celery's
    result objects would still *un*subscribe when they are garbage-collected: that costs a front a useless connection,
    and prints a traceback on standard error when it happens at the end of a process or without a server.
    """

    def _add_global_keyprefix(self) -> None:
        """Nothing yet: a backend is created before the installation, and so the prefix of its keys, is known."""

    def _get_key_for(self, prefix: bytes, id: Any, key: Any = "") -> bytes:  # noqa: A002  # Celery's name for it
        """The key of a task or chord, with the installation's prefix like all names on the broker.

        Raises:
            InstallationUnknown: no database could say which one it is; handled like a server that cannot be reached.
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

    def _get_task_meta_for(self, task_id: str) -> Any:
        """The stored state of a task; a worker reads it before it stores a result.

        A value that is not a result is refused and deleted. Celery would raise, and the task would end without one.
        """
        try:
            meta: Any = super()._get_task_meta_for(task_id)  # type: ignore[misc]  # the stubs lack it
            if isinstance(meta["status"], str):
                return meta
            why = "its status is no text"
        except (RedisError, OSError) as error:
            if "WRONGTYPE" not in str(error):
                raise
            why = "its key holds no text"
        except Exception as error:  # noqa: BLE001  # whatever reading it raises; the server's own errors are above
            why = f"it cannot be read ({type(error).__name__})"

        self.client.unlink(self.get_key_for_task(task_id))
        refused("unreadable", "the result of a task", why, task=str(task_id)[:100])
        return {"status": states.PENDING, "result": None}

    def remove_pending_result(self, result: Any) -> Any:
        """Nothing is pending."""
        return result
