"""A client as the gateway and administrators use it: only the generated stubs, nothing internal."""

from __future__ import annotations

from collections.abc import Iterator, Sequence
from typing import Self

import grpc
from google.longrunning import operations_pb2
from google.protobuf.any_pb2 import Any as AnyMessage
from segmentation.v1 import membership_pb2, membership_pb2_grpc, operations_pb2_grpc, segments_pb2, segments_pb2_grpc
from segmentation.v1 import operations_pb2 as progress_pb2

from grpc_api.token_sender import with_token
from segsvc.access.own_token import own_token
from segsvc.config import Settings

_BATCH = 1000
_TIMEOUT_S = 60.0


class OperationFailed(Exception):
    """An operation ended with an error, or not in time."""


class Client:
    """A client of one front.

    Args:
        token: sent with each call; empty: none.

    Attributes:
        calls: its channel, for stubs of other services.
    """

    def __init__(self, address: str, token: str = "") -> None:
        # The environment's proxy is for the outside world, not for the front.
        options = [("grpc.max_receive_message_length", 64 << 20), ("grpc.enable_http_proxy", 0)]
        self._channel = grpc.insecure_channel(address, options=options)
        self.calls = with_token(self._channel, token)
        self.segments = segments_pb2_grpc.SegmentServiceStub(self.calls)
        self.memberships = membership_pb2_grpc.MembershipServiceStub(self.calls)
        self.operations = operations_pb2_grpc.OperationServiceStub(self.calls)

    @classmethod
    def of(cls, settings: Settings) -> Self:
        """A client of this installation's front, with the token of these settings. Raises TokenError."""
        return cls(settings.grpc_address, own_token(settings, lambda _: None))

    def close(self) -> None:
        self._channel.close()

    def wait_ready(self, timeout_s: float) -> None:
        """Raises grpc.FutureTimeoutError if the front cannot be reached in time."""
        grpc.channel_ready_future(self._channel).result(timeout=timeout_s)

    def create(self, slug: str, display_name: str) -> segments_pb2.Segment:
        request = segments_pb2.CreateSegmentRequest(segment=segments_pb2.Segment(slug=slug, display_name=display_name))
        return self.segments.CreateSegment(request, timeout=_TIMEOUT_S)

    def preview(self, slug: str, percent: float, condition: str) -> segments_pb2.PreviewRollOutResponse:
        rule = segments_pb2.RollOutRule(percent=percent, condition=condition)
        request = segments_pb2.PreviewRollOutRequest(slug=slug, rule=rule)
        return self.segments.PreviewRollOut(request, timeout=_TIMEOUT_S)

    def roll_out(self, slug: str, percent: float, condition: str = "") -> segments_pb2.RollOutSegmentResponse:
        """Roll out and wait until it ends. Raises OperationFailed."""
        rule = segments_pb2.RollOutRule(percent=percent, condition=condition)
        request = segments_pb2.RollOutSegmentRequest(slug=slug, rule=rule)
        response = segments_pb2.RollOutSegmentResponse()
        _unpack(self.segments.RollOutSegment(request, timeout=_TIMEOUT_S), response)
        return response

    def start_roll_out(self, slug: str, percent: float) -> str:
        """Start a rollout without waiting. Returns the operation's name."""
        request = segments_pb2.RollOutSegmentRequest(
            slug=slug, rule=segments_pb2.RollOutRule(percent=percent), return_immediately=True
        )
        return self.segments.RollOutSegment(request, timeout=_TIMEOUT_S).name

    def watch(self, name: str, timeout_s: float = _TIMEOUT_S) -> Iterator[progress_pb2.OperationMetadata]:
        for message in self.operations.WatchOperation(progress_pb2.WatchOperationRequest(name=name), timeout=timeout_s):
            yield message.metadata

    def delete(self, slug: str) -> segments_pb2.DeleteSegmentResponse:
        """Delete and wait until it ends. Raises OperationFailed."""
        response = segments_pb2.DeleteSegmentResponse()
        request = segments_pb2.DeleteSegmentRequest(slug=slug)
        _unpack(self.segments.DeleteSegment(request, timeout=_TIMEOUT_S), response)
        return response

    def export(self, slug: str) -> Iterator[int]:
        """Yields the ids of all members."""
        for message in self.segments.ExportSegmentUsers(segments_pb2.ExportSegmentUsersRequest(slug=slug), timeout=600):
            yield from message.user_ids

    def statistics(self, slug: str) -> segments_pb2.SegmentStatistics:
        return self.segments.GetSegmentStatistics(
            segments_pb2.GetSegmentStatisticsRequest(slug=slug), timeout=_TIMEOUT_S
        )

    def list_slugs(self) -> list[str]:
        """Slugs of all segments, read page by page."""
        slugs: list[str] = []
        token = ""
        while True:
            page = self.segments.ListSegments(
                segments_pb2.ListSegmentsRequest(page_size=100, page_token=token), timeout=_TIMEOUT_S
            )
            slugs += [segment.slug for segment in page.segments]
            token = page.next_page_token
            if not token:
                return slugs

    def user_segments(self, user_id: int) -> list[str]:
        request = membership_pb2.GetUserSegmentsRequest(user_id=user_id)
        return list(self.memberships.GetUserSegments(request, timeout=_TIMEOUT_S).slugs)

    def check(self, user_id: int, slug: str) -> membership_pb2.CheckMembershipResponse:
        request = membership_pb2.CheckMembershipRequest(user_id=user_id, slug=slug)
        return self.memberships.CheckMembership(request, timeout=_TIMEOUT_S)

    def override(
        self,
        user_id: int,
        slug: str,
        effect: membership_pb2.Override.Effect.ValueType,
        expire_time: float | None = None,
    ) -> None:
        """Include or exclude a user. ``expire_time``: Unix time in seconds; None: never expires."""
        override = membership_pb2.Override(slug=slug, effect=effect)
        if expire_time is not None:
            override.expire_time.FromNanoseconds(int(expire_time * 1e9))
        request = membership_pb2.ModifyUserOverridesRequest(user_id=user_id, set=[override])
        self.memberships.ModifyUserOverrides(request, timeout=_TIMEOUT_S)

    def clear_override(self, user_id: int, slug: str) -> None:
        request = membership_pb2.ModifyUserOverridesRequest(user_id=user_id, clear=[slug])
        self.memberships.ModifyUserOverrides(request, timeout=_TIMEOUT_S)

    def many_user_segments(self, user_ids: Sequence[int]) -> Iterator[tuple[int, list[str] | None]]:
        """Yields (user id, slugs) for each user, in the given order. Slugs are None if there is no such user.

        Raises:
            grpc.RpcError: a call failed as a whole.
            OperationFailed: a user's read failed with an error other than NOT_FOUND.
        """
        for first in range(0, len(user_ids), _BATCH):
            part = user_ids[first : first + _BATCH]
            request = membership_pb2.BatchGetUserSegmentsRequest(user_ids=part)
            response = self.memberships.BatchGetUserSegments(request, timeout=_TIMEOUT_S)
            for user_id, result in zip(part, response.results, strict=True):
                if result.WhichOneof("outcome") == "user_segments":
                    yield user_id, list(result.user_segments.slugs)
                elif result.error.code == grpc.StatusCode.NOT_FOUND.value[0]:
                    yield user_id, None
                else:
                    raise OperationFailed(f"user {user_id}: {result.error.message}")


def _unpack(
    operation: operations_pb2.Operation,
    response: segments_pb2.RollOutSegmentResponse | segments_pb2.DeleteSegmentResponse,
) -> None:
    if not operation.done:
        raise OperationFailed(f"{operation.name} has not ended in time")
    if operation.HasField("error"):
        raise OperationFailed(operation.error.message)
    packed: AnyMessage = operation.response
    if not packed.Unpack(response):
        raise OperationFailed(f"{operation.name}: unexpected response {packed.type_url}")
