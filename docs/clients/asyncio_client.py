"""A client in Python with asyncio, as a gateway has it: python asyncio_client.py ADDRESS USER_ID [USER_ID …]

One channel for the whole process; many reads at once; a user's error is that user's alone.
"""

from __future__ import annotations

import asyncio
import os
import sys
from pathlib import Path

import grpc
from google.rpc import code_pb2
from segmentation.v1 import membership_pb2, membership_pb2_grpc

SERVICE_CONFIG = Path(__file__).with_name("service_config.json").read_text()
DEADLINE_S = 0.5
TOKEN = os.environ.get("SEGSVC_TOKEN")
# Each call carries the token, if the service asks for one.
METADATA = [("authorization", f"Bearer {TOKEN}")] if TOKEN else []


async def one(memberships: membership_pb2_grpc.MembershipServiceAsyncStub, user_id: int) -> list[str]:
    """The segments of a user who logs in."""
    request = membership_pb2.GetUserSegmentsRequest(user_id=user_id)
    answer = await memberships.GetUserSegments(request, timeout=DEADLINE_S, metadata=METADATA)
    return list(answer.slugs)


async def many(
    memberships: membership_pb2_grpc.MembershipServiceAsyncStub, user_ids: list[int]
) -> dict[int, list[str] | str]:
    """The segments of up to 1000 users in one call; for a user who has none to give, why."""
    request = membership_pb2.BatchGetUserSegmentsRequest(user_ids=user_ids)
    answer = await memberships.BatchGetUserSegments(request, timeout=DEADLINE_S, metadata=METADATA)
    found: dict[int, list[str] | str] = {}
    for user_id, result in zip(user_ids, answer.results, strict=True):
        if result.HasField("error"):
            found[user_id] = code_pb2.Code.Name(result.error.code)
        else:
            found[user_id] = list(result.user_segments.slugs)
    return found


async def main(address: str, user_ids: list[int]) -> None:
    options = [("grpc.service_config", SERVICE_CONFIG)]
    async with grpc.aio.insecure_channel(address, options) as channel:
        memberships = membership_pb2_grpc.MembershipServiceStub(channel)
        try:
            segments = await one(memberships, user_ids[0])
        except grpc.aio.AioRpcError as error:
            # A login must not fail for the sake of a segment: draw the page without them, and count it.
            print(f"user {user_ids[0]}: {error.code().name}: drawn without segments", file=sys.stderr)
            segments = []
        print(f"user {user_ids[0]}: {len(segments)} segments")

        for user_id, found in (await many(memberships, user_ids)).items():
            print(f"user {user_id}: {found if isinstance(found, str) else f'{len(found)} segments'}")


if __name__ == "__main__":
    asyncio.run(main(sys.argv[1], [int(user_id) for user_id in sys.argv[2:]]))
