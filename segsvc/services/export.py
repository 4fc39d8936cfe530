"""Export of a segment's members in batches, ordered by shard and then by arrival of the user."""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass, replace
from typing import Protocol

from segsvc.domain.errors import shard_unavailable
from segsvc.domain.paging import decode_token, encode_token
from segsvc.domain.segment import Segment
from segsvc.domain.statistics import MemberPage
from segsvc.services.segments import SegmentService
from segsvc.services.statistics import require_same

BATCH_USERS_MAX = 10_000

BEFORE_FIRST_SLOT = -1


class MemberReader(Protocol):
    """The shards, as far as an export needs them."""

    @property
    def shard_count(self) -> int: ...

    def members(
        self, shard: int, segment_id: int, after_slot: int, limit: int, *, timeout_s: float | None
    ) -> MemberPage:
        """The next members of one shard by slot, with bounded memory. Raises SHARD_UNAVAILABLE, DEADLINE_EXCEEDED."""


@dataclass(frozen=True, slots=True)
class ExportCursor:
    """How far an export is.

    Attributes:
        shard_count: number of shards when it began.
        shard: the shard where it goes on; the number of shards: it is at its end.
        after_slot: the last slot of that shard that is done.
    """

    segment: Segment
    shard_count: int
    shard: int = 0
    after_slot: int = BEFORE_FIRST_SLOT


@dataclass(frozen=True, slots=True)
class ExportBatch:
    """At most BATCH_USERS_MAX members and the token that goes on after them."""

    user_ids: Sequence[int]
    resume_token: str


class ExportService:
    """Reads members in short transactions, one a batch: an export of hours holds no lock and no snapshot.

    A user who is a member from the beginning to the end is exported exactly once. A user who becomes a member during
    the export, or stops being one, may or may not be exported.
    """

    def __init__(self, segments: SegmentService, reader: MemberReader) -> None:
        self._segments = segments
        self._reader = reader

    def start(self, slug: str, resume_token: str = "", *, timeout_s: float | None = None) -> ExportCursor:
        """Where an export begins.

        Args:
            resume_token: of an earlier batch, of the same segment: go on after that batch. Empty: from the start.

        Raises:
            ServiceError: SEGMENT_NOT_FOUND, FIELD_REQUIRED, FIELD_INVALID, PAGE_TOKEN_INVALID (also for a token of
                an earlier segment with the same slug, or from before the shards doubled), CATALOG_UNAVAILABLE.
        """
        segment = self._segments.get(slug, timeout_s=timeout_s)
        if not resume_token:
            return ExportCursor(segment, self._reader.shard_count)
        shard, after_slot = decode_token(self._scope(segment), resume_token, "resume_token")
        return ExportCursor(segment, self._reader.shard_count, shard, after_slot)

    def next(self, cursor: ExportCursor, *, timeout_s: float | None = None) -> tuple[ExportBatch, ExportCursor] | None:
        """The next batch, never an empty one, and where to go on. None: there are no more members.

        Raises:
            ServiceError: SEGMENT_NOT_FOUND if the segment was deleted meanwhile, SHARD_UNAVAILABLE,
                CATALOG_UNAVAILABLE, DEADLINE_EXCEEDED. The same cursor may be tried again.
        """
        if cursor.shard_count != self._reader.shard_count:
            # The shards have doubled since. Its place says nothing of where its users are now; nor does a token.
            raise shard_unavailable(cursor.shard)

        while cursor.shard < self._reader.shard_count:
            page = self._reader.members(
                cursor.shard, cursor.segment.id, cursor.after_slot, BATCH_USERS_MAX, timeout_s=timeout_s
            )
            if not page.known:
                require_same(self._segments, cursor.segment, timeout_s)

            done = replace(cursor, after_slot=page.last_slot)
            cursor = replace(cursor, shard=cursor.shard + 1, after_slot=BEFORE_FIRST_SLOT) if page.exhausted else done
            if page.user_ids:
                token = encode_token(self._scope(done.segment), [done.shard, done.after_slot])
                return ExportBatch(page.user_ids, token), cursor
        return None

    def _scope(self, segment: Segment) -> str:
        """What a token is for: a place among so many shards is none among twice as many."""
        return f"export {segment.uid} of {self._reader.shard_count}"
