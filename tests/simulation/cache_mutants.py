"""Mutants of the cache protocol: each breaks one rule, as a programmer might easily do.

Those of the patches are the weakenings of ``patch_model`` and some that only code can have. Where the rule is kept by
SQL, the mutant is one of the stand-in for the shard: it shows that the world would find such a fault.

One weakening of the model is none here: chunks that are named by their operation do no harm as long as a publisher who
comes after the next operation gets no patch from the shard, which is so. What the token prevents beyond that is shown
step by step in ``tests/integration/cache/test_patches.py``.
"""

from __future__ import annotations

from collections.abc import Callable, Sequence
from dataclasses import replace
from typing import Any

import numpy as np

from segsvc.cache.entry import Generation, generation_of
from segsvc.cache.patch_store import PatchStore, ShardPatches
from segsvc.domain.errors import ServiceError
from segsvc.domain.membership import EPOCH, Entry, Grant, LoadedUser
from segsvc.domain.operation import Operation
from segsvc.domain.patch import Patch
from segsvc.twophase.ports import Participant
from segsvc.twophase.protocol import Coordinator
from tests.simulation.cache_shard import BulkChange, Reads, Shard
from tests.simulation.cache_world import Habits, SimulatedClient, SimulatedColdReads
from tests.simulation.memory_redis import MemoryRedis


class FillByAnyLease(MemoryRedis):
    def may_fill(self, value: bytes | None, token: bytes) -> bool:
        return value is not None and value.startswith(b"L")


class NonceTakenAtTheFill(SimulatedClient):
    def fill(self, shard: int, grant: Grant, rows: Sequence[tuple[int, Entry]]) -> int:
        with self.connection(shard) as connection:
            g = generation_of(connection.run("GET", self.keys.generation(shard)), connection.run_id)
        return super().fill(shard, replace(grant, nonce=g.nonce if g else grant.nonce), rows)


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


class DropBeforeTheCommit(Coordinator):
    def _complete(self, operation: Operation) -> None:
        self._invalidation.drop_generations([0])
        self._commit_shard(operation, self.participants[0])
        self._ledger.finish(operation.id)


# -- patches --------------------------------------------------------------------------------------------------------


class PatchWithoutNames(SimulatedClient):
    """Who changed is left out."""

    def write_patch(self, shard: int, patch: Patch) -> bytes:
        return super().write_patch(shard, replace(patch, changed=np.empty(0, dtype=np.uint32)))


class ChangedSinceTheOperation(Shard):
    """A change between the operation before and this one is not named: its entry may not be dropped yet."""

    def select(self, change: BulkChange) -> Patch | None:
        return self.server.ask("patch", lambda: self.patch(change, self.truth.changed_since(change.number)))


class ChangedBeforeTheBits(Shard):
    def select(self, change: BulkChange) -> Patch | None:
        changed = self.server.ask("who changed", lambda: self.truth.changed_since(change.number - 1))
        self.server.scheduler.sleep(self.server.scheduler.random.random(), "who changed answered")
        return self.server.ask("patch", lambda: self.patch(change, changed))


class EpochAfterTheBits(Reads):
    def ask(self, what: str, read: Callable[[], list[LoadedUser]]) -> list[LoadedUser]:
        rows = super().ask(what, read)
        self._server.scheduler.dawdle("SELECT answered")
        return super().ask("SELECT epoch", lambda: [replace(row, epoch=self.truth.epoch) for row in rows])


class PatchOfPreparedWork(Shard):
    """Knows the bits of an operation that is not committed, and the changes until now."""

    def patch(self, change: BulkChange, changed: Sequence[int]) -> Patch | None:
        epoch = self.truth.epoch
        if epoch != change.number - 1:
            return super().patch(change, changed)
        self.truth.epoch = change.number
        try:
            return super().patch(change, changed)
        finally:
            self.truth.epoch = epoch


class PublishBeforeTheCommit(Coordinator):
    def _complete(self, operation: Operation) -> None:
        self._publish(operation)
        self._commit_shard(operation, self.participants[0])
        self._ledger.finish(operation.id)


class PublishAfterDone(Coordinator):
    def _complete(self, operation: Operation) -> None:
        self._commit_shard(operation, self.participants[0])
        self._ledger.finish(operation.id)
        self._publish(operation)


class DoneIfPublishingFails(Coordinator):
    """A patch that cannot be published is given up, and the generation is not dropped instead."""

    def _publish_shard(self, operation: Operation, participant: Participant) -> None:
        try:
            patch = participant.read_patch(operation)
            if patch is not None:
                token = self._invalidation.write_patch(participant.shard, patch)
                self._invalidation.append_patch(participant.shard, patch, token)
        except ServiceError:
            pass


class PatchWithoutEnd(SimulatedClient):
    """When the overrides of an import end is left out."""

    def append_patch(self, shard: int, patch: Patch, token: bytes) -> Any:
        return super().append_patch(shard, replace(patch, valid_until_us=None), token)


class AppendInAnyOrder(MemoryRedis):
    """A patch that is late is appended behind newer ones."""

    def append_patch(self, keys: Sequence[bytes], arguments: Sequence[bytes]) -> bytes:
        generation = generation_of(self._get(keys[0]), arguments[0])
        if generation is None or generation.newest < int(arguments[1]):
            return super().append_patch(keys, arguments)
        # A list holds epochs that follow each other: it begins again with this one.
        self._set(keys[1], generation.nonce + arguments[2])
        self._set(keys[0], arguments[0] + generation.nonce + int(arguments[1]).to_bytes(8, "little"))
        return b"appended"


class LeaseOnlyForForeignValues(MemoryRedis):
    """A value with the nonce in force is taken for a hit, although patches may make a miss of it."""

    def acquire(self, keys: Sequence[bytes], arguments: Sequence[bytes]) -> list[bytes | int]:
        return super().acquire(keys, [*arguments[:6], b"0"])


class ListWithoutAnEnd(PatchStore):
    """An entry that needs patches which fell out of the list gets the rest of them."""

    def _lay_over(self, held: ShardPatches, entry: Entry, floor: int) -> Entry | None:
        oldest = held.oldest - 1
        return super()._lay_over(held, (*entry[:EPOCH], max(entry[EPOCH], oldest), *entry[EPOCH + 1 :]), floor)


class ListNeverReadAgain(PatchStore):
    """A list in memory is used although the generation has a newer patch."""

    def list_of(self, shard: int, generation: Generation) -> ShardPatches | None:
        held = self._shards.get(shard)
        return held if held is not None and held.nonce == generation.nonce else super().list_of(shard, generation)


class MissingChunkIsEmpty(PatchStore):
    """A chunk that is lost counts as one without a bit."""

    def _keep(self, *arguments: Any) -> None:
        *rest, value = arguments
        super()._keep(*rest, value or b"\0")


MUTANTS = {
    "fill by any lease": Habits(redis=FillByAnyLease),
    "nonce taken at the fill": Habits(client=NonceTakenAtTheFill),
    "SELECT before the lease's reply": Habits(cold_reads=SelectBeforeTheLeasesReply),
    "no delete for duplicates": Habits(delete_for_duplicates=False),
    "generation dropped before the commit": Habits(coordinator=DropBeforeTheCommit),
    "joining any load": Habits(cold_reads=JoiningAnyLoad),
    "a patch does not name who changed": Habits(client=PatchWithoutNames),
    "who changed only since the operation": Habits(shard=ChangedSinceTheOperation),
    "who changed read before the bits": Habits(shard=ChangedBeforeTheBits),
    "an entry's epoch read after its bits": Habits(reads=EpochAfterTheBits),
    "published before the commit": Habits(coordinator=PublishBeforeTheCommit, shard=PatchOfPreparedWork),
    "DONE before it is published": Habits(coordinator=PublishAfterDone),
    "DONE although publishing failed": Habits(coordinator=DoneIfPublishingFails),
    "a late patch is appended": Habits(redis=AppendInAnyOrder),
    "a patch without the end of its overrides": Habits(client=PatchWithoutEnd),
    "no lease for an entry that is too old": Habits(redis=LeaseOnlyForForeignValues),
    "entries older than the list are used": Habits(patch_store=ListWithoutAnEnd),
    "a list is never read again": Habits(patch_store=ListNeverReadAgain),
    "a lost chunk is an empty one": Habits(patch_store=MissingChunkIsEmpty),
}
