"""Converts messages of overrides and explanations to values of the domain, and back."""

from __future__ import annotations

from datetime import UTC, datetime

from google.protobuf.timestamp_pb2 import Timestamp
from segmentation.v1 import membership_pb2

from grpc_api.convert import rule_message, time_message
from segsvc.domain.errors import invalid_field, required_field
from segsvc.domain.override import Effect, Override, OverrideChanges, UserOverrides, WantedOverride
from segsvc.services.explain import Explanation


def changes_of(request: membership_pb2.ModifyUserOverridesRequest, actor: str) -> OverrideChanges:
    """The changes that a principal's request asks for. Raises ServiceError FIELD_REQUIRED, FIELD_INVALID."""
    return OverrideChanges(
        [_wanted(message, f"set[{n}]") for n, message in enumerate(request.set)], list(request.clear), actor
    )


def _wanted(message: membership_pb2.Override, name: str) -> WantedOverride:
    if message.effect == membership_pb2.Override.EFFECT_UNSPECIFIED:
        raise required_field(f"{name}.effect")
    if message.effect not in (membership_pb2.Override.INCLUDE, membership_pb2.Override.EXCLUDE):
        raise invalid_field(f"{name}.effect", f"must be INCLUDE or EXCLUDE, is {message.effect}")
    expires = _time(message.expire_time, f"{name}.expire_time") if message.HasField("expire_time") else None
    return WantedOverride(message.slug, Effect(message.effect), expires)


def _time(message: Timestamp, name: str) -> datetime:
    """A time to the microsecond. Raises ServiceError FIELD_INVALID outside the years 1 to 9999."""
    try:
        return message.ToDatetime(tzinfo=UTC)
    except (ValueError, OverflowError):
        raise invalid_field(name, "must be a time of the years 1 to 9999") from None


def override_message(override: Override) -> membership_pb2.Override:
    return membership_pb2.Override(
        slug=override.slug,
        effect=membership_pb2.Override.Effect.ValueType(override.effect),
        expire_time=None if override.expire_time is None else time_message(override.expire_time),
        create_time=time_message(override.create_time),
        creator=override.creator,
    )


def modified_message(user_id: int, changed: UserOverrides) -> membership_pb2.ModifyUserOverridesResponse:
    read_time = Timestamp()
    read_time.FromMicroseconds(changed.read_time_us)
    return membership_pb2.ModifyUserOverridesResponse(
        user_segments=membership_pb2.UserSegments(user_id=user_id, slugs=changed.slugs, read_time=read_time),
        overrides=[override_message(override) for override in changed.overrides],
    )


def explanation_message(explanation: Explanation) -> membership_pb2.CheckMembershipResponse:
    return membership_pb2.CheckMembershipResponse(
        member=explanation.member,
        reason=membership_pb2.CheckMembershipResponse.Reason.ValueType(explanation.decision),
        bucket=explanation.bucket,
        rule=None if explanation.rule is None else rule_message(explanation.rule),
        override=None if explanation.override is None else override_message(explanation.override),
        explanation=explanation.text,
    )
