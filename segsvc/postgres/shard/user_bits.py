"""Directory, bits and counters of a shard by block, for users who are created, changed or deleted. Implements
``services.user_bits``."""

from __future__ import annotations

from collections.abc import Iterable, Iterator, Mapping, Sequence
from typing import Any

import numpy as np
import numpy.typing as npt
import sqlalchemy as sa
from sqlalchemy.dialects.postgresql import ARRAY

from segsvc.domain import bits
from segsvc.domain.segment import ShardSegment
from segsvc.domain.sharding import BLOCK_BYTES, BLOCK_SLOTS
from segsvc.domain.stored import Int64s
from segsvc.postgres import tables
from segsvc.postgres.conditions.statements import matching
from segsvc.postgres.copying import append_rows, bigint_array
from segsvc.postgres.segment_rows import SHARD_COLUMNS, to_shard_segment


def int_array(values: Iterable[int]) -> sa.ColumnElement[Any]:
    """A bigint[] parameter."""
    return sa.cast(sa.bindparam(None, bigint_array(values), type_=sa.Text), ARRAY(sa.BigInteger))


class PostgresShardBits:
    """Within one open transaction that holds the shard's lock and the row of shard_state."""

    def __init__(self, connection: sa.Connection) -> None:
        self._connection = connection

    def rules(self) -> Sequence[ShardSegment]:
        """The shard's segments that have a rule, by id."""
        segments = tables.shard_segments.c
        rows = self._connection.execute(
            sa.select(*SHARD_COLUMNS).where(segments.rule_threshold.is_not(None)).order_by(segments.id)
        )
        return [to_shard_segment(*row) for row in rows]

    def matching(self, conditions: Sequence[str], slots: Int64s) -> Iterator[tuple[str, npt.NDArray[np.bool_]]]:
        """For each condition in turn, for which of the users in these slots it holds, by their present attributes."""
        return matching(self._connection, conditions, slots)

    def directory(self, blocks: Sequence[int]) -> Mapping[int, bits.UserIds]:
        """User ids, for the blocks among these that exist."""
        directory = tables.directory.c
        rows = self._connection.execute(
            sa.select(directory.block, directory.user_ids).where(directory.block == sa.any_(int_array(blocks)))
        )
        return {row.block: np.frombuffer(row.user_ids, dtype="<i8") for row in rows}

    def put_directory(self, directory: Mapping[int, bits.UserIds]) -> None:
        """Write blocks of the directory, new ones too."""
        if not directory:
            return

        # One bytea for all blocks, which the server cuts: an array of bytea would be quoted twice.
        self._connection.execute(
            sa.text(
                "INSERT INTO directory (block, user_ids) "
                "SELECT b.block, substring(:user_ids FROM ((b.n - 1) * :width + 1)::int FOR :width) "
                "FROM unnest(CAST(:blocks AS bigint[])) WITH ORDINALITY AS b(block, n) "
                "ON CONFLICT (block) DO UPDATE SET user_ids = excluded.user_ids"
            ),
            {
                "blocks": bigint_array(directory),
                "user_ids": b"".join(user_ids.astype("<i8").tobytes() for user_ids in directory.values()),
                "width": BLOCK_SLOTS * 8,
            },
        )

    def bit_rows(self, blocks: Sequence[int]) -> bits.BitRows:
        """Every segment's bits in these blocks, by block and segment."""
        # One row a block: thousands of small rows would take longer to fetch than to find.
        rows = self._connection.execute(
            sa.text(
                "SELECT block, array_agg(segment_id ORDER BY segment_id) AS segment_ids, "
                "string_agg(bits, ''::bytea ORDER BY segment_id) AS bits "
                "FROM memberships WHERE block = ANY(CAST(:blocks AS bigint[])) GROUP BY block ORDER BY block"
            ),
            {"blocks": bigint_array(blocks)},
        ).all()

        return bits.BitRows(
            blocks=np.repeat(
                np.array([row.block for row in rows], dtype=np.int64),
                np.array([len(row.segment_ids) for row in rows], dtype=np.int64),
            ),
            segment_ids=np.array([segment_id for row in rows for segment_id in row.segment_ids], dtype=np.int64),
            packed=np.frombuffer(b"".join(row.bits for row in rows), dtype=np.uint8).reshape(-1, BLOCK_BYTES),
        )

    def put_bit_rows(self, rows: bits.BitRows, *, stored: npt.NDArray[np.bool_]) -> None:
        """Write rows of bits in place of the stored ones; a row without a bit set is not written.

        Args:
            stored: for each row, whether it is stored already.

        Rows are deleted and appended, not updated: COPY fills pages, and a new version of a row seldom fits on the page
        of the old one.
        """
        if stored.any():
            self._connection.execute(
                sa.text(
                    "DELETE FROM memberships USING "
                    "unnest(CAST(:blocks AS bigint[]), CAST(:segment_ids AS bigint[])) AS e(block, segment_id) "
                    "WHERE memberships.block = e.block AND memberships.segment_id = e.segment_id"
                ),
                {
                    "blocks": bigint_array(rows.blocks[stored].tolist()),
                    "segment_ids": bigint_array(rows.segment_ids[stored].tolist()),
                },
            )

        kept = rows.packed.any(axis=1)
        if kept.any():
            append_rows(
                self._connection,
                tables.memberships,
                block=rows.blocks[kept],
                segment_id=rows.segment_ids[kept],
                bits=rows.packed[kept],
            )

    def add_to_rule_counts(self, added: Mapping[int, int]) -> None:
        """Add to segments' counters."""
        self._connection.execute(
            sa.text(
                "UPDATE segments SET rule_count = segments.rule_count + a.added "
                "FROM unnest(CAST(:ids AS bigint[]), CAST(:added AS bigint[])) AS a(id, added) "
                "WHERE segments.id = a.id"
            ),
            {"ids": bigint_array(added), "added": bigint_array(added.values())},
        )
