"""Segments in the catalog: read, listed and edited. Implements ``services.segments.SegmentCatalog``.

Operations change segments in ``catalog.ledger``, in the transaction that decides them.
"""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from typing import Any

import sqlalchemy as sa

from segsvc.domain.catalog import EditedField, SegmentOrder, SegmentPosition, SegmentQuery
from segsvc.domain.condition_cost import RuleInForce
from segsvc.domain.errors import etag_mismatch, segment_deleting, segment_not_found
from segsvc.domain.segment import Segment, SegmentState
from segsvc.postgres import tables
from segsvc.postgres.catalog import audit_trail
from segsvc.postgres.engine import Databases
from segsvc.postgres.segment_rows import COLUMNS, IN_FORCE_COLUMNS, to_rule_in_force, to_segment

_table = tables.segments.c

_VISIBLE = _table.state != SegmentState.RESERVED
"""A reserved slug belongs to a creation that may still fail: no caller may see it."""

_ORDER: Mapping[SegmentOrder, sa.ColumnElement[Any]] = {
    # Byte order whatever the database's collation, which may ignore punctuation.
    SegmentOrder.SLUG: _table.slug.collate("C"),
    SegmentOrder.CREATE_TIME: _table.create_time,
    SegmentOrder.MEMBER_COUNT: _table.member_count,
}


def select_segment(connection: sa.Connection, slug: str, *, for_update: bool = False) -> Segment | None:
    """The segment of a slug, locked against other changes if wanted; None: there is none, or only a reservation."""
    statement = sa.select(*COLUMNS).where(_table.slug == slug, _VISIBLE)
    row = connection.execute(statement.with_for_update() if for_update else statement).one_or_none()
    return None if row is None else to_segment(row)


def select_page(
    connection: sa.Connection, query: SegmentQuery, after: SegmentPosition | None, limit: int
) -> list[Segment]:
    """Segments that a query matches, in its order, after a position."""
    key = _ORDER[query.order]
    statement = sa.select(*COLUMNS).where(_VISIBLE, *_has_labels(query)).limit(limit)

    if after is not None:
        place = sa.tuple_(key, _table.id)
        bound = sa.tuple_(sa.literal(after.key, key.type), sa.literal(after.id, _table.id.type))
        statement = statement.where(place < bound if query.descending else place > bound)

    if query.descending:
        statement = statement.order_by(key.desc(), _table.id.desc())
    else:
        statement = statement.order_by(key.asc(), _table.id.asc())
    return [to_segment(row) for row in connection.execute(statement)]


def count_segments(connection: sa.Connection, query: SegmentQuery) -> int:
    """How many segments a query matches on all its pages."""
    statement = sa.select(sa.func.count()).select_from(tables.segments).where(_VISIBLE, *_has_labels(query))
    return int(connection.execute(statement).scalar_one())


def count_taken_slugs(connection: sa.Connection) -> int:
    """How many slugs are taken, reserved ones included: the limit of segments bounds this number."""
    return int(connection.execute(sa.select(sa.func.count()).select_from(tables.segments)).scalar_one())


def select_rules_in_force(connection: sa.Connection) -> list[RuleInForce]:
    """The rules of ACTIVE segments that have a condition."""
    return [
        to_rule_in_force(row)
        for row in connection.execute(
            sa.select(*IN_FORCE_COLUMNS).where(_table.rule_condition != "", _table.state == SegmentState.ACTIVE)
        )
    ]


def update_text(
    connection: sa.Connection, segment_id: int, changes: Mapping[EditedField, str | Mapping[str, str]], etag: str
) -> Segment:
    """Store a segment's display name, description and labels, with its new etag and update time."""
    statement = (
        sa.update(tables.segments)
        .where(_table.id == segment_id)
        .values(
            {
                **{name.value: value for name, value in changes.items()},
                "etag": etag,
                "update_time": sa.func.clock_timestamp(),
            }
        )
        .returning(*COLUMNS)
    )

    return to_segment(connection.execute(statement).one())


class PostgresSegmentCatalog:
    """The segments of one catalog database.

    Args:
        reads: connections for reads that are no part of a change; None: the same as for changes.
    """

    def __init__(self, databases: Databases, reads: Databases | None = None) -> None:
        self._databases = databases
        self._reads = reads or databases

    def get(self, slug: str, *, timeout_s: float | None) -> Segment | None:
        """The segment of a slug; None: there is none."""
        with self._reads.catalog_autocommit(timeout_s=timeout_s) as connection:
            return select_segment(connection, slug)

    def page(
        self, query: SegmentQuery, after: SegmentPosition | None, limit: int, *, timeout_s: float | None
    ) -> tuple[Sequence[Segment], int]:
        """At most ``limit`` segments after a position, and how many the query matches in all."""
        with self._reads.catalog_autocommit(timeout_s=timeout_s) as connection:
            return select_page(connection, query, after, limit), count_segments(connection, query)

    def rules_in_force(self, *, timeout_s: float | None) -> Sequence[RuleInForce]:
        """Every live segment's rule that has a condition."""
        with self._databases.catalog_tx(timeout_s=timeout_s) as connection:
            return select_rules_in_force(connection)

    def edit(
        self,
        slug: str,
        changes: Mapping[EditedField, str | Mapping[str, str]],
        *,
        expected_etag: str,
        etag: str,
        actor: str,
        timeout_s: float | None,
    ) -> Segment:
        """Change an ACTIVE segment and record it in the audit trail. Raises as ``SegmentCatalog.edit`` says."""
        with self._databases.catalog_tx(timeout_s=timeout_s) as connection:
            # The row lock makes compare and set one step: no other edit and no operation's decision comes in between.
            # It is taken before the commit order lock (in audit_trail.record), as in the ledger: no deadlock.
            segment = select_segment(connection, slug, for_update=True)
            if segment is None:
                raise segment_not_found(slug)
            if segment.state is SegmentState.DELETING:
                raise segment_deleting(slug)
            if expected_etag and expected_etag != segment.etag:
                raise etag_mismatch(slug, segment.etag)
            if not changes:
                return segment

            changed = update_text(connection, segment.id, changes, etag)
            audit_trail.record(
                connection,
                action="edited",
                segment_id=segment.id,
                slug=slug,
                operation_id=None,
                actor=actor,
                details={name.value: value for name, value in changes.items()},
            )
            return changed


def _has_labels(query: SegmentQuery) -> list[sa.ColumnElement[bool]]:
    return [_table.labels.contains(dict(query.labels))] if query.labels else []
