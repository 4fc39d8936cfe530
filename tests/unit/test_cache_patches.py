"""Patches as bytes, and what a reader makes of them."""

from __future__ import annotations

from collections.abc import Sequence

import numpy as np
import pytest
from hypothesis import given
from hypothesis import strategies as st

from segsvc.cache.entry import Generation
from segsvc.cache.keys import Keys
from segsvc.cache.patch_store import CHUNKS_PER_FETCH, OlderEntries, PatchStore
from segsvc.cache.patches import (
    CHUNK_SLOTS,
    ITEM_BYTES,
    Chunk,
    PatchNote,
    decode_chunk,
    decode_list,
    encode_chunks,
    encode_note,
    note_of,
)
from segsvc.domain import bits
from segsvc.domain.membership import FIRST_SEGMENT, NEVER_US, Entry
from segsvc.domain.patch import Patch
from segsvc.domain.sharding import BLOCK_SLOTS

NONCE = b"0123456789"
KEYS = Keys(b"1f3a99c0")
SHARD = 3
NOW_US = 1_000
SLUGS = {7: "c", 8: "a", 9: "b"}


def made(
    epoch: int, segment_id: int, members: Sequence[int], changed: Sequence[int] = (), *, slots: int = 40_000,
    until_us: int | None = None,
) -> Patch:  # fmt: skip
    blocks = -(-slots // BLOCK_SLOTS)
    packed = bits.at_slots(np.array(members, dtype=np.int64), 0, blocks) if members else None
    return Patch(epoch, segment_id, slots, packed, np.array(changed, dtype=np.uint32), until_us)


class Server:
    """Answers the commands of a store."""

    def __init__(self) -> None:
        self.values: dict[bytes, bytes] = {}
        self.items: list[bytes] = []
        self.nonce = NONCE
        self.asked = 0

    def publish(self, patch: Patch, *, keep: int = 64) -> PatchNote:
        token = b"%016d" % len(self.values)
        for number, chunk in enumerate(encode_chunks(patch)):
            self.values[KEYS.chunk(SHARD, token, number)] = chunk
        note = note_of(patch, token)
        self.items = [*self.items, encode_note(note)][-keep:]
        return note

    @property
    def generation(self) -> Generation:
        return Generation(self.nonce, decode_list(self.list, self.nonce)[-1].epoch if self.items else 0)

    @property
    def list(self) -> bytes | None:
        return self.nonce + b"".join(self.items) if self.items else None

    def answer(self, command: Sequence[object]) -> list[bytes | None]:
        self.asked += 1
        if command[0] == "MGET":
            return [self.values.get(key) for key in command[1:]]  # type: ignore[call-overload, misc]
        after, most, *numbers = command[5:]
        reply: list[bytes | None] = [self.list]
        for note in decode_list(self.list, self.nonce):
            if note.epoch > after:  # type: ignore[operator]
                reply += [self.values.get(KEYS.chunk(SHARD, note.token, int(n))) for n in numbers]  # type: ignore[call-overload]
        return reply[: int(most) + 1]  # type: ignore[call-overload]


class Reader:
    def __init__(self, server: Server, bytes_max: int = 1 << 30) -> None:
        self.server = server
        self.store = PatchStore(SLUGS.__getitem__, bytes_max)

    def read(self, *entries: Entry, now_us: int = NOW_US) -> list[tuple[int, ...] | None]:
        """The segments that a lookup answers with; None: a miss."""
        found: list[Entry | None] = list(entries)
        older = OlderEntries(SHARD, self.server.generation, now_us, list(range(len(entries))))
        self.store.lay_all(found, older)
        if older.places:
            rest = [entries[place] for place in older.places]
            for fetch in self.store.fetches(KEYS, SHARD, older.generation, rest):
                fetch.take(self.server.answer(fetch.command))
            self.store.lay_all(found, older)
        for place in older.places:
            found[place] = None
        return [None if entry is None else tuple(entry[FIRST_SEGMENT:]) for entry in found]


def entry(epoch: int, slot: int, *segment_ids: int) -> Entry:
    return (NEVER_US, 1, 2, epoch, slot, *segment_ids)


@pytest.fixture
def server() -> Server:
    return Server()


# -- bytes ----------------------------------------------------------------------------------------------------------


@given(
    st.lists(st.tuples(st.integers(0, 2**32 - 1), st.integers(-(2**63), NEVER_US)), min_size=1), st.integers(1, 2**62)
)
def test_a_list_is_read_as_it_was_written(patches: list[tuple[int, int]], first: int) -> None:
    notes = [PatchNote(first + n, segment, b"%016d" % n, until) for n, (segment, until) in enumerate(patches)]
    assert decode_list(NONCE + b"".join(map(encode_note, notes)), NONCE) == notes


NOTES = [encode_note(PatchNote(epoch, 7, b"t" * 16, NEVER_US)) for epoch in range(9)]


@pytest.mark.parametrize(
    "value",
    [
        None,
        b"",
        NONCE,
        b"another012" + NOTES[1],
        NONCE + NOTES[1][:-1],
        NONCE + NOTES[1] + b"x" * ITEM_BYTES,
        NONCE + NOTES[1] + NOTES[3],
        NONCE + NOTES[2] + NOTES[1],
    ],
)
def test_a_list_that_is_lost_of_another_generation_or_odd_has_no_patches(value: bytes | None) -> None:
    assert decode_list(value, NONCE) == []


@given(st.data())
def test_chunks_are_read_as_they_were_written(data: st.DataObject) -> None:
    slots = data.draw(st.sampled_from([1, 1024, CHUNK_SLOTS - 1, CHUNK_SLOTS, CHUNK_SLOTS + 1, 70_000]))
    sets = st.sets(st.integers(0, slots - 1), max_size=50)
    members, changed = data.draw(sets), data.draw(sets)
    chunks = [decode_chunk(value) for value in encode_chunks(made(1, 7, sorted(members), sorted(changed), slots=slots))]
    assert len(chunks) == -(-slots // CHUNK_SLOTS)

    def named(half: str) -> set[int]:
        halves = [getattr(chunk, half) or bytes(CHUNK_SLOTS // 8) for chunk in chunks]
        assert all(len(each) == CHUNK_SLOTS // 8 for each in halves)
        return set(np.flatnonzero(np.unpackbits(np.frombuffer(b"".join(halves), np.uint8), bitorder="little")).tolist())

    assert (named("members"), named("changed")) == (members, changed)


def test_a_half_without_a_bit_takes_no_room() -> None:
    sizes = [len(next(encode_chunks(made(1, 7, members, changed)))) for members in ([], [5]) for changed in ([], [5])]
    half = CHUNK_SLOTS // 8
    assert sizes == [1, 1 + half, 1 + half, 1 + 2 * half]


@pytest.mark.parametrize("value", [None, b"", b"\x00x", b"\x01", b"\x03abc", b"\x04ab", b"\x01" + bytes(5000), b"\x09"])
def test_an_odd_chunk_is_a_lost_one(value: bytes | None) -> None:
    assert decode_chunk(value) is None


def test_an_empty_chunk_is_not_a_lost_one() -> None:
    assert decode_chunk(b"\x00") == Chunk(None, None)


# -- laying over ----------------------------------------------------------------------------------------------------


def test_the_segment_is_put_in_by_its_slug_and_taken_out(server: Server) -> None:
    server.publish(made(5, 9, [10]))
    assert Reader(server).read(entry(4, 10, 8, 7), entry(4, 11, 8, 9, 7), entry(4, 10, 9), entry(4, 11)) == [
        (8, 9, 7),
        (8, 7),
        (9,),
        (),
    ]


def test_a_deletion_strikes_the_segment_out(server: Server) -> None:
    server.publish(made(5, 9, []))
    assert Reader(server).read(entry(4, 10, 8, 9, 7), entry(4, 11, 7)) == [(8, 7), (7,)]


def test_patches_are_laid_in_order_from_the_entrys_epoch_on(server: Server) -> None:
    server.publish(made(5, 7, [1, 2, 3]))
    server.publish(made(6, 8, [1]))
    server.publish(made(7, 7, [3]))
    read = Reader(server).read
    assert read(entry(4, 1), entry(4, 3), entry(5, 1, 7), entry(6, 1, 8, 7)) == [(8,), (7,), (8,), (8,)]


def test_a_user_who_changed_is_a_miss_up_to_the_patch_that_says_so(server: Server) -> None:
    server.publish(made(5, 7, [1]))
    server.publish(made(6, 8, [1], changed=[1]))
    server.publish(made(7, 9, [1]))
    assert Reader(server).read(entry(4, 1), entry(5, 1, 7), entry(6, 1, 8, 7), entry(5, 2)) == [
        None,
        None,
        (8, 9, 7),
        (),
    ]


def test_an_entry_from_before_the_list_is_a_miss(server: Server) -> None:
    for epoch in (5, 6, 7):
        server.publish(made(epoch, 7, [1]), keep=2)
    assert Reader(server).read(entry(4, 1), entry(5, 1)) == [None, (7,)]


def test_entries_are_no_use_from_the_end_that_a_patch_names(server: Server) -> None:
    server.publish(made(5, 7, [1]))
    server.publish(made(6, 8, [1], until_us=NOW_US + 5))
    server.publish(made(7, 9, [1]))
    reader = Reader(server)
    assert reader.read(entry(4, 1), entry(5, 1, 7), now_us=NOW_US + 4) == [(8, 9, 7), (8, 9, 7)]
    read = reader.read(entry(4, 1), entry(5, 1, 7), entry(6, 1, 8, 7), now_us=NOW_US + 5)
    assert read == [None, None, (8, 9, 7)]


def test_a_segment_whose_slug_is_not_known_makes_a_miss(server: Server) -> None:
    """The load that follows learns the slug."""
    server.publish(made(5, 99, [1]))
    assert Reader(server).read(entry(4, 1, 7), entry(4, 2, 7)) == [None, (7,)]


def test_a_slot_that_the_patch_does_not_know_is_a_miss(server: Server) -> None:
    server.publish(made(5, 7, [1], slots=100))
    assert Reader(server).read(entry(4, 10 * CHUNK_SLOTS), entry(4, 2**32 - 1)) == [None, None]


# -- fetching -------------------------------------------------------------------------------------------------------


def test_what_is_known_is_not_fetched_again(server: Server) -> None:
    reader = Reader(server)
    server.publish(made(5, 7, [1], slots=70_000))
    assert reader.read(entry(4, 1)) == [(7,)]
    assert reader.read(entry(4, 2)) == [()]
    assert server.asked == 1, "one command for list and chunk; the second user is in the same chunk"
    assert reader.read(entry(4, CHUNK_SLOTS + 1)) == [()]
    assert server.asked == 2

    server.publish(made(6, 8, [1], slots=70_000))
    assert reader.read(entry(4, 1)) == [(8, 7)]
    assert server.asked == 3, "of the patch that is new; the other one is in memory"


def test_a_list_that_ends_later_is_as_good(server: Server) -> None:
    reader = Reader(server)
    server.publish(made(5, 7, [1]))
    before = server.generation
    server.publish(made(6, 8, [1]))
    assert reader.read(entry(4, 1)) == [(8, 7)]

    found: list[Entry | None] = [entry(4, 1)]
    reader.store.lay_all(found, OlderEntries(SHARD, before, NOW_US, [0]))
    assert found == [entry(4, 1, 8, 7)]


def test_another_generation_has_nothing_of_the_one_before(server: Server) -> None:
    reader = Reader(server)
    server.publish(made(5, 7, [1]))
    assert reader.read(entry(4, 1)) == [(7,)]
    server.nonce, server.items = b"another012", []
    server.publish(made(6, 8, [1]))
    assert reader.read(entry(5, 1)) == [(8,)]
    assert reader.read(entry(4, 1)) == [None], "no patch under this generation says what the one before 6 did"


@pytest.mark.parametrize("lost", ["list", "chunk", "generation"])
def test_what_is_lost_makes_a_miss(server: Server, lost: str) -> None:
    reader = Reader(server)
    server.publish(made(5, 7, [1]))
    generation = server.generation
    if lost == "chunk":
        server.values.clear()
    elif lost == "list":
        server.items = []
    else:
        server.nonce = b"another012"
    found: list[Entry | None] = [entry(4, 1)]
    older = OlderEntries(SHARD, generation, NOW_US, [0])
    for fetch in reader.store.fetches(KEYS, SHARD, generation, [entry(4, 1)]):
        fetch.take(server.answer(fetch.command))
    reader.store.lay_all(found, older)
    assert older.places == [0]


def test_a_chunk_that_only_older_entries_need_may_be_lost(server: Server) -> None:
    reader = Reader(server)
    first = server.publish(made(5, 7, [1]))
    server.publish(made(6, 8, [1]))
    server.values.pop(KEYS.chunk(SHARD, first.token, 0))
    assert reader.read(entry(4, 1), entry(5, 1)) == [None, (8,)]


def test_memory_is_bounded_and_what_was_forgotten_is_fetched_again(server: Server) -> None:
    reader = Reader(server, bytes_max=20_000)
    last = 40
    for epoch in range(5, last + 1):
        server.publish(made(epoch, 7, [1] if epoch == last else [2]))
        assert reader.read(entry(epoch - 1, 1), entry(epoch - 1, 2)) == ([(7,), ()] if epoch == last else [(), (7,)])
        assert reader.store.bytes_used <= 20_000
    assert reader.read(entry(last - 4, 1)) == [(7,)], "four chunks have room"
    assert reader.store.bytes_used <= 20_000
    assert reader.read(entry(last - 1, 1)) == [(7,)]


def test_memory_of_patches_that_fell_out_of_the_list_is_freed(server: Server) -> None:
    reader = Reader(server)
    server.publish(made(5, 7, [1]))
    reader.read(entry(4, 1))
    used = reader.store.bytes_used
    for epoch in range(6, 30):
        server.publish(made(epoch, 7, [1]), keep=1)
        reader.read(entry(epoch - 1, 1))
    assert reader.store.bytes_used == used


def test_a_fetch_is_bounded(server: Server) -> None:
    slots = (CHUNKS_PER_FETCH + 50) * CHUNK_SLOTS
    note = server.publish(made(5, 7, [1], slots=40_000))
    chunk = server.values[KEYS.chunk(SHARD, note.token, 0)]
    for number in range(CHUNKS_PER_FETCH + 50):
        server.values[KEYS.chunk(SHARD, note.token, number)] = chunk
    everyone = [entry(4, slot) for slot in range(1, slots, CHUNK_SLOTS)]
    reader = Reader(server)
    assert reader.read(*everyone).count(None) == 50
    assert reader.read(*everyone).count(None) == 0
