"""A watched warmer: its requests to the cache, the blocks that it fills, and a clock that the test moves."""

from __future__ import annotations

from collections.abc import Callable, Sequence
from typing import TYPE_CHECKING

from segsvc.cache.warm_notes import WarmNotes
from segsvc.domain.membership import Entry, EntryColumns, Grant
from segsvc.services.slug_map import SlugMap
from segsvc.services.warming import Warmer

if TYPE_CHECKING:
    from tests.integration.cache.conftest import World

SHARD = 0
BLOCK_USERS = 1024


class Watched:
    """The world's cache and shards, with notes of the requests and fills, and with a clock."""

    def __init__(self, world: World) -> None:
        self.world = world
        self.notes = WarmNotes(world.client)
        self.filled: list[int] = []
        self.renewed: list[int] = []
        """Users who were read again because a patch names them as changed."""
        self.asked = 0
        self.now_s = 1_800_000_000.0
        self.before_fill: Callable[[], None] = lambda: None
        self.after_ask: Callable[[], None] = lambda: None

    def acquire(self, shard: int, user_ids: Sequence[int], *, enough: int | None = None) -> Grant:
        self.asked += len(user_ids)
        self.after_ask()
        return self.world.client.acquire(shard, user_ids, enough=enough)

    def fill(self, shard: int, grant: Grant, rows: Sequence[tuple[int, Entry]]) -> int:
        self.renewed += [user_id for user_id, _ in rows]
        return self.world.client.fill(shard, grant, rows)

    def fill_columns(self, shard: int, grant: Grant, columns: EntryColumns) -> int:
        self.before_fill()
        self.filled += list(dict.fromkeys((columns.slots // 1024).tolist()))
        return self.world.client.fill_columns(shard, grant, columns)

    def release(self, shard: int, grant: Grant, user_ids: Sequence[int]) -> None:
        self.world.client.release(shard, grant, user_ids)

    def warmer(self, budget_bytes: int = 1 << 40, patches_max: int = 64) -> Warmer:
        return Warmer(
            reads=self.world.memberships,
            cache=self,
            notes=self.notes,
            slugs=SlugMap(self.world.memberships.slugs),
            budget_bytes=budget_bytes,
            patches_max=patches_max,
            now_s=lambda: self.now_s,
        )


def users_of_block(block: int) -> list[int]:
    """Users of a block of shard 0, with two shards and users 1, 2, 3 …."""
    return [2 * (slot + 1) for slot in range(block * BLOCK_USERS, (block + 1) * BLOCK_USERS)]


def is_warm(world: World, users: Sequence[int]) -> bool:
    return None not in world.cached(*users)
