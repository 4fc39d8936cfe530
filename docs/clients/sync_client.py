"""A client in Python: python sync_client.py ADDRESS USER_ID

Needs grpcio, grpcio-status and the stubs of protos/ (docs/clients.md says how to make them).
"""

from __future__ import annotations

import os
import sys
import uuid
from pathlib import Path

import grpc
from google.rpc import error_details_pb2
from grpc_status import rpc_status
from segmentation.v1 import membership_pb2, membership_pb2_grpc, segments_pb2, segments_pb2_grpc

SERVICE_CONFIG = Path(__file__).with_name("service_config.json").read_text()
TOKEN = os.environ.get("SEGSVC_TOKEN")
# Each call carries the token, if the service asks for one.
METADATA = [("authorization", f"Bearer {TOKEN}")] if TOKEN else []


def reason_of(error: grpc.RpcError) -> str:
    """The service's stable reason; '' if the error does not come from the service (a lost connection, say)."""
    status = rpc_status.from_call(error)
    for detail in status.details if status else ():
        info = error_details_pb2.ErrorInfo()
        if detail.Unpack(info) and info.domain == "segsvc":
            return info.reason
    return ""


def segments_of(memberships: membership_pb2_grpc.MembershipServiceStub, user_id: int) -> list[str]:
    """The user's segments; none for a user whom the service does not know (yet)."""
    request = membership_pb2.GetUserSegmentsRequest(user_id=user_id)
    try:
        # The deadline is what a login may wait.
        return list(memberships.GetUserSegments(request, timeout=0.5, metadata=METADATA).slugs)
    except grpc.RpcError as error:
        if reason_of(error) == "USER_NOT_FOUND":
            return []
        raise


def main(address: str, user_id: int) -> None:
    options = [("grpc.service_config", SERVICE_CONFIG)]
    with grpc.insecure_channel(address, options) as channel:
        memberships = membership_pb2_grpc.MembershipServiceStub(channel)
        segments = segments_pb2_grpc.SegmentServiceStub(channel)

        # One request_id for one change: repeated with it, a call changes nothing twice.
        slug = f"sync-client-{uuid.uuid4().hex[:8]}"
        create = segments_pb2.CreateSegmentRequest(
            segment=segments_pb2.Segment(slug=slug, display_name="Made by a client"), request_id=str(uuid.uuid4())
        )
        segments.CreateSegment(create, timeout=60, metadata=METADATA)

        # The call waits for the end. An operation that failed is an answer with an error, not an RPC error.
        rollout = segments_pb2.RollOutSegmentRequest(
            slug=slug, rule=segments_pb2.RollOutRule(percent=100), request_id=str(uuid.uuid4())
        )
        operation = segments.RollOutSegment(rollout, timeout=60, metadata=METADATA)
        print(f"{operation.name}: done={operation.done} error={operation.error.message!r}")

        print(f"user {user_id} is in {slug}: {slug in segments_of(memberships, user_id)}")
        delete = segments_pb2.DeleteSegmentRequest(slug=slug, request_id=str(uuid.uuid4()))
        segments.DeleteSegment(delete, timeout=60, metadata=METADATA)
        print(f"user {user_id} is in {slug}: {slug in segments_of(memberships, user_id)}")

        try:
            segments.GetSegment(segments_pb2.GetSegmentRequest(slug=slug), timeout=10, metadata=METADATA)
        except grpc.RpcError as error:
            print(f"{error.code().name} {reason_of(error)}")


if __name__ == "__main__":
    main(sys.argv[1], int(sys.argv[2]))
