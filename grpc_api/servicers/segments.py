"""segmentation.v1.SegmentService."""

from __future__ import annotations

import json
from collections.abc import AsyncIterator
from itertools import islice
from typing import Final

from google.longrunning.operations_pb2 import Operation as OperationMessage
from segmentation.v1 import segments_pb2, segments_pb2_grpc

from grpc_api import call_scope, convert
from grpc_api.call_scope import BlockingCalls
from grpc_api.interceptors import Context
from grpc_api.places import Places
from grpc_api.servicers.views import OperationViews
from segsvc.domain.errors import required_field
from segsvc.domain.paging import page_size_of
from segsvc.domain.segment import check_slug, check_text
from segsvc.services.acceptance import Acceptance
from segsvc.services.creations import Creations
from segsvc.services.export import ExportService
from segsvc.services.operations import OperationService
from segsvc.services.preview import PreviewService
from segsvc.services.segments import SegmentService
from segsvc.services.statistics import StatisticsService

SIMILAR_KEY: Final = "segsvc-similar-attributes"
WARNINGS_KEY: Final = "segsvc-condition-warnings"
"""Trailing metadata of a preview: JSON, for each unknown attribute the names of similar attributes."""
SIMILAR_NAMES_MAX: Final = 20
"""Most unknown attributes in it: clients refuse more than 8 KiB of metadata."""


class SegmentServicer(segments_pb2_grpc.SegmentServiceServicer):
    """Create, read, edit, preview, roll out, delete, count and export segments.

    Args:
        reading: threads for reads.
        changes: threads for calls that change something.
        creating: threads of their own for CreateSegment, which waits for its turn among the operations.
        bulk: threads for calls that count all members.
        previews: threads for PreviewRollOut, whose time depends on its condition.
        exports: threads for ExportSegmentUsers, whose number of batches grows with the members.
        export_places: exports that may be open at once.
    """

    def __init__(
        self,
        *,
        segments: SegmentService,
        statistics: StatisticsService,
        preview: PreviewService,
        export: ExportService,
        acceptance: Acceptance,
        creations: Creations,
        operations: OperationService,
        reading: BlockingCalls,
        changes: BlockingCalls,
        creating: BlockingCalls,
        bulk: BlockingCalls,
        previews: BlockingCalls,
        exports: BlockingCalls,
        export_places: Places,
    ) -> None:
        self._segments = segments
        self._statistics = statistics
        self._preview = preview
        self._export = export
        self._acceptance = acceptance
        self._creations = creations
        self._views = OperationViews(operations, changes)
        self._reading = reading
        self._changes = changes
        self._bulk = bulk
        self._creating = creating
        self._previews = previews
        self._exports = exports
        self._export_places = export_places

    async def CreateSegment(self, request: segments_pb2.CreateSegmentRequest, context: Context) -> segments_pb2.Segment:
        if not request.HasField("segment"):
            raise required_field("segment")
        slug, text = check_slug(request.segment.slug, "segment.slug"), convert.text_of(request.segment)
        check_text(text)
        key = convert.request_key_of(call_scope.current().method, request)
        call = call_scope.current()
        segment = await self._creating.run(
            lambda _: self._creations.create_segment(
                slug, text, request=key, deadline_s=call.patience_s(), actor=call.actor
            )
        )
        return convert.segment_message(segment)

    async def GetSegment(self, request: segments_pb2.GetSegmentRequest, context: Context) -> segments_pb2.Segment:
        segment = await self._reading.run(lambda timeout_s: self._segments.get(request.slug, timeout_s=timeout_s))
        return convert.segment_message(segment)

    async def ListSegments(
        self, request: segments_pb2.ListSegmentsRequest, context: Context
    ) -> segments_pb2.ListSegmentsResponse:
        query, page_size = convert.query_of(request), page_size_of(request.page_size)
        page = await self._reading.run(
            lambda timeout_s: self._segments.list(
                query, page_size=page_size, page_token=request.page_token, timeout_s=timeout_s
            )
        )
        return segments_pb2.ListSegmentsResponse(
            segments=map(convert.segment_message, page.segments),
            next_page_token=page.next_page_token,
            total_size=page.total,
        )

    async def UpdateSegment(self, request: segments_pb2.UpdateSegmentRequest, context: Context) -> segments_pb2.Segment:
        if not request.HasField("segment"):
            raise required_field("segment")
        new = request.segment
        fields = convert.edited_fields_of(new, request.update_mask)
        etag = convert.etag_of(new.etag, "segment.etag")
        actor = call_scope.current().actor
        segment = await self._changes.run(
            lambda timeout_s: self._segments.edit(
                new.slug, convert.text_of(new), fields, etag=etag, actor=actor, timeout_s=timeout_s
            )
        )
        return convert.segment_message(segment)

    async def DeleteSegment(self, request: segments_pb2.DeleteSegmentRequest, context: Context) -> OperationMessage:
        slug, etag = check_slug(request.slug), convert.etag_of(request.etag, "etag")
        call = call_scope.current()
        key = convert.request_key_of(call.method, request)
        accepted = await self._changes.run(
            lambda _: self._acceptance.delete(slug, etag=etag, request=key, actor=call.actor)
        )
        patience_s = 0.0 if request.return_immediately else call_scope.current().patience_s()
        return convert.operation_message(await self._views.answer(accepted, patience_s))

    async def PreviewRollOut(
        self, request: segments_pb2.PreviewRollOutRequest, context: Context
    ) -> segments_pb2.PreviewRollOutResponse:
        slug, rule = check_slug(request.slug), convert.rule_of(request)
        preview = await self._previews.run(lambda timeout_s: self._preview.count(slug, rule, timeout_s=timeout_s))
        # For people at a terminal; the answer itself has the unknown names.
        notes = {
            SIMILAR_KEY: dict(islice(preview.unknown.items(), SIMILAR_NAMES_MAX)),
            WARNINGS_KEY: list(preview.warnings),
        }
        context.set_trailing_metadata(tuple((key, json.dumps(note)) for key, note in notes.items() if note))

        return convert.preview_message(preview.counts)

    async def RollOutSegment(self, request: segments_pb2.RollOutSegmentRequest, context: Context) -> OperationMessage:
        slug, rule = check_slug(request.slug), convert.rule_of(request)
        etag = convert.etag_of(request.etag, "etag")
        call = call_scope.current()
        key = convert.request_key_of(call.method, request)
        accepted = await self._changes.run(
            lambda timeout_s: self._acceptance.roll_out(
                slug,
                rule,
                etag=etag,
                request=key,
                replace_queued=request.replace_queued,
                actor=call.actor,
                timeout_s=timeout_s,
            )
        )
        patience_s = 0.0 if request.return_immediately else call_scope.current().patience_s()
        return convert.operation_message(await self._views.answer(accepted, patience_s))

    async def GetSegmentStatistics(
        self, request: segments_pb2.GetSegmentStatisticsRequest, context: Context
    ) -> segments_pb2.SegmentStatistics:
        statistics = await self._bulk.run(lambda timeout_s: self._statistics.get(request.slug, timeout_s=timeout_s))
        return convert.statistics_message(statistics)

    async def ExportSegmentUsers(
        self, request: segments_pb2.ExportSegmentUsersRequest, context: Context
    ) -> AsyncIterator[segments_pb2.ExportSegmentUsersResponse]:
        with self._export_places.taken(context.peer()):
            cursor = await self._exports.run(
                lambda timeout_s: self._export.start(request.slug, request.resume_token, timeout_s=timeout_s)
            )
            while True:
                # Read only after the client has taken the batch before (we are stopped while its window is full), so a
                # slow client costs one batch of memory.
                step = await self._exports.run(
                    lambda timeout_s, cursor=cursor: self._export.next(cursor, timeout_s=timeout_s)  # type: ignore[misc]
                )
                if step is None:
                    return
                batch, cursor = step
                yield segments_pb2.ExportSegmentUsersResponse(user_ids=batch.user_ids, resume_token=batch.resume_token)
