"""The hot lane: one thread that answers GetUserSegments and BatchGetUserSegments, many calls with one round trip.

It takes the calls that wait, asks the cache for all their users at once, answers the calls that hit, and passes the
other users to the cold reads, which answer when the shard has answered. While the cache works, the next calls gather by
themselves: more of them under a higher load, and under a low load no call waits for others. There are two sources of
calls (``grpc_api.hot.calls``) and one way of reading.

How a server puts it together::

    front = native_front("127.0.0.1:50051", reuse_port=True)   # and front.set_fallback(…)
    lane = HotLane(front=front, …)
    lane.start()
    front.start()
    …
    lane.close(grace_s=5.0)                                    # also closes the front; then cold.close(…)

and with grpcio alone, ``HotLane(front=None, …)``, where servicers await
``asyncio.wrap_future(lane.submit(method, request_bytes, request_id, deadline))``.
"""

from __future__ import annotations

import threading
import time
from collections import Counter, deque
from collections.abc import Generator, Iterator, Mapping, Sequence
from concurrent.futures import Future
from contextlib import closing
from dataclasses import dataclass
from functools import partial
from typing import Final, Protocol

from pygrpc_native import NativeGrpcFront

from grpc_api import call_scope
from grpc_api.access import Gate
from grpc_api.hot import wire
from grpc_api.hot.answers import Batch, BatchPlace, Single
from grpc_api.hot.batches import WaitingBatches
from grpc_api.hot.calls import ENCODING_KEY, Call, Calls, NativeCalls, QueuedCalls, Streams
from segsvc import metrics
from segsvc.domain.errors import ServiceError, internal_error
from segsvc.domain.membership import SLOT, Entry
from segsvc.domain.pace import overloaded
from segsvc.domain.sharding import BLOCK_SLOTS, shard_of
from segsvc.log import get_logger
from segsvc.services.cold_reads import Answer, ColdReads, Outcome
from segsvc.services.slug_map import SlugMap

log = get_logger(__name__)

CALLS_MAX: Final = 256
"""Most calls taken at once: with more, the first of them would only wait longer for the last."""
USERS_PER_LOOKUP: Final = 256
"""Most users in one command to the cache. A call with 1000 users is split: the cache's server, which runs one command
at a time, is then never busy for long, and works on one piece while the lane encodes the piece before."""
USERS_PER_ROUND: Final = 2048
"""Most users of batches that are served before the lane takes new calls. Single reads that arrive meanwhile wait for
these users, a hundredth of a second, and not for all waiting batches."""
COUNTS_EVERY_S: Final = 5.0
"""How often the counts of reads of each block go to the cache, for the warmer."""
LATE_S: Final = 0.01
"""While more calls wait than are taken at once, a call with less time left than this is refused."""
BATCH_SHARE: Final = 0.75
"""Share of a shard's places for waiting users that batches may take; the rest is for single reads."""
HOUSEKEEPING_S: Final = 0.1
"""Time between two attempts to connect to a cache that is down."""


class Entries(Protocol):
    """The part of the cache that a hit needs."""

    @property
    def connected(self) -> bool:
        """Whether a lookup can find something."""

    @property
    def complete(self) -> bool:
        """Whether every server of the cache is connected."""

    def connect(self) -> None:
        """Connect to each server that is not connected. Raises CACHE_UNAVAILABLE: one of them is out of reach."""

    def lookup(self, user_ids: Sequence[int]) -> list[Entry | None]:
        """The users' entries in the cache, in their order; None: a miss, and every user of a server that is out of
        reach while another one is not. Raises CACHE_UNAVAILABLE; ``connected`` is then False."""

    def lookups(self, user_ids: Sequence[int], users_per_command: int) -> Generator[list[Entry | None]]:
        """As ``lookup``, in pieces. The caller closes the generator if it does not read it to its end."""


class ReadCounts(Protocol):
    """Tells the warmer which blocks are hot."""

    def add_reads(self, shard: int, reads: Mapping[int, int]) -> None:
        """Add reads to the counts of blocks. Raises CACHE_UNAVAILABLE."""


@dataclass(frozen=True, slots=True)
class _Reads:
    """What a lane reads with; see ``HotLane``."""

    entries: Entries
    counts: ReadCounts
    cold: ColdReads
    slugs: Mapping[int, bytes]
    shard_count: int


class HotLane:
    """The lane's thread and its housekeeping thread. Create it after the last fork of a process.

    Args:
        front: from ``calls.native_front``; None: calls come by ``submit``.
        gate: lets in the calls that come by that front.
        entries: used by the lane's thread alone.
        streams: serves calls of streams that come by the same front; None: there are none.
        checked_header: the one that ``front`` was made with.
        slugs: created with ``encode=wire.encode_slug``.
    """

    def __init__(
        self,
        *,
        front: NativeGrpcFront | None,
        gate: Gate,
        entries: Entries,
        counts: ReadCounts,
        cold: ColdReads,
        slugs: SlugMap,
        shard_count: int,
        streams: Streams | None = None,
        checked_header: str = ENCODING_KEY,
    ) -> None:
        self._queued: QueuedCalls | None = None
        self._calls: Calls
        if front is None:
            self._calls = self._queued = QueuedCalls()
        else:
            self._calls = NativeCalls(front, gate, streams, checked_header)

        self._entries = entries
        self._counts = counts
        self._cold = cold
        self._slugs: Mapping[int, bytes] = slugs.encoded
        self._shard_count = shard_count
        self._change: _Reads | None = None
        self._closing = threading.Event()
        self._reads_lock = threading.Lock()
        self._reads: Counter[int] = Counter()
        self._hits = metrics.reads.labels("hit")
        self._thread = threading.Thread(target=self._run, name="hot-lane", daemon=True)
        self._housekeeper = threading.Thread(target=self._run_housekeeping, name="hot-lane-housekeeping", daemon=True)

    def start(self) -> None:
        """Begin to take calls. The lane also starts while the cache is down."""
        self._connect()
        self._thread.start()
        self._housekeeper.start()

    def change(
        self, *, entries: Entries, counts: ReadCounts, cold: ColdReads, slugs: SlugMap, shard_count: int
    ) -> None:
        """Read with these from the next round on: the shards have doubled. What is being read by then is answered by
        the old ones, which the caller closes some seconds later."""
        self._change = _Reads(entries, counts, cold, slugs.encoded, shard_count)

    def submit(self, method: str, payload: bytes, request_id: str, deadline: float | None) -> Future[bytes]:
        """Answer a call that grpcio received. Only for a lane with ``front=None``.

        Args:
            method: full name, one of ``calls.METHODS``.
            payload: the request, serialized; it need not be valid.
            request_id: for the log; the servicer itself sends it back to the client.
            deadline: by ``time.monotonic()``'s clock; None: there is none.

        Returns:
            A future of the serialized answer; its exception is a ServiceError. The caller may cancel it.
        """
        if self._queued is None:
            raise RuntimeError("the native front brings its calls itself")
        return self._queued.submit(method, payload, request_id, deadline)

    def close(self, grace_s: float) -> None:
        """Give the cold reads time to answer, then take no more calls.

        Until then calls are still answered; later calls get UNAVAILABLE, which clients may retry.
        """
        end = time.monotonic() + grace_s
        while self._cold.waiting and time.monotonic() < end:
            time.sleep(0.01)

        self._closing.set()
        self._calls.close()
        for thread in (self._thread, self._housekeeper):
            thread.join(max(1.0, end - time.monotonic()))

    # -- the loop ---------------------------------------------------------------------------------------------------

    def _run(self) -> None:
        batches = WaitingBatches()
        while True:
            serving: list[Call] = []
            try:
                calls = self._calls.take(CALLS_MAX, wait=not batches)
                if calls is None and not batches:
                    return
                if self._change is not None:
                    self._take_change(self._change)

                for call in calls or ():
                    if call.batch:
                        batches.put(call)
                    else:
                        serving.append(call)

                if calls is not None and len(calls) == CALLS_MAX:
                    serving = self._in_time(serving)
                if serving:
                    self._serve_singles(serving)

                serving = []
                self._serve_round(batches, serving)
            except Exception:
                # The lane must not end. Calls that are answered already drop this second answer.
                log.exception("lane_failed", request_ids=[call.request_id for call in serving])
                for call in serving:
                    call.fail(internal_error())

    def _take_change(self, change: _Reads) -> None:
        """Between two rounds, so that each round has one view of the shards."""
        self._change = None
        with self._reads_lock:
            self._entries, self._counts, self._cold = change.entries, change.counts, change.cold
            self._slugs, self._shard_count = change.slugs, change.shard_count
            # Blocks of the old shards say nothing about the new ones.
            self._reads = Counter()

    def _in_time(self, calls: Sequence[Call]) -> list[Call]:
        """The calls whose clients will still wait for the answer; the rest are refused. Used when more calls wait than
        are taken at once: calls that still have time wait behind these."""
        late = time.monotonic() + LATE_S
        served: list[Call] = []
        for call in calls:
            if call.deadline is None or call.deadline > late:
                served.append(call)
            else:
                call.fail(overloaded("too many reads wait; this one's time is all but over", LATE_S))
        return served

    def _serve_singles(self, calls: Sequence[Call]) -> None:
        # Parallel lists, and no object for a call that hits: at tens of thousands of calls a second the lane is the
        # busiest thread of the process.
        encoded_user_ids = [call.payload for call in calls]
        user_ids = wire.plain_user_ids(encoded_user_ids)
        if user_ids is None:
            calls, user_ids = self._read_each(calls)
            encoded_user_ids = wire.encode_user_ids(user_ids)

        entries = self._lookup(user_ids)
        answers = wire.encode_all(encoded_user_ids, entries, self._slugs)
        for call, user_id, answer in zip(calls, user_ids, answers, strict=True):
            if answer is not None:
                call.answer(answer)
            else:
                call.watch()
                single = self._counted(Single(call, self._slugs))
                self._cold.submit((user_id,), _answer_by(call.deadline), single, gone=partial(_gone, call))

        shards = self._shard_count
        read = zip(user_ids, entries, answers, strict=True)
        self._count(
            [
                entry[SLOT] // BLOCK_SLOTS * shards + user_id % shards
                for user_id, entry, answer in read
                if entry and answer
            ]
        )

    def _read_each(self, calls: Sequence[Call]) -> tuple[list[Call], list[int]]:
        """The calls with valid requests, and their users. Calls with invalid requests are refused."""
        read: list[Call] = []
        user_ids: list[int] = []
        for call in calls:
            try:
                user_ids.append(wire.user_id_of(call.payload))
                read.append(call)
            except ServiceError as error:
                call.fail(error)
        return read, user_ids

    def _serve_round(self, waiting: WaitingBatches, serving: list[Call]) -> None:
        """Serve the first of the waiting batches, as many as one round allows; those with invalid requests are refused.

        Each batch is added to ``serving`` before any work is done for it, so that the caller can refuse it after a
        failure.
        """
        begun = time.monotonic()
        batches: list[Batch] = []
        users = 0

        while users < USERS_PER_ROUND and len(serving) < CALLS_MAX and (call := waiting.pop()) is not None:
            serving.append(call)
            try:
                batch = Batch(call, self._slugs)
            except ServiceError as error:
                call.fail(error)
                continue
            batches.append(batch)
            users += batch.asked

        if batches:
            self._serve_batches(batches)
        waiting.took(sum(len(call.payload) for call in serving), begun)

    def _serve_batches(self, batches: Sequence[Batch]) -> None:
        """Answer each batch as soon as the last piece with one of its users has come."""
        waiting = deque(batches)
        entries: list[Entry | None] = []
        for piece in self._lookups([user_id for batch in batches for user_id in batch.user_ids]):
            entries += piece
            while waiting and len(waiting[0].user_ids) <= len(entries):
                batch = waiting.popleft()
                users = len(batch.user_ids)
                self._answer_batch(batch, entries[:users])
                del entries[:users]

    def _answer_batch(self, batch: Batch, entries: Sequence[Entry | None]) -> None:
        shards = self._shard_count
        missed = batch.put_all(entries)
        answer_by = _answer_by(batch.deadline) if missed else None
        for place in missed:
            result = self._counted(BatchPlace(batch, place))
            self._cold.submit((batch.user_ids[place],), answer_by, result, gone=batch.gone, share=BATCH_SHARE)

        user_ids = batch.user_ids
        if missed:
            left_out = set(missed)
            places = [place for place in range(len(entries)) if place not in left_out]
            user_ids, entries = [user_ids[place] for place in places], [entries[place] for place in places]
        read = zip(user_ids, entries, strict=True)
        self._count([entry[SLOT] // BLOCK_SLOTS * shards + user_id % shards for user_id, entry in read if entry])

    def _lookup(self, user_ids: Sequence[int]) -> Sequence[Entry | None]:
        if self._entries.connected:
            try:
                return self._entries.lookup(user_ids)
            except ServiceError:
                log.warning("lane_without_cache")
        return [None] * len(user_ids)

    def _lookups(self, user_ids: Sequence[int]) -> Iterator[Sequence[Entry | None]]:
        """As ``_lookup``, in pieces. If the cache fails, the last piece holds a miss for each remaining user."""
        found = 0
        if self._entries.connected:
            try:
                with closing(self._entries.lookups(user_ids, USERS_PER_LOOKUP)) as pieces:
                    for piece in pieces:
                        found += len(piece)
                        yield piece
            except ServiceError:
                log.warning("lane_without_cache")
        if found < len(user_ids):
            yield [None] * (len(user_ids) - found)

    def _count(self, hits: Sequence[int]) -> None:
        """Count hits; each is the number block × shards + shard."""
        self._hits.inc(len(hits))
        with self._reads_lock:
            self._reads.update(hits)

    def _counted(self, answer: Answer) -> Answer:
        """An answer to a cold read that also counts the read: the warmer must know of cold blocks."""

        def count(user_id: int, outcome: Outcome) -> None:
            answer(user_id, outcome)
            if not isinstance(outcome, ServiceError):
                block, shard = outcome[SLOT] // BLOCK_SLOTS, shard_of(user_id, self._shard_count)
                with self._reads_lock:
                    self._reads[block * self._shard_count + shard] += 1

        return count

    # -- housekeeping -----------------------------------------------------------------------------------------------

    def _run_housekeeping(self) -> None:
        next_counts = time.monotonic() + COUNTS_EVERY_S
        while not self._closing.wait(HOUSEKEEPING_S):
            try:
                self._connect()
                if time.monotonic() >= next_counts:
                    next_counts = time.monotonic() + COUNTS_EVERY_S
                    self._send_counts()
            except Exception:
                # Without this thread the lane would never connect again. The next round tries the same.
                log.exception("lane_housekeeping_failed")

    def _connect(self) -> None:
        """Connect unless connected. Not on the lane's own thread, which would wait for a server that is hung."""
        if self._entries.complete:
            return
        try:
            self._entries.connect()
        except ServiceError:
            return  # it is tried again soon; until then reads go on without the cache
        log.info("lane_has_cache")

    def _send_counts(self) -> None:
        with self._reads_lock:
            reads, self._reads = self._reads, Counter()

        by_shard: dict[int, dict[int, int]] = {}
        for number, count in reads.items():
            block, shard = divmod(number, self._shard_count)
            by_shard.setdefault(shard, {})[block] = count

        lost = 0
        for shard, counts in by_shard.items():
            try:
                self._counts.add_reads(shard, counts)
            except ServiceError:
                lost += len(counts)  # only a hint for the warmer; other shards may be on other servers
        if lost:
            log.info("read_counts_lost", blocks=lost)


def _gone(call: Call) -> bool:
    return call.gone


def _answer_by(deadline: float | None) -> float | None:
    """When a call that is read from a shard must have its answer, computed from the time that it has left now."""
    return None if deadline is None else call_scope.answer_by(time.monotonic(), deadline)
