"""A Redis in memory: the commands and scripts of the cache protocol, and the ways in which a server forgets.

The scripts are written in Python again; ``tests/integration/cache/test_memory_redis.py`` compares them with the real
scripts.
"""

from __future__ import annotations

import struct
from collections import deque
from collections.abc import Callable, Sequence
from typing import Any

from redis.exceptions import ResponseError

from segsvc.cache import scripts
from segsvc.cache.connection import Command
from segsvc.cache.entry import (
    EPOCH_OFFSET,
    GENERATION_BYTES,
    HEADER_BYTES,
    NONCE_BYTES,
    PREFIX_BYTES,
    RUN_ID_BYTES,
    Generation,
    generation_of,
)
from segsvc.cache.patches import ITEM_BYTES, TOKEN_BYTES
from tests.simulation.scheduler import Scheduler

Value = tuple[bytes, float | None]
_REFUSED_IF_FULL = (scripts.ACQUIRE.sha, scripts.FILL.sha, scripts.APPEND_PATCH.sha)
"""Scripts without the flag allow-oom or no-writes."""


class MemoryRedis:
    """One server. Times are in seconds of the clock ``now``."""

    def __init__(self, now: Callable[[], float]) -> None:
        self._now = now
        self._runs = 0
        self.values: dict[bytes, Value] = {}
        self.full = False
        """It has no memory left, and refuses what could need some."""
        self.run_id = b""
        self.start({})

    # -- what a server does to its data -----------------------------------------------------------------------------

    def start(self, values: dict[bytes, Value]) -> None:
        """Start another run, with these data."""
        self._runs += 1
        self.run_id = b"%0*d" % (RUN_ID_BYTES, self._runs)
        self.values = values

    def evict(self, key: bytes) -> None:
        self.values.pop(key, None)

    def peek(self, key: bytes) -> bytes | None:
        """The value of a key, read without a command."""
        value, end = self.values.get(key, (None, None))
        return value if end is None or end > self._now() else None

    # -- commands ---------------------------------------------------------------------------------------------------

    def execute(self, command: Command) -> Any:
        name, *arguments = command
        if self.full and (name == "SET" or arguments[0] in _REFUSED_IF_FULL):
            raise ResponseError("OOM command not allowed when used memory > 'maxmemory'.")
        return getattr(self, f"_{str(name).lower()}")(*arguments)

    def _get(self, key: bytes) -> bytes | None:
        value, end = self.values.get(key, (None, None))
        if end is not None and end <= self._now():
            del self.values[key]
            return None
        return value

    def _mget(self, *keys: bytes) -> list[bytes | None]:
        return [self._get(key) for key in keys]

    def _set(self, key: bytes, value: bytes, _px: str | None = None, life_ms: bytes | int | None = None) -> None:
        self.values[key] = (value, None if life_ms is None else self._now() + int(life_ms) / 1000)

    def _del(self, *keys: bytes) -> int:
        there = [key for key in keys if self._get(key) is not None]
        for key in there:
            del self.values[key]
        return len(there)

    def _evalsha(self, sha: str, count: int, *rest: bytes) -> Any:
        script = {
            scripts.ACQUIRE.sha: self.acquire,
            scripts.FILL.sha: self.fill,
            scripts.RELEASE.sha: self.release,
            scripts.DROP_ENTRIES.sha: self.drop_entries,
            scripts.APPEND_PATCH.sha: self.append_patch,
            scripts.READ_PATCHES.sha: self.read_patches,
        }[sha]
        return script(rest[:count], rest[count:])

    # -- scripts ----------------------------------------------------------------------------------------------------

    def acquire(self, keys: Sequence[bytes], arguments: Sequence[bytes]) -> list[bytes | int]:
        run_id, fresh, token, lease_ms, now_us, layout, wanted = arguments
        generation = generation_of(self._get(keys[0]), run_id)
        if generation is None:
            self._set(keys[0], run_id + fresh + bytes(GENERATION_BYTES - RUN_ID_BYTES - NONCE_BYTES))
            generation = Generation(fresh, 0)

        nonce, newest = generation
        enough = int(wanted) if wanted else newest
        flags = b""
        for key in keys[1:]:
            value = self._get(key)
            if value is not None and value[:1] in (b"L", b"B") and self._ends_soon(key):
                flags += b"2"
            elif value is not None and self._is_hit(value, b"V" + nonce + layout, int(now_us), enough):
                flags += b"0"
            else:
                self._set(key, b"L" + token, "PX", lease_ms)
                flags += b"1"

        return [nonce, flags, newest]

    def _ends_soon(self, key: bytes) -> bool:
        _, end = self.values[key]
        return end is not None and end - self._now() <= scripts.BAR_MS / 1000

    def _is_hit(self, value: bytes, prefix: bytes, now_us: int, enough: int) -> bool:
        if not value.startswith(prefix) or len(value) < HEADER_BYTES or len(value) % 4:
            return False
        if struct.unpack_from("<I", value, EPOCH_OFFSET)[0] < enough:
            return False
        return bool(struct.unpack_from("<q", value, PREFIX_BYTES)[0] > now_us)

    def may_fill(self, value: bytes | None, token: bytes) -> bool:
        return value == b"L" + token

    def fill(self, keys: Sequence[bytes], arguments: Sequence[bytes]) -> int:
        token, life_ms, *values = arguments
        filled = 0
        for key, value in zip(keys, values, strict=True):
            if self.may_fill(self._get(key), token):
                self._set(key, value, "PX", life_ms)
                filled += 1
        return filled

    def release(self, keys: Sequence[bytes], arguments: Sequence[bytes]) -> int:
        return sum(self._del(key) for key in keys if self._get(key) == b"L" + arguments[0])

    def drop_entries(self, keys: Sequence[bytes], arguments: Sequence[bytes]) -> int:
        removed = 0
        for key in keys:
            value = self._get(key)
            if value is not None and (not value.startswith(b"B") or value == b"B" + arguments[0]):
                removed += self._del(key)
        return removed

    def append_patch(self, keys: Sequence[bytes], arguments: Sequence[bytes]) -> bytes:
        run_id, number, item, most = arguments
        generation = generation_of(self._get(keys[0]), run_id)
        if generation is None:
            return b"none"
        nonce, newest = generation
        epoch = int(number)
        if newest >= epoch:
            return b"known"
        if newest and newest + 1 != epoch:
            self._del(*keys)
            return b"dropped"

        items = self._items(self._get(keys[1]), nonce, newest) if newest else b""
        self._set(keys[1], nonce + (items + item)[-ITEM_BYTES * int(most) :])
        self._set(keys[0], run_id + nonce + struct.pack("<q", epoch))
        return b"appended"

    def _items(self, p: bytes | None, nonce: bytes, newest: int) -> bytes:
        if p is None or len(p) <= NONCE_BYTES or (len(p) - NONCE_BYTES) % ITEM_BYTES or not p.startswith(nonce):
            return b""
        return p[NONCE_BYTES:] if struct.unpack_from("<q", p, len(p) - ITEM_BYTES)[0] == newest else b""

    def read_patches(self, keys: Sequence[bytes], arguments: Sequence[bytes]) -> list[bytes | None]:
        prefix, after, most, *numbers = arguments
        p = self._get(keys[0])
        if p is None or (len(p) - NONCE_BYTES) % ITEM_BYTES:
            return [None]
        chunks: list[bytes | None] = []
        for at in range(NONCE_BYTES, len(p), ITEM_BYTES):
            if struct.unpack_from("<q", p, at)[0] > int(after):
                token = p[at + 12 : at + 12 + TOKEN_BYTES]
                chunks += [self._get(prefix + token + b":" + str(int(number)).encode()) for number in numbers]
        return [p, *chunks[: int(most)]]


class MemoryConnection:
    """Replaces ``segsvc.cache.connection.CacheConnection``: bound to one run of the server, broken by the next run."""

    def __init__(self, scheduler: Scheduler, server: MemoryRedis) -> None:
        self._scheduler = scheduler
        self._server = server
        scheduler.pause("cache INFO")
        self.run_id = server.run_id
        self._replies: deque[Any] = deque()
        self._open = True

    def run(self, *command: bytes | str | float) -> Any:
        return self.run_all((command,))[0]

    def run_all(self, commands: Sequence[Command]) -> list[Any]:
        self.send(commands)
        self._await_replies()
        return [self._replies.popleft() for _ in commands]

    def send(self, commands: Sequence[Command]) -> None:
        scheduler = self._scheduler
        for command in commands:
            # Other tasks may run between two commands of one pipeline.
            scheduler.pause(f"cache {command[0]}")
            if not self._open or self._server.run_id != self.run_id or scheduler.chance(scheduler.rates.lost_request):
                self._fail()
            self._replies.append(self._server.execute(command))

    def receive(self) -> Any:
        self._await_replies()
        return self._replies.popleft()

    def _await_replies(self) -> None:
        self._scheduler.dawdle("cache answered")
        if self._scheduler.chance(self._scheduler.rates.lost_reply):
            self._fail()

    def _fail(self) -> None:
        self._open = False
        raise OSError("the connection is lost")

    def close(self) -> None:
        self._open = False

    def idle_and_alive(self) -> bool:
        return self._open and self._server.run_id == self.run_id
