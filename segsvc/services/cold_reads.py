"""Loads users whose entry is not in the cache from their shard: many in one statement, filled under a lease.

The steps of one load, in this order (each but the third may fail at any point without harm):

1. acquire: ask the cache for leases. If a user's lease is refused, the answer is good, but nothing is filled for that
   user.
2. The reply comes. Only then the shard is read: a writer that changes a user after step 1 removes the lease, and what
   it acknowledged before step 1 is in the statement's snapshot. If the shard were read before the lease, a stale row
   could be filled.
3. One SELECT for all users of the load.
4. Every caller is answered.
5. fill, which the cache does only over our own lease, under the generation of step 1.

A call joins a load only while it is gathering, that is before step 1. A load whose SELECT has been sent may return
data from before a change that was acknowledged since; a call that begins now must see that change.
"""

from __future__ import annotations

import threading
import time
from collections.abc import Callable, Iterable, Sequence
from dataclasses import dataclass, field
from itertools import islice
from typing import Final, Protocol

from segsvc import metrics
from segsvc.domain.errors import LockTimeout, Reason, ServiceError, internal_error, shard_unavailable, user_not_found
from segsvc.domain.membership import Entry, Grant, LoadedUser
from segsvc.domain.pace import Pace, fits, overloaded
from segsvc.domain.sharding import shard_of
from segsvc.log import get_logger
from segsvc.services.slug_map import SlugMap

log = get_logger(__name__)

USERS_PER_LOAD: Final = 256
"""The most users in one statement; it takes some 0.3 ms a user."""

Outcome = Entry | ServiceError
Answer = Callable[[int, Outcome], None]
"""Called once, from a thread of ours, with the user and the outcome of the read. Must not block."""

Gone = Callable[[], bool]
"""Whether the caller has left. Called from threads of ours; must not block."""


class UserReads(Protocol):
    """A shard, as far as a miss needs it."""

    def load(self, shard: int, user_ids: Sequence[int], *, timeout_s: float | None = None) -> Sequence[LoadedUser]:
        """Those of these users that exist. Raises SHARD_UNAVAILABLE, DEADLINE_EXCEEDED, LockTimeout."""


class EntryCache(Protocol):
    """The cache, as far as a miss needs it. All raise CACHE_UNAVAILABLE."""

    def acquire(self, shard: int, user_ids: Sequence[int]) -> Grant: ...

    def fill(self, shard: int, grant: Grant, rows: Sequence[tuple[int, Entry]]) -> int: ...

    def release(self, shard: int, grant: Grant, user_ids: Sequence[int]) -> None: ...


@dataclass(frozen=True, slots=True)
class Limits:
    """Bounds of the cold reads of one process.

    Attributes:
        waiting_max: reads that may wait for one shard at once; more are refused as OVERLOADED.
        threads: loads of one shard at once.
        statement_s: how long the shard's sessions let a statement run.
        stalled_s: a load that takes longer is given up: its server neither answers nor refuses.
    """

    waiting_max: int
    threads: int
    statement_s: float
    stalled_s: float


@dataclass(slots=True)
class _Waiter:
    since: float
    deadline: float | None
    answer: Answer
    gone: Gone | None = None

    def in_vain(self, now: float) -> bool:
        """Whether its caller has left, or its deadline has passed."""
        return (self.deadline is not None and self.deadline <= now) or (self.gone is not None and self.gone())


_Waiting = dict[int, list[_Waiter]]


@dataclass(slots=True, eq=False)
class _Load:
    """Users on their way from a shard.

    Attributes:
        waiting: reads that are not answered yet.
        at_cache: it waits for the cache.
        asked_at: when the shard was asked; None: it was not asked yet, it has answered, or this load was given up.
    """

    started: float
    waiting: _Waiting
    asked_at: float | None = None
    at_cache: bool = False


@dataclass(slots=True, eq=False)
class _Shard:
    """What waits for one shard; guarded by its condition.

    Attributes:
        gathering: reads that no load has taken yet.
        loads: loads that run now.
        waiting: reads that are not answered yet, gathering or loading.
        down: at the last attempt the shard could not be reached, or hung.
        pace: of loads.
        probe_at: when the next read may try a shard that is down.
    """

    number: int
    changed: threading.Condition = field(default_factory=threading.Condition)
    gathering: _Waiting = field(default_factory=dict)
    loads: set[_Load] = field(default_factory=set)
    waiting: int = 0
    down: bool = False
    probe_at: float = 0.0
    pace: Pace = field(default_factory=Pace)


class ColdReads:
    """Loads users from the shards on threads of its own. Made after the last fork of a process; ``close`` ends it."""

    PROBE_S = 0.1
    """Pause between two probes of a shard that is down. One read is the probe; all other reads fail at once."""
    _WATCH_S = 0.05

    def __init__(
        self, *, reads: UserReads, cache: EntryCache, slugs: SlugMap, shard_count: int, limits: Limits
    ) -> None:
        self._reads = reads
        self._cache = cache
        self._slugs = slugs
        self._limits = limits
        self._shards = [_Shard(number) for number in range(shard_count)]
        self._closing = threading.Event()

        self._threads = [
            threading.Thread(target=self._work, args=(shard,), name=f"cold-read-{shard.number}.{n}", daemon=True)
            for shard in self._shards
            for n in range(limits.threads)
        ]
        self._threads.append(threading.Thread(target=self._watch, name="cold-read-watch", daemon=True))
        for thread in self._threads:
            thread.start()

    def submit(
        self,
        user_ids: Iterable[int],
        deadline: float | None,
        answer: Answer,
        *,
        gone: Gone | None = None,
        share: float = 1.0,
    ) -> None:
        """Read users from their shards; ``answer`` is called once for each, perhaps before this returns.

        Outcomes: the entry, or ServiceError USER_NOT_FOUND, SHARD_UNAVAILABLE, OVERLOADED, DEADLINE_EXCEEDED, INTERNAL.

        Args:
            deadline: when the answer must be there, on ``time.monotonic()``'s clock; None: no deadline.
            gone: once it is true, users who are not being read yet are not read for this caller.
            share: the part of the places that reads of this kind may take.
        """
        now = time.monotonic()
        for user_id in user_ids:
            refusal = self._enqueue(
                user_id, _Waiter(now, deadline, answer, gone), int(share * self._limits.waiting_max)
            )
            if refusal is not None:
                _answer([_Waiter(now, deadline, answer)], user_id, refusal, "error")

    def _enqueue(self, user_id: int, waiter: _Waiter, places: int) -> ServiceError | None:
        shard = self._shards[shard_of(user_id, len(self._shards))]
        with shard.changed:
            if self._closing.is_set():
                return shard_unavailable(shard.number)

            if shard.down:
                # Without a free thread the read would probe nothing, and only wait behind the loads that hang.
                if waiter.since < shard.probe_at or len(shard.loads) >= self._limits.threads:
                    return shard_unavailable(shard.number)
                shard.probe_at = waiter.since + self.PROBE_S

            # The reads that gather already are loaded first, USERS_PER_LOAD at a time.
            wait_s = len(shard.gathering) // USERS_PER_LOAD * shard.pace.usual_s / self._limits.threads
            left_s = None if waiter.deadline is None else waiter.deadline - waiter.since
            if shard.waiting >= max(1, places) or not fits(wait_s, shard.pace.usual_s, left_s):
                message = f"too many reads wait for shard {shard.number}"
                return overloaded(message, wait_s, shard=str(shard.number), limit=str(places))

            shard.gathering.setdefault(user_id, []).append(waiter)
            shard.waiting += 1
            shard.changed.notify()
        return None

    @property
    def waiting(self) -> int:
        """Reads that are not answered yet."""
        return sum(shard.waiting for shard in self._shards)

    def close(self, timeout_s: float) -> None:
        """Accept no more reads, answer those that wait, end the threads. Reads that still wait after ``timeout_s`` get
        no answer."""
        self._closing.set()
        for shard in self._shards:
            with shard.changed:
                shard.changed.notify_all()

        end = time.monotonic() + timeout_s
        for thread in self._threads:
            thread.join(max(0.0, end - time.monotonic()))

    # -- loading ----------------------------------------------------------------------------------------------------

    def _work(self, shard: _Shard) -> None:
        while (load := self._next(shard)) is not None:
            try:
                self._load(shard, load)
            except Exception:
                # The thread must live, and every caller get an answer.
                log.exception("cold_read_failed", shard=shard.number)
                self._end(shard, load, internal_error())
            finally:
                with shard.changed:
                    shard.loads.discard(load)

    def _next(self, shard: _Shard) -> _Load | None:
        """Wait for reads, and take them as the next load; None: this is closed."""
        with shard.changed:
            while not shard.gathering:
                if self._closing.is_set():
                    return None
                shard.changed.wait()
            users = list(islice(shard.gathering, USERS_PER_LOAD))
            load = _Load(time.monotonic(), {user_id: shard.gathering.pop(user_id) for user_id in users})
            shard.loads.add(load)
            return load

    def _load(self, shard: _Shard, load: _Load) -> None:
        self._drop_expired(shard, load, load.started)
        user_ids = list(load.waiting)
        if not user_ids:
            return

        load.at_cache = True
        grant = self._acquire(shard, user_ids)
        load.at_cache = False
        filled: frozenset[int] = grant.user_ids if grant else frozenset()

        load.asked_at = time.monotonic()
        try:
            with metrics.cold_read_seconds.time():
                rows = self._read(shard, user_ids, self._timeout_s(load))
        except (ServiceError, LockTimeout) as error:
            load.asked_at = None
            # The callers are answered before the leases are given back: the cache may hang as well.
            self._fail(shard, load, error)
            load.at_cache = True
            self._give_back(shard, grant, filled)
            return
        load.asked_at = None
        shard.pace.took(time.monotonic() - load.started)
        self._mark_up(shard)

        entries = {row.user_id: row.entry(segment_ids) for row, segment_ids in rows}
        for user_id in user_ids:
            outcome = entries.get(user_id) or user_not_found(user_id)
            self._answer_user(shard, load, user_id, outcome, "miss" if user_id in filled else "bypass")

        load.at_cache = True
        if grant:
            self._fill(shard, grant, [(user_id, entries[user_id]) for user_id in filled if user_id in entries])
            # An unknown user is never cached, so that a creation needs no cache to become visible.
            self._give_back(shard, grant, [user_id for user_id in filled if user_id not in entries])

    def _acquire(self, shard: _Shard, user_ids: Sequence[int]) -> Grant | None:
        try:
            return self._cache.acquire(shard.number, user_ids)
        except ServiceError:
            return None  # without the cache the shard alone answers, and nothing is filled

    def _read(
        self, shard: _Shard, user_ids: Sequence[int], timeout_s: float | None
    ) -> list[tuple[LoadedUser, list[int]]]:
        """The users and their segments in the order of the slugs."""
        rows, without_slug = self._slugs.read_named(
            shard.number,
            lambda: self._reads.load(shard.number, user_ids, timeout_s=timeout_s),
            lambda rows: set[int]().union(*(row.segment_ids for row in rows)),
        )
        return [
            (row, self._slugs.in_slug_order(set(row.segment_ids) - without_slug if without_slug else row.segment_ids))
            for row in rows
        ]

    def _timeout_s(self, load: _Load) -> float | None:
        """The time that the most patient caller has left; None: no less than the session's bound of a statement."""
        deadlines = [waiter.deadline for waiters in list(load.waiting.values()) for waiter in waiters]
        longest = max((deadline for deadline in deadlines if deadline is not None), default=0.0)
        left_s = longest - time.monotonic()
        return None if None in deadlines or left_s >= self._limits.statement_s else max(left_s, 0.001)

    def _fill(self, shard: _Shard, grant: Grant, rows: Sequence[tuple[int, Entry]]) -> None:
        if not rows:
            return
        try:
            self._cache.fill(shard.number, grant, rows)
        except ServiceError as error:
            log.info("not_filled", shard=shard.number, users=len(rows), reason=error.reason.text)

    def _give_back(self, shard: _Shard, grant: Grant | None, user_ids: Iterable[int]) -> None:
        """Give leases back early. They would expire by themselves, but no process could fill these users until then."""
        leased = list(user_ids)
        if grant is None or not leased:
            return
        try:
            self._cache.release(shard.number, grant, leased)
        except ServiceError as error:
            log.info("leases_left_to_expire", shard=shard.number, users=len(leased), reason=error.reason.text)

    # -- answering --------------------------------------------------------------------------------------------------

    def _answer_user(self, shard: _Shard, load: _Load, user_id: int, outcome: Outcome, source: str) -> None:
        with shard.changed:
            # The thread that takes the waiters out answers them: this one, or the watch that gave the load up.
            waiters = load.waiting.pop(user_id, [])
            shard.waiting -= len(waiters)
        _answer(waiters, user_id, outcome, source)

    def _end(self, shard: _Shard, load: _Load, error: ServiceError) -> None:
        for user_id in list(load.waiting):
            self._answer_user(shard, load, user_id, error, "error")

    def _fail(self, shard: _Shard, load: _Load, error: ServiceError | LockTimeout) -> None:
        if isinstance(error, LockTimeout):
            error = shard_unavailable(shard.number)
        elif error.reason is Reason.SHARD_UNAVAILABLE:
            self._mark_down(shard, error)
        elif error.reason is Reason.DEADLINE_EXCEEDED:
            self._mark_up(shard)  # slow, but it can be reached
        self._end(shard, load, error)

    def _mark_down(self, shard: _Shard, error: ServiceError) -> None:
        """Mark the shard as down, and fail the gathered reads at once: they would only wait for the same failure."""
        with shard.changed:
            if not shard.down:
                log.warning("shard_down", shard=shard.number)
            shard.down, shard.probe_at = True, time.monotonic() + self.PROBE_S
            gathered, shard.gathering = shard.gathering, {}
            shard.waiting -= sum(map(len, gathered.values()))
        for user_id, waiters in gathered.items():
            _answer(waiters, user_id, error, "error")

    def _mark_up(self, shard: _Shard) -> None:
        with shard.changed:
            was_down, shard.down = shard.down, False
        if was_down:
            log.info("shard_back", shard=shard.number)

    def _drop_expired(self, shard: _Shard, load: _Load | None, now: float) -> None:
        """Answer the reads whose deadline has passed, or whose caller has left, and take them out of the load; or, if
        ``load`` is None, out of the gathering reads."""
        with shard.changed:
            waiting = shard.gathering if load is None else load.waiting
            expired: _Waiting = {}
            for user_id, waiters in list(waiting.items()):
                over = [waiter for waiter in waiters if waiter.in_vain(now)]
                if not over:
                    continue
                expired[user_id] = over
                patient = [waiter for waiter in waiters if waiter not in over]
                if patient:
                    waiting[user_id] = patient
                else:
                    del waiting[user_id]
            shard.waiting -= sum(map(len, expired.values()))
            # Gathering reads wait for a thread, and each thread waits for what its load waits for.
            at_cache = load.at_cache if load else any(each.at_cache for each in shard.loads)

        error = _not_in_time(shard, at_cache)
        for user_id, waiters in expired.items():
            _answer(waiters, user_id, error, "error")

    # -- watching ---------------------------------------------------------------------------------------------------

    def _watch(self) -> None:
        """Answer in time when a shard does not: a server that hangs refuses nothing and breaks no connection."""
        while not self._closing.wait(self._WATCH_S):
            for shard in self._shards:
                metrics.cold_reads_waiting.labels(shard.number).set(shard.waiting)
                if shard.waiting or shard.loads:
                    self._watch_shard(shard, time.monotonic())

    def _watch_shard(self, shard: _Shard, now: float) -> None:
        for load in (None, *shard.loads.copy()):
            self._drop_expired(shard, load, now)

        give_up = now - self._limits.stalled_s
        with shard.changed:
            # Loads whose callers have all gone count too: this judges the shard. Each load counts once: the shard may
            # be back before the load ends.
            stalled = [load for load in shard.loads if (asked_at := load.asked_at) is not None and asked_at < give_up]
            # No thread takes the gathering reads: every thread of the shard is in a load that stalls. A load that waits
            # for the cache does not stall: the cache's own bound ends the wait, which says nothing about the shard.
            untaken = any(waiters[0].since < give_up for waiters in shard.gathering.values()) and not any(
                load.at_cache for load in shard.loads
            )

        error = shard_unavailable(shard.number)
        if stalled or untaken:
            self._mark_down(shard, error)
        for load in stalled:
            load.asked_at = None
            self._end(shard, load, error)


def _not_in_time(shard: _Shard, at_cache: bool) -> ServiceError:
    """Error for a read whose deadline passed, with the part that it waited for. If the shard is down, this read was its
    probe."""
    if at_cache:
        return ServiceError(Reason.DEADLINE_EXCEEDED, "the cache did not answer within the call's deadline")
    if shard.down:
        return shard_unavailable(shard.number)
    message = f"shard {shard.number} did not answer within the call's deadline"
    return ServiceError(Reason.DEADLINE_EXCEEDED, message, {"shard": str(shard.number)})


def _answer(waiters: Sequence[_Waiter], user_id: int, outcome: Outcome, source: str) -> None:
    if not waiters:
        return
    if isinstance(outcome, ServiceError):
        # "Unknown user" is a correct answer: it is no failure of the service.
        source = "unknown" if outcome.reason is Reason.USER_NOT_FOUND else "error"
    metrics.reads.labels(source).inc(len(waiters))
    for waiter in waiters:
        try:
            waiter.answer(user_id, outcome)
        except Exception:
            # One caller's failure must not keep the other callers from their answers.
            log.exception("answer_failed", user_id=user_id)
