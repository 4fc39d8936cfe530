"""Storms of calls whose deadlines end while the database works: afterwards nothing is left of them.

A deadline bounds the statements of its call. It must never bound the end of a transaction: the server would stay inside
the transaction, and refuse every later statement on that connection.
"""

from __future__ import annotations

import itertools
import random
import threading
import time
from collections import Counter
from collections.abc import Callable, Iterator, Sequence
from concurrent.futures import ThreadPoolExecutor
from typing import Any

import grpc
import pytest
import sqlalchemy as sa
from google.longrunning import operations_pb2 as lro
from google.protobuf.message import Message
from grpc import StatusCode
from grpc_health.v1 import health_pb2
from segmentation.v1 import membership_pb2 as members
from segmentation.v1 import operations_pb2 as watch
from segmentation.v1 import segments_pb2 as pb

from grpc_api import server
from tests.contract.conftest import FrontUnderTest, new_slug
from tests.contract.rollouts import NOBODY, roll_out
from tests.eventually import eventually

USERS = range(9_100_000, 9_100_064)
CALLERS = 24
SHORT_S = (0.002, 0.060)

STREAMS = ("ExportSegmentUsers", "WatchOperation", "Health/Watch")
ENDLESS = ("Health/Watch",)
"""Streams that end with their deadline."""

FAULTS = (StatusCode.INTERNAL, StatusCode.UNKNOWN, StatusCode.DATA_LOSS)


class Requests:
    """A request for each method; some name a segment that is created and deleted again and again."""

    def __init__(self, slugs: Sequence[str], operation: str) -> None:
        self._make: dict[str, Callable[[str, int], Message]] = {
            "CreateSegment": lambda slug, _: pb.CreateSegmentRequest(segment={"slug": f"{slug}-x"}),
            "GetSegment": lambda slug, _: pb.GetSegmentRequest(slug=slug),
            "ListSegments": lambda *_: pb.ListSegmentsRequest(page_size=10),
            "UpdateSegment": lambda slug, _: pb.UpdateSegmentRequest(segment={"slug": slug, "description": new_slug()}),
            "DeleteSegment": lambda slug, _: pb.DeleteSegmentRequest(slug=f"{slug}-x"),
            "PreviewRollOut": lambda slug, _: pb.PreviewRollOutRequest(
                slug=slug, rule={"percent": 50, "condition": 'user.country == "DE"'}
            ),
            "RollOutSegment": lambda slug, user: pb.RollOutSegmentRequest(slug=slug, rule={"percent": user % 100}),
            "GetSegmentStatistics": lambda slug, _: pb.GetSegmentStatisticsRequest(slug=slug),
            "ExportSegmentUsers": lambda slug, _: pb.ExportSegmentUsersRequest(slug=slug),
            "GetUserSegments": lambda _, user: members.GetUserSegmentsRequest(user_id=user),
            "BatchGetUserSegments": lambda *_: members.BatchGetUserSegmentsRequest(user_ids=list(USERS)),
            "CheckMembership": lambda slug, user: members.CheckMembershipRequest(slug=slug, user_id=user),
            "ModifyUserOverrides": lambda slug, user: members.ModifyUserOverridesRequest(
                user_id=user, set=[{"slug": slug, "effect": members.Override.INCLUDE}]
            ),
            "ListUserOverrides": lambda _, user: members.ListUserOverridesRequest(user_id=user),
            "GetUser": lambda _, user: members.GetUserRequest(user_id=user),
            "WatchOperation": lambda *_: watch.WatchOperationRequest(name=operation),
            "ListOperations": lambda *_: lro.ListOperationsRequest(name="operations", page_size=5),
            "GetOperation": lambda *_: lro.GetOperationRequest(name=operation),
            "DeleteOperation": lambda *_: lro.DeleteOperationRequest(name=operation),
            "CancelOperation": lambda *_: lro.CancelOperationRequest(name=NOBODY),
            "WaitOperation": lambda *_: lro.WaitOperationRequest(name=operation),
            "Health/Check": lambda *_: health_pb2.HealthCheckRequest(),
            "Health/List": lambda *_: health_pb2.HealthListRequest(),
            "Health/Watch": lambda *_: health_pb2.HealthCheckRequest(),
        }

        self._slugs = slugs

    def of(self, method: str, drawn: random.Random) -> bytes:
        return self._make[_short(method)](drawn.choice(self._slugs), drawn.choice(USERS)).SerializeToString()


def _short(method: str) -> str:
    service, name = method.rsplit("/", 1)
    return f"Health/{name}" if service.endswith("Health") else name


def outcome(front: FrontUnderTest, method: str, request: bytes, timeout_s: float) -> StatusCode:
    try:
        if _short(method) in STREAMS:
            for _ in front.channel.unary_stream(method)(request, timeout=timeout_s):
                pass
        else:
            front.channel.unary_unary(method)(request, timeout=timeout_s)
    except grpc.RpcError as error:
        code: StatusCode = error.code()
        return code
    return StatusCode.OK


@pytest.fixture
def requests(front: FrontUnderTest) -> Requests:
    front.installation.create_users({user_id: {"country": "DE"} for user_id in USERS})
    slugs = [front.create(new_slug("storm")).slug for _ in range(4)]
    return Requests(slugs, roll_out(front, slugs[0], 10).name)


def storm(front: FrontUnderTest, requests: Requests, seconds: float) -> Counter[tuple[str, StatusCode]]:
    """Calls of all methods with tiny deadlines. Returns how often each method ended with each code."""
    end = time.monotonic() + seconds

    def call_on(seed: int) -> Counter[tuple[str, StatusCode]]:
        drawn = random.Random(seed)
        methods = server._methods()
        drawn.shuffle(methods)
        ended: Counter[tuple[str, StatusCode]] = Counter()
        for method in itertools.cycle(methods):
            if time.monotonic() > end:
                return ended
            code = outcome(front, method, requests.of(method, drawn), drawn.uniform(*SHORT_S))
            ended[_short(method), code] += 1
        raise AssertionError("an endless cycle has ended")

    total: Counter[tuple[str, StatusCode]] = Counter()
    with ThreadPoolExecutor(CALLERS) as threads:
        for ended in threads.map(call_on, range(CALLERS)):
            total += ended
    return total


def left_open(front: FrontUnderTest) -> list[Any]:
    """Sessions of the front that have been idle inside a transaction for more than a second."""
    with front.installation.databases.catalog.connect() as connection:
        return list(
            connection.execute(
                sa.text(
                    "SELECT datname, state, query FROM pg_stat_activity WHERE datname = ANY(:names)"
                    " AND state LIKE 'idle in transaction%' AND state_change < clock_timestamp() - interval '1 second'"
                ),
                {"names": front.installation.database_names},
            )
        )


def calm(front: FrontUnderTest, requests: Requests, rounds: int) -> Iterator[tuple[str, StatusCode]]:
    """Calls of all methods with enough time, several at once, so that each connection of the front is used."""
    work = [method for method in server._methods() if _short(method) not in ENDLESS] * rounds
    lock = threading.Lock()
    drawn = random.Random(7)

    def call(method: str) -> tuple[str, StatusCode]:
        with lock:
            request = requests.of(method, drawn)
        return _short(method), outcome(front, method, request, 10)

    with ThreadPoolExecutor(CALLERS) as threads:
        yield from threads.map(call, work)


@pytest.mark.parametrize("seconds", [3, pytest.param(35, marks=pytest.mark.long)])
def test_a_storm_of_short_deadlines_leaves_nothing_behind(
    front: FrontUnderTest, requests: Requests, seconds: float
) -> None:
    ended = storm(front, requests, seconds)
    assert {method for method, _ in ended} == {_short(method) for method in server._methods()}
    assert {code for _, code in ended} & {StatusCode.OK, StatusCode.DEADLINE_EXCEEDED}
    assert not {key: count for key, count in ended.items() if key[1] in FAULTS}

    eventually(lambda: not left_open(front))
    front.create()  # after all operations that were accepted in the storm
    refusals = {StatusCode.NOT_FOUND, StatusCode.ALREADY_EXISTS, StatusCode.ABORTED, StatusCode.UNIMPLEMENTED}
    allowed = {StatusCode.OK, StatusCode.FAILED_PRECONDITION, *refusals}
    queued = ("CreateSegment", "RollOutSegment", "DeleteSegment")  # the number of queued operations is limited
    full = {(method, StatusCode.RESOURCE_EXHAUSTED) for method in queued}
    assert not [each for each in calm(front, requests, 8) if each[1] not in allowed and each not in full]
