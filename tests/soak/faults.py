"""The faults of the stack under load: one random fault after the other, and each heals by itself."""

from __future__ import annotations

import os
import random
import signal
import time
from collections.abc import Callable
from urllib.parse import urlsplit

import psutil
import redis

from segsvc.local.postgres import PostgresServer
from segsvc.local.redis import BROKER_CONFIG, CACHE_CONFIG, RedisServer
from segsvc.local.stack import LocalStack

FROZEN_S = 4.0
DOWN_S = 2.0


class Faults:
    def __init__(self, stack: LocalStack, seed: int) -> None:
        self._stack = stack
        self._random = random.Random(seed)
        self.fired: dict[str, int] = {}

        self._all: dict[str, Callable[[], bool]] = {
            "kill operations worker": lambda: self._kill("worker-operations"),
            "kill one operations process": lambda: self._kill_child("worker-operations"),
            "freeze one operations process": lambda: self._freeze_child("worker-operations"),
            "freeze front": lambda: self._freeze("serve"),
            "freeze cache": lambda: self._freeze_redis("cache"),
            "freeze broker": lambda: self._freeze_redis("broker"),
            "kill events worker": lambda: self._kill("worker-events"),
            "kill one events process": lambda: self._kill_child("worker-events"),
            "kill warming worker": lambda: self._kill("worker-warming"),
            "kill beat": lambda: self._kill("beat"),
            "kill bridge": lambda: self._kill("bridge"),
            "kill front": lambda: self._kill("serve"),
            "flush cache": lambda: self._flush(self._stack.settings.cache_url),
            "lose patches": self._lose_patches,
            "flush broker": lambda: self._flush(self._stack.settings.broker_url),
            "restart cache": lambda: self._restart_redis("cache"),
            "restart broker": lambda: self._restart_redis("broker"),
            "restart postgres": self._restart_postgres,
        }

    def one(self) -> str:
        """Let one fault happen and end. Returns its name."""
        name = self._random.choice(sorted(self._all))
        if self._all[name]():
            self.fired[name] = self.fired.get(name, 0) + 1
        return name

    def _main(self, name: str) -> psutil.Process | None:
        [pid] = [part.pid for part in self._stack.status() if part.name == name]
        try:
            return psutil.Process(pid) if pid else None
        except psutil.NoSuchProcess:
            return None

    def _kill(self, name: str) -> bool:
        main = self._main(name)
        if main is None:
            return False
        os.killpg(os.getpgid(main.pid), signal.SIGKILL)
        return True

    def _child(self, name: str) -> psutil.Process | None:
        main = self._main(name)
        children = main.children() if main else []
        return self._random.choice(children) if children else None

    def _kill_child(self, name: str) -> bool:
        child = self._child(name)
        if child is not None:
            child.kill()
        return child is not None

    def _freeze_child(self, name: str) -> bool:
        child = self._child(name)
        if child is None:
            return False

        child.suspend()
        time.sleep(FROZEN_S)  # the fault lasts that long
        if child.is_running():
            child.resume()
        return True

    def _freeze(self, name: str) -> bool:
        main = self._main(name)
        if main is None:
            return False
        group = os.getpgid(main.pid)
        os.killpg(group, signal.SIGSTOP)
        time.sleep(FROZEN_S)
        os.killpg(group, signal.SIGCONT)
        return True

    def _freeze_redis(self, name: str) -> bool:
        server = self._redis(name)
        server.pause()
        time.sleep(FROZEN_S)
        server.resume()
        return True

    def _flush(self, url: str) -> bool:
        with redis.Redis.from_url(url) as server:
            return bool(server.flushall())

    def _lose_patches(self) -> bool:
        """Lose half of the cache's lists of patches and of their chunks, as if they had been evicted."""
        with redis.Redis.from_url(self._stack.settings.cache_url) as server:
            keys = [key for pattern in ("*:p", "*:c:*") for key in server.scan_iter(pattern, count=10_000)]
            lost = self._random.sample(sorted(keys), (len(keys) + 1) // 2)
            return bool(lost) and bool(server.delete(*lost))

    def _redis(self, name: str) -> RedisServer:
        settings = self._stack.settings
        config, url = {
            "cache": (CACHE_CONFIG, settings.cache_url),
            "broker": (BROKER_CONFIG, settings.broker_url),
        }[name]
        at = urlsplit(url)
        return RedisServer(
            name, self._stack.home / name, config, password=at.password, port=at.port or 0, mark=self._stack.home
        )

    def _restart_redis(self, name: str) -> bool:
        server = self._redis(name)
        server.kill()

        time.sleep(self._random.random() * DOWN_S)  # the outage
        server.start()
        return True

    def _restart_postgres(self) -> bool:
        server = PostgresServer(self._stack.home / "postgres", mark=self._stack.home)
        server.kill()
        time.sleep(self._random.random() * DOWN_S)  # the outage
        server.start()
        return True
