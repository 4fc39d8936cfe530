"""The bytes of a cache entry: what is a hit, and what must never be one."""

from __future__ import annotations

import numpy as np
import pytest
from hypothesis import given
from hypothesis import strategies as st

from segsvc.cache import entry as entries
from segsvc.cache.keys import Keys
from segsvc.domain.membership import NEVER_US, Entry, EntryColumns

NOW_US = 1_800_000_000_000_000
NONCE = bytes(range(10))
PREFIX = entries.prefix(NONCE)
ENTRY: Entry = (NEVER_US, 7, NOW_US - 5, 2, 3, 12, 4, 2**32 - 1)

int64s = st.integers(-(2**63), 2**63 - 1)
uint32s = st.integers(0, 2**32 - 1)


@given(st.binary(min_size=10, max_size=10), int64s, int64s, uint32s, uint32s, st.lists(uint32s, max_size=50))
def test_what_is_encoded_is_decoded(
    nonce: bytes, version: int, time: int, epoch: int, slot: int, ids: list[int]
) -> None:
    entry: Entry = (NEVER_US, version, time, epoch, slot, *ids)
    assert entries.decode(entries.encode(nonce, entry), entries.prefix(nonce), NOW_US) == entry


def test_layout_is_the_documented_one() -> None:
    value = entries.encode(NONCE, (5, 6, 7, 8, 9, 10, 11))
    assert value == (
        b"V"
        + NONCE
        + b"\x02"
        + b"".join(n.to_bytes(8, "little") for n in (5, 6, 7))
        + b"".join(n.to_bytes(4, "little") for n in (8, 9, 10, 11))
    )
    assert len(value) == entries.HEADER_BYTES + 2 * 4


@pytest.mark.parametrize(
    "value",
    [
        pytest.param(None, id="absent"),
        pytest.param(b"", id="empty"),
        pytest.param(b"Ltoken", id="lease"),
        pytest.param(b"Btoken", id="bar"),
        pytest.param(entries.encode(NONCE, ENTRY).replace(b"V", b"W", 1), id="other kind"),
        pytest.param(entries.encode(b"x" * 10, ENTRY), id="other generation"),
        pytest.param(PREFIX[:-1] + b"\x01" + entries.encode(NONCE, ENTRY)[12:], id="other format"),
        pytest.param(entries.encode(NONCE, ENTRY)[:-1], id="cut inside an id"),
        pytest.param(entries.encode(NONCE, ENTRY)[:43], id="cut inside the header"),
        pytest.param(entries.encode(NONCE, (NOW_US, *ENTRY[1:])), id="expires now"),
        pytest.param(entries.encode(NONCE, (NOW_US - 1, *ENTRY[1:])), id="has expired"),
    ],
)
def test_anything_but_a_usable_value_is_a_miss(value: bytes | None) -> None:
    assert entries.decode(value, PREFIX, NOW_US) is None


def test_value_is_used_until_its_override_expires() -> None:
    entry = (NOW_US + 1, *ENTRY[1:])
    assert entries.decode(entries.encode(NONCE, entry), PREFIX, NOW_US) == entry


def test_without_a_generation_nothing_is_a_hit() -> None:
    assert entries.decode(entries.encode(NONCE, ENTRY), None, NOW_US) is None


def test_user_in_no_segment_is_a_hit_not_a_miss() -> None:
    assert entries.decode(entries.encode(NONCE, ENTRY[:5]), PREFIX, NOW_US) == ENTRY[:5]


@pytest.mark.parametrize("segment_id", [2**32, -1])
def test_segment_id_beyond_its_field_is_refused(segment_id: int) -> None:
    with pytest.raises(entries.struct.error):
        entries.encode(NONCE, (*ENTRY, segment_id))


RUN = b"a" * 40


@pytest.mark.parametrize(
    ("generation", "nonce"),
    [
        (RUN + NONCE + bytes(8), NONCE),
        (None, None),
        (b"b" * 40 + NONCE + bytes(8), None),
        (RUN + NONCE + bytes(7), None),
        (RUN + NONCE, None),
        (b"", None),
    ],
)
def test_generation_counts_only_for_the_run_of_its_server(generation: bytes | None, nonce: bytes | None) -> None:
    assert entries.nonce_of(generation, RUN) == nonce


@given(
    st.lists(st.tuples(st.integers(1, 2**63 - 1), int64s, int64s, uint32s, st.lists(uint32s, max_size=9)), max_size=20)
)
def test_columns_encode_as_one_by_one(users: list[tuple[int, int, int, int, list[int]]]) -> None:
    columns = EntryColumns(
        user_ids=np.array([u[0] for u in users], dtype=np.int64),
        row_versions=np.array([u[1] for u in users], dtype=np.int64),
        valid_until_us=np.array([u[2] for u in users], dtype=np.int64),
        slots=np.array([u[3] for u in users], dtype=np.uint32),
        read_time_us=NOW_US,
        epoch=17,
        counts=np.array([len(u[4]) for u in users], dtype=np.int64),
        segment_ids=np.array([i for u in users for i in u[4]], dtype=np.uint32),
    )

    assert list(entries.encode_columns(NONCE, columns)) == [
        entries.encode(NONCE, (until, version, NOW_US, 17, slot, *ids)) for _, version, until, slot, ids in users
    ]


def test_keys_of_a_shard_share_its_hash_tag() -> None:
    keys = Keys(b"1f3a99c0")
    names = [keys.generation(12), keys.user(12, 99), keys.hot(12), keys.warm(12), *keys.users(12, [5])]
    assert names == [b"{1f3a99c0:12}:" + name for name in (b"g", b"u:99", b"hot", b"warm", b"u:5")]
