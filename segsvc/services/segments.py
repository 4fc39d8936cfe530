"""Segments as people see them: get, list, edit. ``services.acceptance`` and ``services.creations`` are for changes that
decide memberships."""

from __future__ import annotations

import json
from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from datetime import datetime
from typing import Protocol

from segsvc.domain.access import NOBODY
from segsvc.domain.catalog import EditedField, SegmentOrder, SegmentPosition, SegmentQuery
from segsvc.domain.errors import segment_not_found
from segsvc.domain.paging import decode_token, encode_token
from segsvc.domain.segment import Segment, SegmentText, check_labels, check_slug, check_text, new_etag
from segsvc.log import get_logger

log = get_logger(__name__)

PAGE_BYTES_MAX = 2 << 20
"""A page is cut when its texts are larger than this: a thousand segments with long descriptions would be 20 MB, and
clients refuse messages over 4 MiB by default."""


@dataclass(frozen=True, slots=True)
class SegmentPage:
    """One page of a list.

    Attributes:
        total: segments that the query matches, on all pages.
        next_page_token: empty: this was the last page.
    """

    segments: Sequence[Segment]
    total: int
    next_page_token: str


class SegmentCatalog(Protocol):
    """The catalog, as far as people's view of segments needs it. No method shows reserved slugs.

    Every method is one transaction and raises CATALOG_UNAVAILABLE in an outage; ``timeout_s`` bounds each of its
    statements (None: the session's bound).
    """

    def get(self, slug: str, *, timeout_s: float | None) -> Segment | None: ...

    def page(
        self, query: SegmentQuery, after: SegmentPosition | None, limit: int, *, timeout_s: float | None
    ) -> tuple[Sequence[Segment], int]:
        """At most ``limit`` segments after a position (None: from the start), and how many the query matches in all."""

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
        """Change an ACTIVE segment and record it in the audit trail, in one transaction.

        Args:
            changes: new values; empty: nothing is written, but the etag is compared.
            expected_etag: the etag that the caller has seen; empty: any etag will do.
            etag: the new etag.
            actor: name of the principal that asks for it; empty: nobody has a name.

        Raises:
            ServiceError: SEGMENT_NOT_FOUND, SEGMENT_DELETING, ETAG_MISMATCH.
        """


class SegmentService:
    def __init__(self, catalog: SegmentCatalog) -> None:
        self._catalog = catalog

    def get(self, slug: str, *, timeout_s: float | None = None) -> Segment:
        """Raises ServiceError SEGMENT_NOT_FOUND, FIELD_REQUIRED, FIELD_INVALID, CATALOG_UNAVAILABLE."""
        segment = self._catalog.get(check_slug(slug), timeout_s=timeout_s)
        if segment is None:
            raise segment_not_found(slug)
        return segment

    def list(
        self, query: SegmentQuery, *, page_size: int, page_token: str = "", timeout_s: float | None = None
    ) -> SegmentPage:
        """One page of the existing segments.

        Args:
            page_size: the most segments on the page, at least 1; the page may be shorter even if more pages follow.
            page_token: ``next_page_token`` of the page before, with the same query; empty: the first page.

        Raises:
            ServiceError: FIELD_INVALID (labels), PAGE_TOKEN_INVALID, CATALOG_UNAVAILABLE.
        """
        check_labels(query.labels, "labels")
        after = _position(page_token, query) if page_token else None

        # One more than the page holds shows whether another page follows.
        segments, total = self._catalog.page(query, after, page_size + 1, timeout_s=timeout_s)

        shown = _cut(segments[:page_size])
        token = _token(query, shown[-1]) if len(shown) < len(segments) else ""
        return SegmentPage(shown, total, token)

    def edit(
        self,
        slug: str,
        text: SegmentText,
        fields: frozenset[EditedField],
        *,
        etag: str = "",
        actor: str = "",
        timeout_s: float | None = None,
    ) -> Segment:
        """Change a segment's texts for people: no shard is visited, no membership changes.

        Args:
            text: the new values of ``fields``; other values in it are ignored.
            fields: what to change; empty: nothing, but the etag is compared.
            etag: the etag that the caller has seen; empty: the change overwrites any change made in between.
            actor: name of the principal that asks for it; empty: nobody has a name.

        Raises:
            ServiceError: SEGMENT_NOT_FOUND, SEGMENT_DELETING, ETAG_MISMATCH, FIELD_REQUIRED, FIELD_INVALID,
                CATALOG_UNAVAILABLE (whether it took effect is then unknown; it may be repeated without an etag).
        """
        check_slug(slug, "segment.slug")

        values: dict[EditedField, str | Mapping[str, str]] = {
            EditedField.DISPLAY_NAME: text.display_name,
            EditedField.DESCRIPTION: text.description,
            EditedField.LABELS: dict(text.labels),
        }
        changes = {name: values[name] for name in EditedField if name in fields}
        check_text(
            SegmentText(
                text.display_name if EditedField.DISPLAY_NAME in fields else "",
                text.description if EditedField.DESCRIPTION in fields else "",
                text.labels if EditedField.LABELS in fields else {},
            )
        )
        edited = self._catalog.edit(
            slug, changes, expected_etag=etag, etag=new_etag(), actor=actor, timeout_s=timeout_s
        )
        if changes:
            log.info("segment_edited", slug=slug, fields=[name.value for name in changes], actor=actor or NOBODY)
        return edited


def _key(segment: Segment, order: SegmentOrder) -> str | int | datetime:
    if order is SegmentOrder.SLUG:
        return segment.slug
    return segment.create_time if order is SegmentOrder.CREATE_TIME else segment.member_count


def _scope(query: SegmentQuery) -> str:
    """What must not change from page to page; the size of the page may."""
    return json.dumps(["segments", query.order.value, query.descending, sorted(query.labels.items())])


def _token(query: SegmentQuery, last: Segment) -> str:
    key = _key(last, query.order)
    return encode_token(_scope(query), [key.isoformat() if isinstance(key, datetime) else key, last.id])


def _position(page_token: str, query: SegmentQuery) -> SegmentPosition:
    key, segment_id = decode_token(_scope(query), page_token, "page_token")
    return SegmentPosition(datetime.fromisoformat(key) if query.order is SegmentOrder.CREATE_TIME else key, segment_id)


def _cut(segments: Sequence[Segment]) -> Sequence[Segment]:
    """The first segments, as many as fit in PAGE_BYTES_MAX, but at least one."""
    size = 0
    for count, segment in enumerate(segments):
        texts = [segment.display_name, segment.description, *segment.labels.keys(), *segment.labels.values()]
        if segment.rule is not None:
            texts.append(segment.rule.condition)
        size += sum(len(text.encode()) for text in texts)
        if size > PAGE_BYTES_MAX and count > 0:
            return segments[:count]
    return segments
