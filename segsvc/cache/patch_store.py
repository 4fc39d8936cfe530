"""A reader's memory of patches: which there are, their chunks, and how an entry is brought up to date with them.

It talks to nobody: it says which commands it needs, takes their replies, and lays patches over entries.

Why an old list in memory is safe: a list belongs to one nonce, and under one nonce it only grows (or is dropped, with
the nonce). The generation that comes with the entries names the epoch of the newest patch; a list that ends before it
is read again. A list that ends later is as good: the patches in between name every user who changed meanwhile. Chunks
are of one publication, and never change.
"""

from __future__ import annotations

from bisect import insort
from collections import OrderedDict
from collections.abc import Callable, Iterable, Sequence
from dataclasses import dataclass, field
from typing import Any, Final

from segsvc import metrics
from segsvc.cache import scripts
from segsvc.cache.connection import Command
from segsvc.cache.entry import Generation
from segsvc.cache.keys import Keys
from segsvc.cache.patches import CHUNK_SHIFT, CHUNK_SLOTS, HALF_BYTES_MAX, Chunk, PatchNote, decode_chunk, decode_list
from segsvc.domain.membership import EPOCH, FIRST_SEGMENT, SLOT, Entry

CHUNKS_PER_FETCH: Final = 512
"""Most chunks of one shard in one fetch: at most 4 MB. A reader that would need more answers the users for whom it has
all, and calls the rest misses."""

PATCH_BYTES_MAX: Final = 64 << 20
"""Memory for chunks, unless the settings say otherwise."""

_CHUNK_OVERHEAD: Final = 200
"""Bytes that a chunk takes in memory beside its halves."""

SlugOrder = Callable[[int], Any]
"""Segment id -> its place in the order of the slugs. Raises KeyError for an id that is not known yet."""


_NO_BITS: Final = bytes(HALF_BYTES_MAX)
_MISSING: Final = b""
"""A chunk that is not in memory: it has no bit at any place."""

_Row = list[tuple[int, bytes, bytes]]
"""For each patch of a list: its segment, and the two halves of its chunk with one number."""


@dataclass(slots=True)
class HeldPatch:
    """A patch, with the chunks that are in memory, by their number."""

    note: PatchNote
    chunks: dict[int, Chunk] = field(default_factory=dict)


@dataclass(slots=True)
class ShardPatches:
    """The list of one generation: at least one patch, oldest first.

    Attributes:
        oldest: epoch of the first patch.
        newest: epoch of the last one; there is no gap between.
        ends_us: the nearest valid_until of the patches.
        rows: by number of a chunk, what all patches say of its slots; made when it is needed.
    """

    nonce: bytes
    patches: list[HeldPatch]
    oldest: int
    newest: int
    ends_us: int
    rows: dict[int, _Row] = field(default_factory=dict)

    def floor(self, now_us: int) -> int:
        """The lowest epoch of an entry that can be brought up to date."""
        floor = self.oldest - 1
        if self.ends_us <= now_us:
            floor = max(floor, *(p.note.epoch for p in self.patches if p.note.valid_until_us <= now_us))
        return floor

    def row(self, number: int) -> _Row:
        row = self.rows.get(number)
        if row is None:
            row = self.rows[number] = [
                (patch.note.segment_id, _MISSING, _MISSING)
                if (chunk := patch.chunks.get(number)) is None
                else (patch.note.segment_id, chunk.members or _NO_BITS, chunk.changed or _NO_BITS)
                for patch in self.patches
            ]
        return row


@dataclass(slots=True)
class OlderEntries:
    """Where a lookup has found entries of one shard that are older than its newest patch.

    Attributes:
        generation: as it was when the entries were read.
        now_us: the time of the lookup.
        places: of the entries that are still to be brought up to date, in the lookup's list.
    """

    shard: int
    generation: Generation
    now_us: int
    places: list[int]


class _Incomplete(Exception):
    """A chunk that is needed is not in memory."""


@dataclass(frozen=True, slots=True)
class Fetch:
    """A command whose reply the store needs, and what takes the reply."""

    command: Command
    take: Callable[[Any], None]


class PatchStore:
    """For one thread.

    Args:
        slug_order: of all segments that the reader knows. A segment that it does not know makes a miss: the load that
            follows learns it.
        bytes_max: most memory for chunks. The chunks that were fetched first are forgotten first: they are those of the
            oldest patches, which the fewest entries need.
    """

    def __init__(self, slug_order: SlugOrder, bytes_max: int = PATCH_BYTES_MAX) -> None:
        self._slug_order = slug_order
        self._bytes_max = bytes_max
        self._shards: dict[int, ShardPatches] = {}
        self._fetched: OrderedDict[tuple[bytes, int], tuple[int, HeldPatch, int]] = OrderedDict()
        """By token and number of a chunk: its shard, its patch and its bytes in memory. In the order of fetching."""
        self.bytes_used = 0

    def list_of(self, shard: int, generation: Generation) -> ShardPatches | None:
        """The patches of a generation, complete up to its newest one at least; None: they must be fetched."""
        held = self._shards.get(shard)
        if held is None or held.nonce != generation.nonce or held.newest < generation.newest:
            return None
        return held

    # -- fetching ---------------------------------------------------------------------------------------------------

    def fetches(self, keys: Keys, shard: int, generation: Generation, older: Iterable[Entry]) -> list[Fetch]:
        """What must be fetched before these entries of one shard, all older than its newest patch, can be judged.

        Empty: nothing that could be fetched is missing.
        """
        places = [(entry[SLOT] >> CHUNK_SHIFT, entry[EPOCH]) for entry in older]
        held = self._shards.get(shard)
        if held is not None and held.nonce != generation.nonce:
            held = None

        fetches = []
        if held is not None:
            fetches += self._missing_chunks(keys, shard, held, places)
        if held is None or held.newest < generation.newest:
            known = 0 if held is None else held.newest
            fetches.append(self._newer_patches(keys, shard, generation, known, places))
        return fetches

    def _missing_chunks(
        self, keys: Keys, shard: int, held: ShardPatches, places: Sequence[tuple[int, int]]
    ) -> list[Fetch]:
        missing: dict[tuple[bytes, int], HeldPatch] = {}
        for number, epoch in places:
            first = epoch + 1 - held.oldest
            if first < 0:
                continue  # too old: a miss, whatever the patches say
            for patch in held.patches[first:]:
                if number not in patch.chunks:
                    missing[patch.note.token, number] = patch
            if len(missing) >= CHUNKS_PER_FETCH:
                break
        if not missing:
            return []
        wanted = list(missing.items())[:CHUNKS_PER_FETCH]

        def take(values: Sequence[bytes | None]) -> None:
            for ((_, number), patch), value in zip(wanted, values, strict=True):
                self._keep(shard, patch, number, value)

        return [Fetch(["MGET", *(keys.chunk(shard, token, number) for (token, number), _ in wanted)], take)]

    def _newer_patches(
        self, keys: Keys, shard: int, generation: Generation, known: int, places: Sequence[tuple[int, int]]
    ) -> Fetch:
        numbers = sorted({number for number, _ in places})
        after = max(known, min(epoch for _, epoch in places))

        def take(reply: Sequence[bytes | None]) -> None:
            notes = decode_list(reply[0], generation.nonce)
            if not notes:
                # The list is lost, or the generation was dropped since it was read: its older entries are misses.
                self._release(self._shards.pop(shard).patches if shard in self._shards else ())
                return
            held = self._take_list(shard, generation.nonce, notes)
            wanted = [(patch, number) for patch in held.patches if patch.note.epoch > after for number in numbers]
            for (patch, number), value in zip(wanted, reply[1:], strict=False):
                self._keep(shard, patch, number, value)

        sha = scripts.READ_PATCHES.sha
        command: Command = [
            "EVALSHA", sha, 1, keys.patches(shard), keys.chunk_prefix(shard), after, CHUNKS_PER_FETCH, *numbers
        ]  # fmt: skip
        return Fetch(command, take)

    def _take_list(self, shard: int, nonce: bytes, notes: Sequence[PatchNote]) -> ShardPatches:
        before = self._shards.get(shard)
        kept = {patch.note.token: patch for patch in before.patches} if before else {}
        patches = [kept.pop(note.token) if note.token in kept else HeldPatch(note) for note in notes]
        self._release(kept.values())

        held = ShardPatches(nonce, patches, notes[0].epoch, notes[-1].epoch, min(note.valid_until_us for note in notes))
        self._shards[shard] = held
        return held

    def _keep(self, shard: int, patch: HeldPatch, number: int, value: bytes | None) -> None:
        chunk = decode_chunk(value)
        if chunk is None or number in patch.chunks:
            return  # it has expired or was evicted
        metrics.patch_chunks_fetched.inc()
        patch.chunks[number] = chunk
        self._shards[shard].rows.pop(number, None)
        size = _CHUNK_OVERHEAD + sum(len(half) for half in chunk if half is not None)
        self._fetched[patch.note.token, number] = (shard, patch, size)
        self.bytes_used += size
        while self.bytes_used > self._bytes_max:
            token, first = next(iter(self._fetched))
            self._forget(token, first)

    def _release(self, patches: Iterable[HeldPatch]) -> None:
        """Free the memory of patches that no list holds any more."""
        for patch in patches:
            for number in list(patch.chunks):
                self._forget(patch.note.token, number)

    def _forget(self, token: bytes, number: int) -> None:
        shard, patch, size = self._fetched.pop((token, number))
        del patch.chunks[number]
        self.bytes_used -= size
        if shard in self._shards:
            self._shards[shard].rows.pop(number, None)

    # -- reading ----------------------------------------------------------------------------------------------------

    def lay_all(self, found: list[Entry | None], older: OlderEntries) -> None:
        """Replace older entries by what they are as of the newest patch, or by None, a miss. Entries that need patches
        or chunks which are not in memory stay as they are, and their places in ``older``."""
        held = self.list_of(older.shard, older.generation)
        if held is None:
            return
        floor = held.floor(older.now_us)
        incomplete = []
        patched = 0
        for place in older.places:
            entry = found[place]
            if entry is None:
                continue
            try:
                found[place] = updated = self._lay_over(held, entry, floor)
            except _Incomplete:
                incomplete.append(place)
            else:
                patched += updated is not None
        older.places = incomplete
        metrics.patched_reads.inc(patched)

    def _lay_over(self, held: ShardPatches, entry: Entry, floor: int) -> Entry | None:
        """An entry that is older than the newest patch, as of the newest patch; None: it cannot be brought up to date.

        Args:
            floor: ``held.floor`` of this moment.

        Raises:
            _Incomplete: a chunk is missing.
        """
        epoch = entry[EPOCH]
        if epoch < floor:
            return None

        slot = entry[SLOT]
        number, at, bit = slot >> CHUNK_SHIFT, (slot & CHUNK_SLOTS - 1) >> 3, 1 << (slot & 7)
        row = held.rows.get(number) or held.row(number)
        state: dict[int, int] = {}
        try:
            for segment_id, members, changed in row[epoch + 1 - held.oldest :]:
                if changed[at] & bit:
                    return None
                state[segment_id] = members[at] & bit  # a later patch of the same segment decides
        except IndexError:
            raise _Incomplete from None

        listed = entry[FIRST_SEGMENT:]
        before = set(listed)
        segment_ids: list[int] | None = None
        try:
            for segment_id, member in state.items():
                if member:
                    if segment_id not in before:
                        segment_ids = list(listed) if segment_ids is None else segment_ids
                        insort(segment_ids, segment_id, key=self._slug_order)
                elif segment_id in before:
                    segment_ids = list(listed) if segment_ids is None else segment_ids
                    segment_ids.remove(segment_id)
        except KeyError:
            return None  # a slug that is not known yet
        return entry if segment_ids is None else (*entry[:FIRST_SEGMENT], *segment_ids)
