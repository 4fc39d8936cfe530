"""Turns whole blocks from bits per segment into segments per user: the warmer's arithmetic, in numpy."""

from __future__ import annotations

from collections.abc import Sequence

import numpy as np
import numpy.typing as npt

from segsvc.domain.membership import NEVER_US, EntryColumns, UserBlock
from segsvc.domain.sharding import BLOCK_BYTES, BLOCK_SLOTS
from segsvc.services.slug_map import SlugMap


def segments_of(blocks: Sequence[UserBlock]) -> set[int]:
    """All segments that occur in the memberships of these blocks."""
    found: set[int] = set()
    for block in blocks:
        found.update(block.segment_ids.tolist(), block.overrides[:, 1].tolist())
    return found


def entry_columns(
    blocks: Sequence[UserBlock], granted: npt.NDArray[np.int64], without_slug: set[int], slugs: SlugMap
) -> EntryColumns:
    """Entries of those users of these blocks whose ids are among ``granted``.

    Args:
        blocks: at least one, all read by one statement.
        granted: ids of users that the cache has given leases for.
        without_slug: segments to leave out, see ``SlugMap.read_named``.
    """
    by_slug = np.array(slugs.in_slug_order(segments_of(blocks) - without_slug), dtype=np.int64)
    flags, valid_until_us = _flags(blocks, by_slug)

    user_ids = np.concatenate([block.user_ids for block in blocks])
    slots = np.array([block.block for block in blocks])[:, None] * BLOCK_SLOTS + np.arange(BLOCK_SLOTS)
    wanted = np.flatnonzero((user_ids > 0) & np.isin(user_ids, granted))
    by_user = flags.reshape(user_ids.size, by_slug.size)[wanted]
    # Row by row, so a user's segments come together, in the order of the slugs.
    columns = np.flatnonzero(by_user) % max(by_slug.size, 1)

    return EntryColumns(
        user_ids=user_ids[wanted],
        slots=slots.ravel()[wanted].astype(np.uint32),
        row_versions=np.concatenate([block.row_versions for block in blocks])[wanted],
        valid_until_us=valid_until_us[wanted],
        read_time_us=blocks[0].read_time_us,
        epoch=blocks[0].epoch,
        counts=np.count_nonzero(by_user, axis=1),
        segment_ids=by_slug[columns].astype(np.uint32),
    )


def _flags(
    blocks: Sequence[UserBlock], by_slug: npt.NDArray[np.int64]
) -> tuple[npt.NDArray[np.bool_], npt.NDArray[np.int64]]:
    """Memberships, shape (blocks, 1024, segments), overrides included; and each slot's nearest expiry."""
    sorter = np.argsort(by_slug)

    # Transposed while eight slots are one byte: an eighth of the work.
    packed = np.zeros((len(blocks), BLOCK_BYTES, by_slug.size), dtype=np.uint8)
    for index, block in enumerate(blocks):
        named = np.isin(block.segment_ids, by_slug)
        rows = sorter[np.searchsorted(by_slug, block.segment_ids[named], sorter=sorter)]
        packed[index, :, rows] = block.packed[named]
    flags = np.unpackbits(packed, axis=1, bitorder="little").view(np.bool_)

    valid_until_us = np.full((len(blocks), BLOCK_SLOTS), NEVER_US, dtype=np.int64)
    for index, block in enumerate(blocks):
        overrides = block.overrides[np.isin(block.overrides[:, 1], by_slug)]
        if overrides.size:
            rows = sorter[np.searchsorted(by_slug, overrides[:, 1], sorter=sorter)]
            flags[index, overrides[:, 0], rows] = overrides[:, 2] == 1
            np.minimum.at(valid_until_us[index], overrides[:, 0], overrides[:, 3])
    return flags, valid_until_us.reshape(-1)
