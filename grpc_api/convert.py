"""Converts protobuf messages to values of the domain, and back. The only place that knows both.

``…_of`` reads a request and raises ServiceError FIELD_REQUIRED or FIELD_INVALID; ``…_message`` writes a response.
"""

from __future__ import annotations

import hashlib
import re
from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from datetime import datetime
from typing import TypeVar
from uuid import UUID

from google.longrunning.operations_pb2 import Operation as OperationMessage
from google.protobuf.field_mask_pb2 import FieldMask
from google.protobuf.message import Message
from google.protobuf.struct_pb2 import Struct
from google.protobuf.timestamp_pb2 import Timestamp
from segmentation.v1 import membership_pb2, operations_pb2, segments_pb2

from grpc_api.errors import status_of
from segsvc.domain.catalog import EditedField, SegmentQuery, parse_order
from segsvc.domain.errors import invalid_field, required_field
from segsvc.domain.operation import (
    Operation,
    OperationFilter,
    OperationKind,
    OperationResult,
    OperationState,
    RequestKey,
    ShardCounts,
    ShardProgress,
    unknown_attributes,
)
from segsvc.domain.segment import SLUG, SLUG_ALLOWED, Policy, Rule, Segment, SegmentText, make_rule
from segsvc.domain.statistics import SegmentStatistics
from segsvc.domain.user import AttributeValue, User

_UUID = re.compile(r"[0-9a-fA-F]{8}(-[0-9a-fA-F]{4}){3}-[0-9a-fA-F]{12}")
_ETAG = re.compile(r"[!-~]{0,128}")
_OPERATION_PREFIX = "operations/"
_FILTER_TERM = re.compile(r'\s*(slug|kind|state)\s*=\s*("[^"\s]*"|[^"\s=]+)\s*')
_FILTER_AND = re.compile(r"\s+AND\s+")

_Enum = TypeVar("_Enum", OperationKind, OperationState)


# -- requests -------------------------------------------------------------------------------------------------------


def text_of(segment: segments_pb2.Segment) -> SegmentText:
    """The text of a segment that people read; the service checks its limits."""
    return SegmentText(segment.display_name, segment.description, dict(segment.labels))


def etag_of(etag: str, field: str) -> str:
    """The etag that the caller gave; empty: none."""
    if not _ETAG.fullmatch(etag):
        raise invalid_field(field, "is not an etag that this service gives")
    return etag


def edited_fields_of(segment: segments_pb2.Segment, mask: FieldMask) -> frozenset[EditedField]:
    """The fields that an update changes: those in the mask; without a mask, all that are set; with ``*``, all."""
    names = {field.value: field for field in EditedField}
    if not mask.paths:
        set_fields = {descriptor.name for descriptor, _ in segment.ListFields()}
        return frozenset(field for name, field in names.items() if name in set_fields)
    if list(mask.paths) == ["*"]:
        return frozenset(EditedField)

    for path in mask.paths:
        if path in names:
            continue
        if path == "*":
            raise invalid_field("update_mask", "* is all that can be changed, and must stand alone")
        if path in segments_pb2.Segment.DESCRIPTOR.fields_by_name:
            raise invalid_field("update_mask", f"{path} cannot be changed by an update, only {', '.join(names)}")
        raise invalid_field("update_mask", f"there is no field {path[:80]!r} to change, only {', '.join(names)} or *")

    return frozenset(names[path] for path in mask.paths)


def query_of(request: segments_pb2.ListSegmentsRequest) -> SegmentQuery:
    order, descending = parse_order(request.order_by)
    return SegmentQuery(order, descending, dict(request.labels))


def rule_of(request: segments_pb2.RollOutSegmentRequest | segments_pb2.PreviewRollOutRequest) -> Rule:
    """The rule of a request, exact in decimal."""
    if not request.HasField("rule"):
        raise required_field("rule")
    rule = request.rule
    if rule.policy not in segments_pb2.RollOutRule.Policy.values():
        raise invalid_field("rule.policy", f"must be LIVE or FROZEN, is {rule.policy}")
    percent = rule.percent if rule.HasField("percent") else None
    return make_rule(percent, rule.condition, Policy(rule.policy or Policy.LIVE))


def request_key_of(
    method: str,
    request: segments_pb2.CreateSegmentRequest
    | segments_pb2.RollOutSegmentRequest
    | segments_pb2.DeleteSegmentRequest
    | membership_pb2.ModifyUserOverridesRequest,
) -> RequestKey | None:
    """The key by which a repeated request is recognised; None: the caller gave no request_id.

    ``return_immediately`` is not part of the content: a caller that did not wait for the operation may repeat the call
    and wait for it.
    """
    if not request.request_id:
        return None
    if not _UUID.fullmatch(request.request_id):
        raise invalid_field("request_id", f"must be a UUID, is {request.request_id[:80]!r}")

    content = type(request)()
    content.CopyFrom(request)  # type: ignore[arg-type]  # the same type, whichever it is
    content.ClearField("request_id")
    if isinstance(content, segments_pb2.RollOutSegmentRequest | segments_pb2.DeleteSegmentRequest):
        content.ClearField("return_immediately")
    digest = hashlib.sha256(content.SerializeToString(deterministic=True)).digest()
    return RequestKey(method, UUID(request.request_id), digest)


def operation_id_of(name: str) -> UUID:
    """The id in ``operations/{uuid}``."""
    if not name:
        raise required_field("name")
    if not name.startswith(_OPERATION_PREFIX) or not _UUID.fullmatch(name[len(_OPERATION_PREFIX) :]):
        raise invalid_field("name", f"must be {_OPERATION_PREFIX}{{uuid}}, is {name[:80]!r}")
    return UUID(name[len(_OPERATION_PREFIX) :])


def filter_of(text: str) -> OperationFilter:
    """A filter of operations: slug, kind or state = value, joined by AND; each at most once."""
    if not text.strip():
        return OperationFilter()
    terms: dict[str, str] = {}
    for part in _FILTER_AND.split(text.strip()):
        match = _FILTER_TERM.fullmatch(part)
        if match is None:
            raise invalid_field("filter", f"must be slug, kind or state = value, joined by AND; not {part[:80]!r}")
        if match[1] in terms:
            raise invalid_field("filter", f"{match[1]} comes twice")
        terms[match[1]] = match[2].strip('"')

    slug = terms.get("slug")
    if slug is not None and not SLUG.fullmatch(slug):
        raise invalid_field("filter", f"slug {SLUG_ALLOWED}, is {slug[:80]!r}")
    return OperationFilter(
        slug, _filter_enum(OperationKind, "kind", terms), _filter_enum(OperationState, "state", terms)
    )


def _filter_enum(values: type[_Enum], name: str, terms: Mapping[str, str]) -> _Enum | None:
    if name not in terms:
        return None
    if terms[name] not in values.__members__:
        raise invalid_field("filter", f"{name} must be {', '.join(values.__members__)}, is {terms[name][:80]!r}")
    return values[terms[name]]


# -- responses ------------------------------------------------------------------------------------------------------


def time_message(time: datetime) -> Timestamp:
    message = Timestamp()
    message.FromDatetime(time)
    return message


def rule_message(rule: Rule) -> segments_pb2.RollOutRule:
    return segments_pb2.RollOutRule(
        percent=rule.percent,
        condition=rule.condition,
        policy=segments_pb2.RollOutRule.Policy.ValueType(rule.policy),
    )


def segment_message(segment: Segment) -> segments_pb2.Segment:
    return segments_pb2.Segment(
        slug=segment.slug,
        display_name=segment.display_name,
        description=segment.description,
        labels=segment.labels,
        rule=rule_message(segment.rule) if segment.rule is not None else None,
        state=segments_pb2.Segment.State.ValueType(segment.state),
        uid=str(segment.uid),
        create_time=time_message(segment.create_time),
        update_time=time_message(segment.update_time),
        etag=segment.etag,
        member_count=segment.member_count,
        member_count_time=_optional_time(segment.member_count_time),
    )


def statistics_message(statistics: SegmentStatistics) -> segments_pb2.SegmentStatistics:
    last = statistics.segment.last_operation
    return segments_pb2.SegmentStatistics(
        segment=segment_message(statistics.segment),
        member_count=statistics.member_count,
        rule_count=statistics.rule_count,
        included_count=statistics.included_count,
        excluded_count=statistics.excluded_count,
        user_count=statistics.user_count,
        member_share=statistics.member_share,
        shards=[
            segments_pb2.ShardCounts(shard=shard.shard, member_count=shard.member_count) for shard in statistics.shards
        ],
        read_time=time_message(statistics.read_time),
        last_operation=f"{_OPERATION_PREFIX}{last}" if last is not None else "",
    )


def preview_message(shards: Sequence[ShardCounts]) -> segments_pb2.PreviewRollOutResponse:
    return segments_pb2.PreviewRollOutResponse(
        matched_count=sum(shard.matched for shard in shards),
        added_count=sum(shard.added for shard in shards),
        removed_count=sum(shard.removed for shard in shards),
        member_count=sum(shard.members for shard in shards),
        shards=[_counts_message(shard) for shard in shards],
        unknown_attributes=unknown_attributes(shards),
    )


def user_message(user: User) -> membership_pb2.User:
    """A user. Struct has only doubles: integers beyond 2^53 are rounded, as the interface says."""
    attributes = Struct()
    attributes.update({name: _struct_value(value) for name, value in user.attributes.items()})
    return membership_pb2.User(
        user_id=user.id,
        attributes=attributes,
        version=user.version,
        create_time=time_message(user.create_time),
        update_time=time_message(user.update_time),
        shard=user.shard,
    )


def _struct_value(value: AttributeValue) -> str | bool | float | list[str]:
    if isinstance(value, str | bool):
        return value
    return float(value) if isinstance(value, int | float) else list(value)


@dataclass(frozen=True, slots=True)
class OperationView:
    """All that a caller sees of an operation.

    Attributes:
        shards: how far each shard is.
        result: of one that is DONE; None otherwise.
    """

    operation: Operation
    shards: Sequence[ShardProgress]
    result: OperationResult | None


def metadata_message(operation: Operation, shards: Sequence[ShardProgress]) -> operations_pb2.OperationMetadata:
    return operations_pb2.OperationMetadata(
        kind=operations_pb2.OperationMetadata.Kind.ValueType(operation.plan.kind),
        slug=operation.plan.slug,
        state=operations_pb2.OperationMetadata.State.ValueType(operation.state),
        shards=[
            operations_pb2.ShardProgress(
                shard=shard.shard,
                state=operations_pb2.ShardProgress.State.ValueType(shard.state),
                blocks_done=shard.blocks_done,
                blocks_total=shard.blocks_total,
                added_count=shard.added,
                removed_count=shard.removed,
            )
            for shard in shards
        ],
        create_time=time_message(operation.create_time),
        start_time=_optional_time(operation.start_time),
        commit_time=_optional_time(operation.commit_time),
        end_time=_optional_time(operation.end_time),
        actor=operation.plan.actor,
    )


def operation_message(view: OperationView) -> OperationMessage:
    """An operation: its error if it was aborted, its response if it is DONE, neither while it runs."""
    operation = view.operation
    message = OperationMessage(name=operation.name, done=operation.state.final)
    message.metadata.Pack(metadata_message(operation, view.shards))
    if operation.failure is not None:
        message.error.CopyFrom(status_of(operation.failure.to_error()))
    elif view.result is not None:
        message.response.Pack(_response_message(operation.plan.kind, view.result))
    return message


def _response_message(kind: OperationKind, result: OperationResult) -> Message:
    removed = sum(counts.removed for counts in result.counts)
    if kind is OperationKind.DELETE:
        return segments_pb2.DeleteSegmentResponse(removed_count=removed)

    if result.segment is None:
        raise RuntimeError("only a deletion ends without a segment")
    if kind is OperationKind.CREATE:
        return segment_message(result.segment)

    return segments_pb2.RollOutSegmentResponse(
        segment=segment_message(result.segment),
        matched_count=sum(counts.matched for counts in result.counts),
        added_count=sum(counts.added for counts in result.counts),
        removed_count=removed,
        member_count=sum(counts.members for counts in result.counts),
        shards=[_counts_message(counts) for counts in result.counts],
        unknown_attributes=unknown_attributes(result.counts),
    )


def _counts_message(counts: ShardCounts) -> segments_pb2.ShardCounts:
    return segments_pb2.ShardCounts(
        shard=counts.shard,
        matched_count=counts.matched,
        added_count=counts.added,
        removed_count=counts.removed,
        member_count=counts.members,
    )


def _optional_time(time: datetime | None) -> Timestamp | None:
    return None if time is None else time_message(time)
