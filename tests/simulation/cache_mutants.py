"""Mutants of the cache protocol: each breaks one rule, as a programmer might easily do."""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import replace
from typing import Any

from segsvc.cache.entry import RUN_ID_BYTES
from segsvc.domain.errors import ServiceError
from segsvc.domain.membership import Entry, Grant
from tests.simulation.cache_world import Habits, SimulatedClient, SimulatedColdReads
from tests.simulation.memory_redis import MemoryRedis


class FillByAnyLease(MemoryRedis):
    def may_fill(self, value: bytes | None, token: bytes) -> bool:
        return value is not None and value.startswith(b"L")


class NonceTakenAtTheFill(SimulatedClient):
    def fill(self, shard: int, grant: Grant, rows: Sequence[tuple[int, Entry]]) -> int:
        with self.connection(shard) as connection:
            g = connection.run("GET", self.keys.generation(shard))
        return super().fill(shard, replace(grant, nonce=g[RUN_ID_BYTES:] if g else grant.nonce), rows)


class SelectBeforeTheLeasesReply(SimulatedColdReads):
    """Both are sent together, to save a round trip."""

    def _acquire(self, shard: Any, user_ids: Sequence[int]) -> Grant | None:
        try:
            self._early: Any = super()._read(shard, user_ids, None)
        except ServiceError as error:
            self._early = error
        return super()._acquire(shard, user_ids)

    def _read(self, shard: Any, user_ids: Sequence[int], timeout_s: float | None) -> Any:
        if isinstance(self._early, ServiceError):
            raise self._early
        return self._early


class JoiningAnyLoad(SimulatedColdReads):
    """A read also joins a load that has read the shard already."""

    def _enqueue(self, user_id: int, waiter: Any, places: int) -> ServiceError | None:
        for load in self._shards[0].loads:
            if user_id in load.waiting:
                load.waiting[user_id].append(waiter)
                self._shards[0].waiting += 1
                return None
        return super()._enqueue(user_id, waiter, places)


MUTANTS = {
    "fill by any lease": Habits(redis=FillByAnyLease),
    "nonce taken at the fill": Habits(client=NonceTakenAtTheFill),
    "SELECT before the lease's reply": Habits(cold_reads=SelectBeforeTheLeasesReply),
    "no delete for duplicates": Habits(delete_for_duplicates=False),
    "generation dropped before the commit": Habits(drop_before_commit=True),
    "joining any load": Habits(cold_reads=JoiningAnyLoad),
}
