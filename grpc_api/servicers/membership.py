"""segmentation.v1.MembershipService. The hot reads are the lane's: here they are only handed to it."""

from __future__ import annotations

import asyncio
from collections.abc import Callable
from concurrent.futures import Future

from segmentation.v1 import membership_pb2, membership_pb2_grpc

from grpc_api import call_scope, convert
from grpc_api.call_scope import BlockingCalls
from grpc_api.interceptors import Context
from segsvc.domain.errors import Reason, ServiceError, required_field
from segsvc.services.users import UserService

Submit = Callable[[str, bytes, str, float | None], Future[bytes]]
"""Hands a call to the hot lane: method, serialised request, request id, deadline (``time.monotonic()``; None: none).
The future gives the serialised answer or a ServiceError."""


class MembershipServicer(membership_pb2_grpc.MembershipServiceServicer):
    """Reads of users and their memberships.

    Args:
        submit: the lane's; None: the native front hands it its calls itself, and they never come here.
    """

    def __init__(self, users: UserService, blocking: BlockingCalls, submit: Submit | None) -> None:
        self._users = users
        self._blocking = blocking
        self._submit = submit

    async def GetUserSegments(
        self, request: membership_pb2.GetUserSegmentsRequest, context: Context
    ) -> membership_pb2.UserSegments:
        return membership_pb2.UserSegments.FromString(await self._ask_lane(request))

    async def BatchGetUserSegments(
        self, request: membership_pb2.BatchGetUserSegmentsRequest, context: Context
    ) -> membership_pb2.BatchGetUserSegmentsResponse:
        return membership_pb2.BatchGetUserSegmentsResponse.FromString(await self._ask_lane(request))

    async def GetUser(self, request: membership_pb2.GetUserRequest, context: Context) -> membership_pb2.User:
        if not request.user_id:
            raise required_field("user_id")
        user = await self._blocking.run(lambda timeout_s: self._users.get(request.user_id, timeout_s=timeout_s))
        return convert.user_message(user)

    async def CheckMembership(
        self, request: membership_pb2.CheckMembershipRequest, context: Context
    ) -> membership_pb2.CheckMembershipResponse:
        raise ServiceError(Reason.NOT_IMPLEMENTED, "memberships cannot be explained yet")

    async def ModifyUserOverrides(
        self, request: membership_pb2.ModifyUserOverridesRequest, context: Context
    ) -> membership_pb2.ModifyUserOverridesResponse:
        raise ServiceError(Reason.NOT_IMPLEMENTED, "overrides cannot be changed yet")

    async def ListUserOverrides(
        self, request: membership_pb2.ListUserOverridesRequest, context: Context
    ) -> membership_pb2.ListUserOverridesResponse:
        raise ServiceError(Reason.NOT_IMPLEMENTED, "overrides cannot be listed yet")

    async def _ask_lane(
        self, request: membership_pb2.GetUserSegmentsRequest | membership_pb2.BatchGetUserSegmentsRequest
    ) -> bytes:
        if self._submit is None:
            raise RuntimeError("a hot read has passed the native front")
        call = call_scope.current()
        answer = self._submit(call.method, request.SerializeToString(), call.request_id, call.deadline)
        return await asyncio.wrap_future(answer)
