"""GetUserSegments as tutorials write it: grpcio's asyncio server and redis-py's asyncio client, one GET per call.

    python -m benchmarks.peers.tutorial ADDRESS CACHE_URL

The user's segments are a JSON list in the key ``tutorial:<id>``. It runs on uvloop and with hiredis, which is better
than most tutorials.
"""

from __future__ import annotations

import asyncio
import json
import signal
import sys

import grpc
import redis.asyncio
import uvloop
from segmentation.v1 import membership_pb2 as pb
from segmentation.v1 import membership_pb2_grpc


def key_of(user_id: int) -> str:
    return f"tutorial:{user_id}"


class Memberships(membership_pb2_grpc.MembershipServiceServicer):
    def __init__(self, cache: redis.asyncio.Redis) -> None:
        self._cache = cache

    async def GetUserSegments(  # noqa: N802
        self,
        request: pb.GetUserSegmentsRequest,
        context: grpc.aio.ServicerContext[pb.GetUserSegmentsRequest, pb.UserSegments],
    ) -> pb.UserSegments:
        found = await self._cache.get(key_of(request.user_id))
        if found is None:
            await context.abort(grpc.StatusCode.NOT_FOUND, "no such user")
        return pb.UserSegments(user_id=request.user_id, slugs=json.loads(found))


async def main() -> None:
    server = grpc.aio.server()
    cache = redis.asyncio.Redis.from_url(sys.argv[2])
    memberships = Memberships(cache)  # type: ignore[abstract]  # the other methods answer UNIMPLEMENTED
    membership_pb2_grpc.add_MembershipServiceServicer_to_server(memberships, server)
    server.add_insecure_port(sys.argv[1])
    await server.start()
    stop = asyncio.Event()
    asyncio.get_running_loop().add_signal_handler(signal.SIGTERM, stop.set)
    await stop.wait()
    await server.stop(1)
    await cache.aclose()


if __name__ == "__main__":
    uvloop.run(main())
