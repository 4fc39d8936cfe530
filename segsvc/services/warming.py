"""Fills the cache ahead of the reads, and renews what grows old: a bulk change is laid over the entries, but only over
those that are not too many changes behind.

The warmer takes the same steps as a read that misses (acquire, its reply, the read, fill), many users at a time, so it
is as safe beside writers, readers and other warmers. A sweep covers a shard's blocks: the most read ones first, then
those without reads, newest first. Each run does the least that is needed:

- nothing, if the last sweep was made under the generation in force, covers every user and is not old;
- the users who changed just before a bulk change, whom its patch makes misses;
- the new blocks, if only users came;
- all blocks, if the generation is new;
- all entries of before, if the last sweep is half as many bulk changes behind as an entry may be: so the work for many
  bulk changes is that of one sweep, and none of it is due at once;
- what is missing, if the last sweep is old (entries get lost by changes of single users, expiry and eviction).
"""

from __future__ import annotations

import time
from collections.abc import Callable, Iterator, Mapping, Sequence
from concurrent.futures import Executor, Future, ThreadPoolExecutor
from contextlib import AbstractContextManager
from dataclasses import dataclass, field
from typing import Final, Protocol

import numpy as np

from segsvc import metrics
from segsvc.domain.membership import CacheMemory, Entry, EntryColumns, Grant, LoadedUser, Sweep, UserBlock
from segsvc.domain.sharding import BLOCK_SLOTS
from segsvc.log import get_logger
from segsvc.services.slug_map import SlugMap
from segsvc.services.warm_columns import entry_columns, segments_of

log = get_logger(__name__)

BLOCKS_AT_ONCE: Final = 2
"""Blocks read by one statement. While they are leased, reads of their users are answered and fill nothing."""
SWEEP_EVERY_S: Final = 60.0
"""How often a shard is swept again although nothing is known to have changed; less often if that takes long."""
SWEEP_SHARE: Final = 0.05
"""The part of the time that sweeping again may take."""
MAXMEMORY_SHARE: Final = 0.9
"""The part of the server's memory that the warmer fills; the rest is for users that are read."""
BUSY_SHARE: Final = 1 / 64
"""A sweep that found a larger part of its users busy has not made the shard warm. A few users are always busy while
there are reads."""
CHANGED_PATCHES_MAX: Final = 8
"""Most patches whose changed users one run reads again."""
CHANGED_USERS_MAX: Final = 16_384
"""Most changed users that one run reads again; the rest is read when it is asked for, or by the next sweep."""
CHANGED_AT_ONCE: Final = 256
"""Changed users in one statement."""
MISSING_SHARE: Final = 1 / 16
"""With the memory used up, a block is still warmed if at most this part of its users has no key: entries that are
replaced take no more memory."""


class WarmSession(Protocol):
    """A shard, as far as one run of the warmer needs it."""

    def users_of(self, blocks: Sequence[int]) -> Mapping[int, Sequence[int]]:
        """The users of these blocks; blocks without a directory row are left out."""

    def users_at(self, slots: Sequence[int]) -> Sequence[int]:
        """The users in these slots."""

    def read(self, blocks: Sequence[int]) -> Sequence[UserBlock]:
        """All that the memberships of these blocks depend on, read at one moment."""


class WarmReads(Protocol):
    """The shards, as far as the warmer needs them. All raise SHARD_UNAVAILABLE."""

    def next_slot(self, shard: int) -> int:
        """Slots given out so far."""

    def load(self, shard: int, user_ids: Sequence[int]) -> Sequence[LoadedUser]:
        """Those of these users that exist, read at one moment."""

    def warm_session(self, shard: int) -> AbstractContextManager[WarmSession | None]:
        """A session that one warmer has at a time; None: another warmer has it."""


class WarmCache(Protocol):
    """The cache, as far as the warmer fills it. All raise CACHE_UNAVAILABLE."""

    def acquire(self, shard: int, user_ids: Sequence[int], *, enough: int | None = None) -> Grant: ...

    def fill(self, shard: int, grant: Grant, rows: Sequence[tuple[int, Entry]]) -> int: ...

    def fill_columns(self, shard: int, grant: Grant, columns: EntryColumns) -> int: ...

    def release(self, shard: int, grant: Grant, user_ids: Sequence[int]) -> None: ...


class Notes(Protocol):
    """What the warmer and the fronts note for each other. All methods raise CACHE_UNAVAILABLE."""

    def hottest(self, shard: int) -> Sequence[int]: ...

    def fade(self, shard: int) -> None: ...

    def last_sweep(self, shard: int) -> Sweep | None: ...

    def note_sweep(self, shard: int, sweep: Sweep) -> None: ...

    def newest_patch(self, shard: int) -> int: ...

    def changed_slots(self, shard: int, after: int, next_slot: int) -> Sequence[int]: ...

    def present(self, shard: int, groups: Sequence[Sequence[int]]) -> Sequence[int]: ...

    def memory(self, shard: int) -> CacheMemory: ...


@dataclass(frozen=True, slots=True)
class WarmReport:
    """What one run did.

    Attributes:
        entries: entries filled.
        blocks: blocks visited; 0: there was nothing to do, or another warmer does it.
        stopped_by_budget: blocks were left cold because the memory for warming is used up.
    """

    shard: int
    entries: int = 0
    blocks: int = 0
    seconds: float = 0.0
    stopped_by_budget: bool = False


@dataclass(slots=True)
class _Run:
    shard: int
    session: WarmSession
    sweeping_again: bool
    """A sweep under this generation was completed before, and its entries are new enough: users with a key need
    nothing."""
    enough: int
    """From which epoch on an entry is new enough."""
    nonce: bytes | None
    filler: Executor
    """One thread: while the cache takes one chunk in, the next is read and transposed. Both take about as long."""
    filling: Future[int] | None = None
    entries: int = 0
    blocks: int = 0
    users: int = 0
    busy: int = 0
    """Users who are leased to another process or barred: they are not warm, and this run cannot fill them."""
    stopped_by_budget: bool = False
    started: float = field(default_factory=time.monotonic)

    def await_filling(self) -> None:
        """Wait for the last fill. Raises the error that it raised."""
        if self.filling is not None:
            self.entries += self.filling.result()
            self.filling = None


class Warmer:
    """Warms shards, one run at a time for each shard.

    Args:
        budget_bytes: no entries are added while the shard's cache server uses more memory; 0: nothing is warmed.
        patches_max: how many bulk changes an entry may be behind.
        now_s: the wall clock, seconds since 1970.
    """

    def __init__(
        self,
        *,
        reads: WarmReads,
        cache: WarmCache,
        notes: Notes,
        slugs: SlugMap,
        budget_bytes: int,
        patches_max: int,
        now_s: Callable[[], float] = time.time,
    ) -> None:
        self._reads = reads
        self._cache = cache
        self._notes = notes
        self._slugs = slugs
        self._budget_bytes = budget_bytes
        self._renew_behind = max(1, patches_max // 2)
        self._now_s = now_s
        self._sweep_seconds: dict[int, float] = {}

    def warm_shard(self, shard: int) -> WarmReport:
        """Do what is needed so that the cache has the shard's users, within the budget.

        Raises:
            ServiceError: SHARD_UNAVAILABLE, CACHE_UNAVAILABLE: the next run goes on.
        """
        if not self._budget_bytes:
            return WarmReport(shard)
        next_slot = self._reads.next_slot(shard)
        if not next_slot or self._is_warm(shard, self._notes.last_sweep(shard), next_slot):
            return WarmReport(shard)

        with self._reads.warm_session(shard) as session:
            if session is None:
                return WarmReport(shard)
            # Checked again: another run may have swept the shard in between.
            last = self._notes.last_sweep(shard)
            if self._is_warm(shard, last, next_slot):
                return WarmReport(shard)
            return self._sweep(shard, session, last, next_slot)

    def _is_warm(self, shard: int, last: Sweep | None, next_slot: int) -> bool:
        if last is None or last.next_slot < next_slot or self._is_old(shard, last):
            return False
        return last.seen >= last.newest

    def _is_old(self, shard: int, last: Sweep) -> bool:
        pause_s = max(SWEEP_EVERY_S, self._sweep_seconds.get(shard, 0.0) / SWEEP_SHARE)
        return self._now_s() - last.ended_s >= pause_s

    def _sweep(self, shard: int, session: WarmSession, last: Sweep | None, next_slot: int) -> WarmReport:
        # Read before anything is leased: what is filled from now on is of this epoch or a later one, because the
        # operation that began it had committed before it was published.
        newest = self._notes.newest_patch(shard) if last is None else last.newest
        behind = last is not None and newest - last.epoch >= self._renew_behind
        enough = newest if last is None or behind else last.epoch
        whole = last is None or behind or self._is_old(shard, last)
        with ThreadPoolExecutor(1, thread_name_prefix="warm-fill") as filler:
            run = _Run(shard, session, last is not None and not behind, enough, last.nonce if last else None, filler)
            if last is not None and not self._renew_changed(run, last, newest, next_slot):
                return self._report(run)
            return self._sweep_blocks(run, last, next_slot, newest, whole=whole)

    def _sweep_blocks(self, run: _Run, last: Sweep | None, next_slot: int, newest: int, *, whole: bool) -> WarmReport:
        shard = run.shard
        first_block = 0 if last is None or whole else last.next_slot // BLOCK_SLOTS
        new_users = last is None or whole or last.next_slot < next_slot
        chunks = self._chunks(shard, first_block, next_slot) if new_users else iter(())
        complete = all(self._warm(run, chunk) for chunk in chunks)
        run.await_filling()
        if run.busy > run.users * BUSY_SHARE:
            complete = False  # the next run tries again: leases end within seconds

        if complete and run.nonce is not None:
            ended_s = int(self._now_s()) if last is None or whole else last.ended_s
            self._notes.note_sweep(shard, Sweep(run.nonce, next_slot, ended_s, run.enough, newest))
            if whole:
                self._notes.fade(shard)
                self._sweep_seconds[shard] = time.monotonic() - run.started
        return self._report(run)

    def _report(self, run: _Run) -> WarmReport:
        shard, seconds = run.shard, time.monotonic() - run.started
        metrics.warmed.labels(shard).inc(run.entries)
        if run.entries:
            log.info("warmed", shard=shard, entries=run.entries, blocks=run.blocks, seconds=round(seconds, 3))
        return WarmReport(shard, run.entries, run.blocks, seconds, run.stopped_by_budget)

    def _chunks(self, shard: int, first_block: int, next_slot: int) -> Iterator[list[int]]:
        """The blocks from ``first_block`` on, in the order in which they deserve the memory."""
        end = -(-next_slot // BLOCK_SLOTS)
        hot = [block for block in self._notes.hottest(shard) if first_block <= block < end]
        known = set(hot)
        order = hot + [block for block in range(end - 1, first_block - 1, -1) if block not in known]
        for first in range(0, len(order), BLOCKS_AT_ONCE):
            yield order[first : first + BLOCKS_AT_ONCE]

    def _warm(self, run: _Run, blocks: Sequence[int]) -> bool:
        """Warm some blocks. False: the generation has changed, so that the entries filled by this run are misses."""
        run.blocks += len(blocks)
        users = self._worth_warming(run, run.session.users_of(blocks))
        user_ids = [user_id for members in users.values() for user_id in members]
        if not user_ids:
            return True

        grant = self._cache.acquire(run.shard, user_ids, enough=run.enough)
        run.users += len(user_ids)
        run.busy += grant.busy
        if run.nonce not in (None, grant.nonce):
            self._cache.release(run.shard, grant, list(grant.user_ids))
            return False
        run.nonce = grant.nonce

        # Refused users are in the cache, being read, or being changed; blocks of only such users are not read.
        wanted = [block for block, members in users.items() if not grant.user_ids.isdisjoint(members)]
        if wanted:
            self._fill(run, grant, wanted)
        return True

    def _fill(self, run: _Run, grant: Grant, blocks: Sequence[int]) -> None:
        read, without_slug = self._slugs.read_named(run.shard, lambda: run.session.read(blocks), segments_of)
        if not read:
            return
        granted = np.fromiter(grant.user_ids, dtype=np.int64, count=len(grant.user_ids))
        columns = entry_columns(read, granted, without_slug, self._slugs)
        run.await_filling()
        run.filling = run.filler.submit(self._cache.fill_columns, run.shard, grant, columns)
        gone = grant.user_ids.difference(columns.user_ids.tolist())
        if gone:
            self._cache.release(run.shard, grant, list(gone))  # deleted since their block was listed

    def _renew_changed(self, run: _Run, last: Sweep, newest: int, next_slot: int) -> bool:
        """Read the users again whom the patches since the last run name as changed: their older entries are misses.
        False: the generation has changed."""
        if newest <= last.seen or self._is_full(run.shard):
            return True
        after = max(last.seen, newest - CHANGED_PATCHES_MAX)
        slots = self._notes.changed_slots(run.shard, after, next_slot)[:CHANGED_USERS_MAX]
        for first in range(0, len(slots), CHANGED_AT_ONCE):
            user_ids = run.session.users_at(slots[first : first + CHANGED_AT_ONCE])
            if not user_ids:
                continue
            grant = self._cache.acquire(run.shard, user_ids, enough=newest)
            if grant.nonce != run.nonce:
                self._cache.release(run.shard, grant, list(grant.user_ids))
                return False
            if grant.user_ids:
                run.entries += self._fill_users(run.shard, grant)
        return True

    def _fill_users(self, shard: int, grant: Grant) -> int:
        """Read leased users one by one, as a miss does, and fill them. Returns how many were filled."""
        granted = list(grant.user_ids)
        rows, without_slug = self._slugs.read_named(
            shard,
            lambda: self._reads.load(shard, granted),
            lambda rows: set[int]().union(*(row.segment_ids for row in rows)),
        )
        entries = [
            (row.user_id, row.entry(self._slugs.in_slug_order(set(row.segment_ids) - without_slug))) for row in rows
        ]
        filled = self._cache.fill(shard, grant, entries)
        gone = grant.user_ids.difference(user_id for user_id, _ in entries)
        if gone:
            self._cache.release(shard, grant, list(gone))
        return filled

    def _is_full(self, shard: int) -> bool:
        """Whether the shard's cache server uses as much memory as warming may fill."""
        memory = self._notes.memory(shard)
        limit = self._budget_bytes
        if memory.max_bytes is not None:
            limit = min(limit, int(memory.max_bytes * MAXMEMORY_SHARE))
        metrics.cache_memory_bytes.labels(memory.server, "used").set(memory.used_bytes)
        metrics.cache_memory_bytes.labels(memory.server, "limit").set(limit)
        return memory.used_bytes > limit

    def _worth_warming(self, run: _Run, users: Mapping[int, Sequence[int]]) -> dict[int, Sequence[int]]:
        """The blocks without those that have all their keys already, and those for which there is no memory."""
        full = self._is_full(run.shard)
        if not full and not run.sweeping_again:
            return dict(users)

        worth = {}
        for (block, members), present in zip(
            users.items(), self._notes.present(run.shard, list(users.values())), strict=True
        ):
            missing = len(members) - present
            if run.sweeping_again and not missing:
                continue
            if full and missing > len(members) * MISSING_SHARE:
                run.stopped_by_budget = True
                continue
            worth[block] = members
        return worth
