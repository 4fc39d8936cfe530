"""GetUserSegments from one row per membership: a plain grpcio servicer with one statement on the user's shard per call.

    python -m benchmarks.peers.plain ADDRESS SHARD_DSN…

Each thread has its own psycopg2 connection to each shard. The statement is ``rows.USER_SEGMENTS``, one index scan.
"""

from __future__ import annotations

import signal
import sys
import threading
from concurrent.futures import ThreadPoolExecutor

import grpc
import psycopg2
from segmentation.v1 import membership_pb2 as pb
from segmentation.v1 import membership_pb2_grpc

from benchmarks.rows import USER_SEGMENTS

THREADS = 8


class Memberships(membership_pb2_grpc.MembershipServiceServicer):
    def __init__(self, dsns: list[str]) -> None:
        self._dsns = dsns
        self._own = threading.local()

    def GetUserSegments(self, request: pb.GetUserSegmentsRequest, context: grpc.ServicerContext) -> pb.UserSegments:  # noqa: N802
        shard = request.user_id % len(self._dsns)
        with self._connection(shard).cursor() as cursor:
            cursor.execute(USER_SEGMENTS, (request.user_id,))
            return pb.UserSegments(user_id=request.user_id, slugs=[slug for (slug,) in cursor.fetchall()])

    def _connection(self, shard: int) -> psycopg2.extensions.connection:
        connections: dict[int, psycopg2.extensions.connection] = self._own.__dict__.setdefault("connections", {})
        if shard not in connections:
            connections[shard] = psycopg2.connect(self._dsns[shard])
            connections[shard].autocommit = True
        return connections[shard]


def main() -> None:
    server = grpc.server(ThreadPoolExecutor(THREADS))
    dsns = [dsn.replace("postgresql+psycopg2://", "postgresql://") for dsn in sys.argv[2:]]
    memberships = Memberships(dsns)  # type: ignore[abstract]  # the other methods answer UNIMPLEMENTED
    membership_pb2_grpc.add_MembershipServiceServicer_to_server(memberships, server)
    server.add_insecure_port(sys.argv[1])
    server.start()
    stop = threading.Event()
    signal.signal(signal.SIGTERM, lambda *_: stop.set())
    stop.wait()
    server.stop(1).wait()


if __name__ == "__main__":
    main()
