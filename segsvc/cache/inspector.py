"""Reads what the cache holds of a shard as it is stored, for the checker: entries and patches apart."""

from __future__ import annotations

from collections.abc import Sequence
from typing import Final

from segsvc.cache.client import CacheClient
from segsvc.cache.entry import decode_all, generation_of, prefix
from segsvc.cache.patches import CHUNK_SHIFT, CHUNK_SLOTS, Chunk, changed_in, chunk_count, decode_chunk, decode_list
from segsvc.domain.membership import Entry
from segsvc.domain.patch import PublishedPatch, SlotState

_CHUNKS_AT_ONCE: Final = 64


class CacheInspector:
    """All methods raise CACHE_UNAVAILABLE."""

    def __init__(self, client: CacheClient) -> None:
        self._client = client

    def newest_patch(self, shard: int) -> int:
        """Epoch of the newest patch of the shard's generation; 0: there is no generation, or no patch."""
        with self._client.connection(shard) as connection:
            [value] = connection.run("MGET", self._client.keys.generation(shard))
            generation = generation_of(value, connection.run_id)
        return 0 if generation is None else generation.newest

    def patches(self, shard: int) -> list[PublishedPatch]:
        """The patches of the shard's generation, oldest first."""
        keys = self._client.keys
        with self._client.connection(shard) as connection:
            value, notes = connection.run("MGET", keys.generation(shard), keys.patches(shard))
            generation = generation_of(value, connection.run_id)
        if generation is None:
            return []
        return [
            PublishedPatch(note.epoch, note.segment_id, note.token) for note in decode_list(notes, generation.nonce)
        ]

    def slot(self, shard: int, patch: PublishedPatch, slot: int) -> SlotState | None:
        """What a patch says of a slot; None: its chunk is lost."""
        with self._client.connection(shard) as connection:
            [value] = connection.run("MGET", self._client.keys.chunk(shard, patch.token, slot >> CHUNK_SHIFT))
        chunk: Chunk | None = decode_chunk(value)
        if chunk is None:
            return None
        at, bit = (slot & CHUNK_SLOTS - 1) >> 3, 1 << (slot & 7)
        return SlotState(*(half is not None and half[at] & bit != 0 for half in chunk))

    def changed(self, shard: int, patch: PublishedPatch, next_slot: int) -> tuple[list[int], list[range]]:
        """Slots of the users whom a patch names as changed, and the ranges of slots whose chunks are lost."""
        keys = self._client.keys
        slots: list[int] = []
        lost: list[range] = []
        with self._client.connection(shard) as connection:
            for first in range(0, chunk_count(next_slot), _CHUNKS_AT_ONCE):
                numbers = range(first, min(first + _CHUNKS_AT_ONCE, chunk_count(next_slot)))
                values = connection.run("MGET", *(keys.chunk(shard, patch.token, number) for number in numbers))
                for number, value in zip(numbers, values, strict=True):
                    slots += changed_in(value, number)
                    if decode_chunk(value) is None:
                        lost.append(range(number * CHUNK_SLOTS, (number + 1) * CHUNK_SLOTS))
        return slots, lost

    def stored(self, shard: int, user_ids: Sequence[int]) -> list[Entry | None]:
        """The users' entries of the generation in force, without any patch; None: there is none."""
        keys = self._client.keys
        with self._client.connection(shard) as connection:
            value, *values = connection.run("MGET", keys.generation(shard), *keys.users(shard, user_ids))
            generation = generation_of(value, connection.run_id)
        usable = None if generation is None else prefix(generation.nonce)
        return decode_all(values, [usable] * len(values), now_us=0)
