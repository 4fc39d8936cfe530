"""google.longrunning.Operations and WatchOperation: operations of the same ledger are read, listed and watched."""

from __future__ import annotations

import itertools
import time

import pytest
from google.longrunning import operations_pb2 as lro
from grpc import StatusCode
from segmentation.v1 import operations_pb2

from tests.contract.conftest import FrontUnderTest
from tests.contract.refusals import refused
from tests.contract.rollouts import NOBODY, State, get_operation, held, metadata, operations_of, roll_out


@pytest.fixture
def users(front: FrontUnderTest) -> range:
    """Users 1 … 400 exist."""
    front.installation.create_users({user_id: {} for user_id in range(1, 401)})
    return range(1, 401)


# -- google.longrunning.Operations ----------------------------------------------------------------------------------


def test_names_of_operations(front: FrontUnderTest) -> None:
    for call in (
        lambda name: front.operations.GetOperation(lro.GetOperationRequest(name=name)),
        lambda name: front.operations.WaitOperation(lro.WaitOperationRequest(name=name), timeout=5),
        lambda name: front.operations.CancelOperation(lro.CancelOperationRequest(name=name)),
        lambda name: list(front.watches.WatchOperation(operations_pb2.WatchOperationRequest(name=name), timeout=5)),
    ):
        missing, malformed, unknown = (refused(lambda n=name: call(n)) for name in ("", "operations/1", NOBODY))  # noqa: B023

        assert (missing.reason, list(missing.violations)) == ("FIELD_REQUIRED", ["name"])
        assert (malformed.reason, list(malformed.violations)) == ("FIELD_INVALID", ["name"])
        assert (unknown.code, unknown.reason) == (StatusCode.NOT_FOUND, "OPERATION_NOT_FOUND")
        assert unknown.metadata == {"operation": NOBODY}


def test_operations_are_the_history(front: FrontUnderTest) -> None:
    request = lro.DeleteOperationRequest(name=roll_out(front, front.create().slug, 1).name)
    refusal = refused(lambda: front.operations.DeleteOperation(request))
    assert (refusal.code, refusal.reason) == (StatusCode.UNIMPLEMENTED, "NOT_IMPLEMENTED")


def test_operations_are_listed_newest_first(front: FrontUnderTest) -> None:
    slug = front.create().slug
    names = [roll_out(front, slug, percent).name for percent in (1, 2, 3, 4, 5)]

    listed = [operation.name for operation in operations_of(front, slug)]
    assert listed[:5] == names[::-1]
    assert len(listed) == 6

    paged, token = [], ""
    while True:
        page = front.operations.ListOperations(
            lro.ListOperationsRequest(name="operations", filter=f"slug = {slug}", page_size=4, page_token=token)
        )
        paged += [operation.name for operation in page.operations]
        token = page.next_page_token
        if not token:
            break

    assert paged == listed
    assert get_operation(front, names[0]) == next(op for op in operations_of(front, slug) if op.name == names[0])


@pytest.mark.parametrize(
    ("text", "count"),
    [
        ("slug = {slug}", 3),
        ('slug="{slug}"', 3),
        ("slug = {slug} AND kind = ROLL_OUT", 2),
        ("kind=CREATE AND state=DONE AND slug={slug}", 1),
        ("  slug = {slug}   AND state = ABORTED ", 0),
    ],
)
def test_filters(front: FrontUnderTest, text: str, count: int) -> None:
    slug = front.create().slug
    roll_out(front, slug, 1)
    roll_out(front, slug, 2)
    request = lro.ListOperationsRequest(name="operations", filter=text.format(slug=slug))
    assert len(front.operations.ListOperations(request).operations) == count


@pytest.mark.parametrize(
    "text",
    ["slug", "slug = ", "slug = A", "name = x", "state = done", "kind = X", "slug = a OR slug = b", "slug=a AND slug=b",
     "slug = a slug = b", "slug != a"],
)  # fmt: skip
def test_filters_that_are_none(front: FrontUnderTest, text: str) -> None:
    refusal = refused(lambda: front.operations.ListOperations(lro.ListOperationsRequest(filter=text)))
    assert (refusal.reason, list(refusal.violations)) == ("FIELD_INVALID", ["filter"])


def test_invalid_requests_about_operations(front: FrontUnderTest) -> None:
    ask = front.operations.ListOperations
    assert list(refused(lambda: ask(lro.ListOperationsRequest(name="segments"))).violations) == ["name"]
    assert list(refused(lambda: ask(lro.ListOperationsRequest(page_size=-1))).violations) == ["page_size"]
    token = ask(lro.ListOperationsRequest(page_size=1)).next_page_token
    for wrong in ({"page_token": "x"}, {"page_token": token, "filter": "kind = CREATE"}):
        assert refused(lambda wrong=wrong: ask(lro.ListOperationsRequest(**wrong))).reason == "PAGE_TOKEN_INVALID"


# -- watching -------------------------------------------------------------------------------------------------------


def test_a_watch_shows_every_change_and_ends_with_the_end(front: FrontUnderTest, users: range) -> None:
    slug = front.create().slug
    with held(front) as release:
        name = roll_out(front, slug, 10, return_immediately=True).name
        begun = time.monotonic()
        watch = front.watches.WatchOperation(operations_pb2.WatchOperationRequest(name=name), timeout=20)
        messages = [next(watch)]
        assert messages[0].metadata.state in (State.QUEUED, State.PREPARING)
        release()
        messages += watch
        lasted_s = time.monotonic() - begun

    assert [message.name for message in messages] == [name] * len(messages)
    states = [message.metadata.state for message in messages]
    assert states == sorted(states)
    assert states[-1] == State.DONE
    assert messages[-1].metadata == metadata(get_operation(front, name))
    assert all(one != other for one, other in itertools.pairwise(messages))
    # At most one message each tenth of a second; a busy machine may deliver two of them together.
    assert len(messages) <= 2 + lasted_s / 0.1


def test_a_watch_of_an_ended_operation_is_one_message(front: FrontUnderTest) -> None:
    operation = roll_out(front, front.create().slug, 10)
    watch = front.watches.WatchOperation(operations_pb2.WatchOperationRequest(name=operation.name), timeout=10)
    assert [message.metadata for message in watch] == [metadata(operation)]
