"""The warmer's arithmetic, compared with the plain meaning of bits and overrides."""

from __future__ import annotations

import random

import numpy as np
import pytest

from segsvc.domain.membership import NEVER_US, UserBlock
from segsvc.services.slug_map import SlugMap
from segsvc.services.warm_columns import entry_columns, segments_of

SLUGS = {number: f"slug-{(number * 37) % 101:03d}" for number in range(1, 60)}


Facts = tuple[int, set[int], list[tuple[int, int, int, int]]]
"""A user's row_version, segments by the bits, and overrides."""


def make_block(rng: random.Random, number: int) -> tuple[UserBlock, dict[int, Facts]]:
    user_ids = np.zeros(1024, dtype=np.int64)
    versions = np.zeros(1024, dtype=np.int64)
    for bit in rng.sample(range(1024), 300):
        user_ids[bit] = number * 10_000 + bit + 1
        versions[bit] = rng.randrange(1000)

    segments = rng.sample(sorted(SLUGS), rng.randrange(0, 20))
    flags = np.zeros((len(segments), 1024), dtype=np.bool_)
    for row in range(len(segments)):
        # Bits of absent users too: they must lead to nothing.
        flags[row, rng.sample(range(1024), 200)] = True

    overrides = [
        (bit, segment, rng.randrange(2), rng.choice([NEVER_US, 10**15 + rng.randrange(1000)]))
        for bit in rng.sample(range(1024), 60)
        for segment in rng.sample(sorted(SLUGS), 2)
        if user_ids[bit]
    ]

    users = {}
    for bit in np.flatnonzero(user_ids).tolist():
        mine = [override for override in overrides if override[0] == bit]
        by_rule = {segment for row, segment in enumerate(segments) if flags[row, bit]}
        users[int(user_ids[bit])] = (int(versions[bit]), by_rule, mine)

    block = UserBlock(
        block=number,
        user_ids=user_ids,
        row_versions=versions,
        segment_ids=np.array(segments, dtype=np.int64),
        packed=np.packbits(flags, axis=1, bitorder="little").reshape(-1, 128),
        overrides=np.array(overrides, dtype=np.int64).reshape(-1, 4),
        read_time_us=10**15,
        epoch=6,
    )
    return block, users


@pytest.mark.parametrize("seed", range(5))
def test_columns_are_what_the_bits_say(seed: int) -> None:
    rng = random.Random(seed)
    slugs = SlugMap(lambda _: SLUGS)
    slugs.learn(0, SLUGS)
    made = [make_block(rng, number) for number in (4, 2, 9)]
    expected = {user: facts for _, users in made for user, facts in users.items()}
    granted = rng.sample(sorted(expected), 500)
    without_slug = set(rng.sample(sorted(SLUGS), 3))

    columns = entry_columns([block for block, _ in made], np.array(granted), without_slug, slugs)

    assert sorted(columns.user_ids.tolist()) == sorted(granted)
    ends = np.cumsum(columns.counts).tolist()
    assert ends[-1] == columns.segment_ids.size

    for index, user in enumerate(columns.user_ids.tolist()):
        version, member, overrides = expected[user]
        for _, segment, included, _ in overrides:
            member = member | {segment} if included else member - {segment}
        ids = columns.segment_ids[ends[index] - columns.counts[index] : ends[index]].tolist()
        assert ids == sorted(member - without_slug, key=SLUGS.__getitem__)
        assert columns.row_versions[index] == version
        until = [override[3] for override in overrides if override[1] not in without_slug]
        assert columns.valid_until_us[index] == min(until, default=NEVER_US)
        [[block, bit]] = [
            [block.block, bit] for block, _ in made for bit in np.flatnonzero(block.user_ids == user).tolist()
        ]
        assert columns.slots[index] == block * 1024 + bit
    assert columns.epoch == 6


def test_users_without_any_segment_are_entries_too() -> None:
    block = UserBlock(
        block=0,
        user_ids=np.array([5] + [0] * 1023, dtype=np.int64),
        row_versions=np.zeros(1024, dtype=np.int64),
        segment_ids=np.zeros(0, dtype=np.int64),
        packed=np.zeros((0, 128), dtype=np.uint8),
        overrides=np.zeros((0, 4), dtype=np.int64),
        read_time_us=1,
        epoch=6,
    )

    columns = entry_columns([block], np.array([5]), set(), SlugMap(lambda _: {}))
    assert columns.user_ids.tolist() == [5]
    assert columns.counts.tolist() == [0]
    assert segments_of([block]) == set()
