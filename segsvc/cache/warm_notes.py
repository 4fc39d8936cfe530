"""Hints that the warmer keeps in the cache beside the entries. Losing them costs work, never correctness."""

from __future__ import annotations

import re
from collections.abc import Mapping, Sequence
from typing import Any, Final

from segsvc.cache.client import CacheClient
from segsvc.cache.connection import Command, parse_info
from segsvc.cache.entry import NONCE_BYTES, generation_of
from segsvc.cache.patches import changed_in, chunk_count, decode_list
from segsvc.domain.membership import CacheMemory, Sweep
from segsvc.log import get_logger

log = get_logger(__name__)

HOT_TTL_S: Final = 3600
"""If no reads are reported for this long, the counts of a shard's hot blocks are forgotten."""
BLOCKS_PER_REPORT: Final = 4096
"""Most blocks of a shard whose reads a front reports at once; it reports the most read ones."""
NOTE_TTL_S: Final = 86_400

_BLOCK: Final = re.compile(rb"0|[1-9][0-9]{0,8}")
_NOTE: Final = re.compile(rb"([0-9]{1,18}) ([0-9]{1,18}) ([0-9]{1,18}) ([0-9]{1,18})")
_CHUNKS_AT_ONCE: Final = 64


class WarmNotes:
    """Which blocks are hot, what is warm already, how much memory is in use. All methods raise CACHE_UNAVAILABLE."""

    def __init__(self, client: CacheClient) -> None:
        self._client = client

    # -- hotness ----------------------------------------------------------------------------------------------------

    def add_reads(self, shard: int, reads: Mapping[int, int]) -> None:
        """Add reads to the counts of blocks."""
        most_read = sorted(reads, key=reads.__getitem__, reverse=True)[:BLOCKS_PER_REPORT]
        key = self._client.keys.hot(shard)
        commands: list[Command] = [("ZINCRBY", key, reads[block], block) for block in most_read]
        self._counted(shard, key, [*commands, ("EXPIRE", key, HOT_TTL_S)])

    def hottest(self, shard: int) -> list[int]:
        """Blocks with reads, most read first. Members that are no block numbers are foreign, and are removed."""
        key = self._client.keys.hot(shard)
        [members] = self._counted(shard, key, [("ZREVRANGE", key, 0, -1)])
        foreign = [member for member in members if not _BLOCK.fullmatch(member)]
        if foreign:
            log.warning("foreign_members_removed", key=key.decode(), members=len(foreign))
            self._counted(shard, key, [("ZREM", key, *foreign)])
        return [int(member) for member in members if _BLOCK.fullmatch(member)]

    def fade(self, shard: int) -> None:
        """Halve the counts, so that recent reads weigh more; remove blocks whose count is below one."""
        key = self._client.keys.hot(shard)
        self._counted(
            shard,
            key,
            [
                ("ZUNIONSTORE", key, 1, key, "WEIGHTS", "0.5"),
                ("ZREMRANGEBYSCORE", key, "-inf", "(1"),
                # Infinity stays infinity when it is halved; it is a foreign value.
                ("ZREMRANGEBYSCORE", key, "+inf", "+inf"),
                ("EXPIRE", key, HOT_TTL_S),
            ],
        )

    def _counted(self, shard: int, key: bytes, commands: Sequence[Command]) -> list[Any]:
        """Replies to commands on a sorted set of counts. If the key holds a foreign value of another type, that value
        is removed first, and the commands see an empty set."""
        with self._client.connection(shard) as connection:
            [kind] = connection.run_all([("TYPE", key)])
            if kind not in (b"none", b"zset"):
                log.warning("foreign_value_removed", key=key.decode(), type=kind.decode())
                connection.run("DEL", key)
            return connection.run_all(commands)

    # -- what is warm -----------------------------------------------------------------------------------------------

    def last_sweep(self, shard: int) -> Sweep | None:
        """The last complete sweep, if the shard still has the generation under which it was made; else None."""
        keys = self._client.keys
        with self._client.connection(shard) as connection:
            generation, note = connection.run("MGET", keys.generation(shard), keys.warm(shard))
            found = generation_of(generation, connection.run_id)
        if found is None or note is None or note[:NONCE_BYTES] != found.nonce:
            return None
        numbers = _NOTE.fullmatch(note, NONCE_BYTES)
        if numbers is None:
            return None
        next_slot, ended_s, epoch, seen = map(int, numbers.groups())
        return Sweep(found.nonce, next_slot, ended_s, epoch, seen, found.newest)

    def note_sweep(self, shard: int, sweep: Sweep) -> None:
        """Remember that everything below ``next_slot`` was warmed under this nonce."""
        note = sweep.nonce + b"%d %d %d %d" % (sweep.next_slot, sweep.ended_s, sweep.epoch, sweep.seen)
        with self._client.connection(shard) as connection:
            connection.run("SET", self._client.keys.warm(shard), note, "EX", NOTE_TTL_S)

    def newest_patch(self, shard: int) -> int:
        """Epoch of the newest patch of the shard's generation; 0: there is no generation, or no patch."""
        with self._client.connection(shard) as connection:
            [value] = connection.run("MGET", self._client.keys.generation(shard))
            generation = generation_of(value, connection.run_id)
        return 0 if generation is None else generation.newest

    def changed_slots(self, shard: int, after: int, next_slot: int) -> list[int]:
        """Slots of the users who changed, as the patches with epochs after this one say; what is lost is left out."""
        keys = self._client.keys
        changed: set[int] = set()
        with self._client.connection(shard) as connection:
            value, list_value = connection.run("MGET", keys.generation(shard), keys.patches(shard))
            generation = generation_of(value, connection.run_id)
            notes = decode_list(list_value, generation.nonce) if generation else []
            for note in notes:
                numbers = range(chunk_count(next_slot)) if note.epoch > after else range(0)
                for first in range(0, len(numbers), _CHUNKS_AT_ONCE):
                    part = numbers[first : first + _CHUNKS_AT_ONCE]
                    values = connection.run("MGET", *(keys.chunk(shard, note.token, number) for number in part))
                    for number, each in zip(part, values, strict=True):
                        changed.update(changed_in(each, number))
        return sorted(changed)

    def present(self, shard: int, groups: Sequence[Sequence[int]]) -> list[int]:
        """For each group of users, how many have a key, whatever it holds."""
        commands: list[Command] = [("EXISTS", *self._client.keys.users(shard, group)) for group in groups]
        with self._client.connection(shard) as connection:
            return connection.run_all(commands)

    # -- memory -----------------------------------------------------------------------------------------------------

    def memory(self, shard: int) -> CacheMemory:
        """The memory that the shard's server uses, and its limit."""
        with self._client.connection(shard) as connection:
            reply: Any = connection.run("INFO", "memory")
        info = parse_info(reply)
        return CacheMemory(
            self._client.server_of(shard).name, int(info["used_memory"]), int(info.get("maxmemory", 0)) or None
        )
