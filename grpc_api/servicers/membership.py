"""segmentation.v1.MembershipService. The hot lane serves the hot reads: here they are only passed to it."""

from __future__ import annotations

import asyncio
from collections.abc import Callable
from concurrent.futures import Future

from segmentation.v1 import membership_pb2, membership_pb2_grpc

from grpc_api import call_scope, convert, convert_overrides
from grpc_api.call_scope import BlockingCalls
from grpc_api.interceptors import Context
from segsvc.domain.errors import required_field
from segsvc.domain.paging import page_size_of
from segsvc.services.explain import ExplainService
from segsvc.services.overrides import OverrideService
from segsvc.services.users import UserService

Submit = Callable[[str, bytes, str, float | None], Future[bytes]]
"""Passes a call to the hot lane: method, serialised request, request id, deadline (``time.monotonic()``; None: none).
The future gives the serialised answer or a ServiceError."""


class MembershipServicer(membership_pb2_grpc.MembershipServiceServicer):
    """Reads of users and their memberships, and changes of one user by hand.

    Args:
        submit: of the lane; None: the native front passes these calls to the lane itself, and they never come here.
    """

    def __init__(
        self,
        *,
        users: UserService,
        overrides: OverrideService,
        explain: ExplainService,
        reading: BlockingCalls,
        changes: BlockingCalls,
        submit: Submit | None,
    ) -> None:
        self._users = users
        self._overrides = overrides
        self._explain = explain
        self._reading = reading
        self._changes = changes
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
        user = await self._reading.run(lambda timeout_s: self._users.get(request.user_id, timeout_s=timeout_s))
        return convert.user_message(user)

    async def CheckMembership(
        self, request: membership_pb2.CheckMembershipRequest, context: Context
    ) -> membership_pb2.CheckMembershipResponse:
        if not request.user_id:
            raise required_field("user_id")
        explanation = await self._reading.run(
            lambda timeout_s: self._explain.explain(request.user_id, request.slug, timeout_s=timeout_s)
        )
        return convert_overrides.explanation_message(explanation)

    async def ModifyUserOverrides(
        self, request: membership_pb2.ModifyUserOverridesRequest, context: Context
    ) -> membership_pb2.ModifyUserOverridesResponse:
        if not request.user_id:
            raise required_field("user_id")
        changes = convert_overrides.changes_of(request, call_scope.current().actor)
        key = convert.request_key_of(call_scope.current().method, request)
        changed = await self._changes.run(
            lambda timeout_s: self._overrides.modify(request.user_id, changes, key, timeout_s=timeout_s)
        )
        return convert_overrides.modified_message(request.user_id, changed)

    async def ListUserOverrides(
        self, request: membership_pb2.ListUserOverridesRequest, context: Context
    ) -> membership_pb2.ListUserOverridesResponse:
        if not request.user_id:
            raise required_field("user_id")
        size = page_size_of(request.page_size)
        page = await self._reading.run(
            lambda timeout_s: self._overrides.list(
                request.user_id, page_size=size, page_token=request.page_token, timeout_s=timeout_s
            )
        )
        return membership_pb2.ListUserOverridesResponse(
            overrides=map(convert_overrides.override_message, page.overrides), next_page_token=page.next_page_token
        )

    async def _ask_lane(
        self, request: membership_pb2.GetUserSegmentsRequest | membership_pb2.BatchGetUserSegmentsRequest
    ) -> bytes:
        if self._submit is None:
            raise RuntimeError("a hot read has passed the native front")
        call = call_scope.current()
        answer = self._submit(call.method, request.SerializeToString(), call.request_id, call.deadline)
        try:
            return await asyncio.wrap_future(answer)
        finally:
            # The future's error holds this frame: this cycle would hold the request until the next full collection.
            del answer
