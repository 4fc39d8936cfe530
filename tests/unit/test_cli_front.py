"""Commands that talk to the front, against a server with canned answers."""

from __future__ import annotations

import json
import signal
import threading
from collections.abc import Iterator
from typing import Any

import grpc
import pytest
from google.longrunning import operations_pb2
from google.protobuf import any_pb2, empty_pb2
from google.protobuf.message import Message
from google.rpc import code_pb2, error_details_pb2, status_pb2
from segmentation.v1 import membership_pb2, segments_pb2
from segmentation.v1 import operations_pb2 as watch_pb2
from typer import testing
from typer.testing import CliRunner

from segsvc.cli.app import app as cli
from segsvc.cli.completing import operation_names, segment_slugs
from tests.unit.canned_front import CannedFront, give_statistics, refuse, run

NAME = "operations/0b5f1c2e-0000-4000-8000-000000000000"


def packed(message: Message) -> any_pb2.Any:
    made = any_pb2.Any()
    made.Pack(message)
    return made


def operation(*, done: bool, response: Message | None = None, error: status_pb2.Status | None = None) -> Any:
    metadata = watch_pb2.OperationMetadata(
        kind=watch_pb2.OperationMetadata.ROLL_OUT,
        slug="checkout",
        state=watch_pb2.OperationMetadata.DONE if done else watch_pb2.OperationMetadata.PREPARING,
        shards=[watch_pb2.ShardProgress(shard=1, state=watch_pb2.ShardProgress.WORKING, blocks_done=3, blocks_total=9)],
    )

    made = operations_pb2.Operation(name=NAME, metadata=packed(metadata), done=done)
    if response is not None:
        made.response.Pack(response)
    if error is not None:
        made.error.CopyFrom(error)

    return made


RULE = segments_pb2.RollOutRule(percent=12.5, condition='user.country == "RU"', policy=segments_pb2.RollOutRule.FROZEN)
SEGMENT = segments_pb2.Segment(
    slug="checkout",
    display_name="New\x1b[31m",
    member_count=1234,
    rule=RULE,
    state=segments_pb2.Segment.ACTIVE,
)


# -- segments -------------------------------------------------------------------------------------------------------


def test_list_walks_all_pages(front: CannedFront) -> None:
    def answer(request: segments_pb2.ListSegmentsRequest, _: Any) -> segments_pb2.ListSegmentsResponse:
        if request.page_token:
            return segments_pb2.ListSegmentsResponse(segments=[segments_pb2.Segment(slug="last")])
        return segments_pb2.ListSegmentsResponse(segments=[SEGMENT], next_page_token="more")

    front.on("/segmentation.v1.SegmentService/ListSegments", segments_pb2.ListSegmentsRequest, answer)
    result = run("segments", "list", "--label", "team=pay", "--order-by", "member_count desc")
    assert result.exit_code == 0
    assert [line.split("  ")[0] for line in result.stdout.splitlines()] == ["slug", "checkout", "last"]
    assert '12.5 % if user.country == "RU", frozen' in result.stdout
    assert "\x1b" not in result.stdout
    assert [request.page_token for request in front.requests] == ["", "more"]
    assert dict(front.requests[0].labels) == {"team": "pay"}
    assert front.requests[0].order_by == "member_count desc"

    assert [item["slug"] for item in json.loads(run("segments", "list", "--json").stdout)] == ["checkout", "last"]


def test_a_refusal_is_one_line(front: CannedFront) -> None:
    answer = refuse(grpc.StatusCode.NOT_FOUND, "SEGMENT_NOT_FOUND", "there is no segment 'x'")
    front.on("/segmentation.v1.SegmentService/GetSegment", segments_pb2.GetSegmentRequest, answer)
    for arguments in (["segments", "show", "x"], ["segments", "show", "x", "--json"]):
        result = run(*arguments)
        assert (result.exit_code, result.stdout) == (1, "")
        assert result.stderr == "SEGMENT_NOT_FOUND: there is no segment 'x'\n"


def test_edit_sends_only_what_was_named(front: CannedFront) -> None:
    front.on(
        "/segmentation.v1.SegmentService/UpdateSegment", segments_pb2.UpdateSegmentRequest, lambda request, _: SEGMENT
    )

    for arguments, paths in (
        (["--name", ""], ["display_name"]),
        (["--description", "d", "--label", "a=b=c"], ["description", "labels"]),
        (["--clear-labels"], ["labels"]),
    ):
        assert run("segments", "edit", "checkout", "--etag", "e", *arguments).exit_code == 0
        assert list(front.requests[-1].update_mask.paths) == paths
        assert front.requests[-1].segment.etag == "e"

    assert dict(front.requests[1].segment.labels) == {"a": "b=c"}


PREVIEW = segments_pb2.PreviewRollOutResponse(added_count=1000, removed_count=5, member_count=30_000)


def roll_out(front: CannedFront, end: Any, segment: segments_pb2.Segment = SEGMENT) -> None:
    front.on("/segmentation.v1.SegmentService/GetSegment", segments_pb2.GetSegmentRequest, lambda request, _: segment)
    front.on(
        "/segmentation.v1.SegmentService/PreviewRollOut",
        segments_pb2.PreviewRollOutRequest,
        lambda request, _: PREVIEW,
    )

    front.on(
        "/segmentation.v1.SegmentService/RollOutSegment",
        segments_pb2.RollOutSegmentRequest,
        lambda request, _: operation(done=False),
    )

    front.on(
        "/segmentation.v1.OperationService/WatchOperation",
        watch_pb2.WatchOperationRequest,
        lambda request, _: iter([watch_pb2.WatchOperationResponse(name=NAME)]),
        stream=True,
    )

    for method, request_type in (
        ("GetOperation", operations_pb2.GetOperationRequest),
        ("WaitOperation", operations_pb2.WaitOperationRequest),
    ):
        front.on(f"/google.longrunning.Operations/{method}", request_type, lambda request, _: end)


def test_rollout_waits_and_says_what_it_did(front: CannedFront) -> None:
    response = segments_pb2.RollOutSegmentResponse(added_count=1000, removed_count=5, member_count=30_000)
    roll_out(front, operation(done=True, response=response))

    result = run("segments", "rollout", "checkout", "--percent", "30", "--policy", "frozen")
    assert result.exit_code == 0
    assert result.stdout == "roll out checkout: done; 1,000 added, 5 removed, 30,000 members\n"
    request = sent(front)
    assert (request.rule.percent, request.rule.policy) == (30, segments_pb2.RollOutRule.FROZEN)
    assert request.return_immediately
    assert len(request.request_id) == 36

    shown = json.loads(run("segments", "rollout", "checkout", "--percent", "30", "--json").stdout)
    assert shown["response"]["member_count"] == "30000"

    result = run("segments", "rollout", "checkout", "--percent", "30", "--no-wait")
    assert result.stdout == f"accepted: {NAME}\n"


def sent(front: CannedFront) -> segments_pb2.RollOutSegmentRequest:
    """The last rollout that was requested."""
    return [each for each in front.requests if isinstance(each, segments_pb2.RollOutSegmentRequest)][-1]


@pytest.mark.parametrize("json_output", [[], ["--json"]])
def test_a_rollout_keeps_condition_and_policy_unless_told_otherwise(front: CannedFront, json_output: list[str]) -> None:
    now = segments_pb2.Segment(slug="checkout", rule=RULE, etag="seen")
    roll_out(front, operation(done=True, response=segments_pb2.RollOutSegmentResponse()), now)
    frozen, live = segments_pb2.RollOutRule.FROZEN, segments_pb2.RollOutRule.LIVE

    for options, condition, policy, shown in (
        ([], RULE.condition, frozen, f"25 % if {RULE.condition}, frozen"),
        (["--everyone"], "", frozen, "25 %, frozen"),
        (["--condition", ""], "", frozen, "25 %, frozen"),
        (["--policy", "live"], RULE.condition, live, f"25 % if {RULE.condition}"),
        (["--condition", "user.vip", "--policy", "live"], "user.vip", live, "25 % if user.vip"),
    ):
        result = run("segments", "rollout", "checkout", "--percent", "25", *options, *json_output)
        assert result.exit_code == 0
        assert (sent(front).rule.condition, sent(front).rule.policy) == (condition, policy)
        # The etag guards what was shown: the rollout is refused if the segment has changed since.
        assert sent(front).etag == "seen"
        told = result.stderr.splitlines()
        assert told[0] == f"checkout: 12.5 % if {RULE.condition}, frozen  →  {shown}"
        assert told[1] == "1,000 would come, 5 would go, 30,000 members then"

    assert run("segments", "rollout", "checkout", "--percent", "25", "--etag", "mine").exit_code == 0
    assert sent(front).etag == "mine"
    both = run("segments", "rollout", "checkout", "--percent", "25", "--everyone", "--condition", "user.vip")
    assert both.exit_code == 2


def test_the_first_rollout_is_for_everyone(front: CannedFront) -> None:
    roll_out(front, operation(done=True), segments_pb2.Segment(slug="checkout"))
    result = run("segments", "rollout", "checkout", "--percent", "25")
    assert result.stderr.startswith("checkout: not rolled out  →  25 %\n")
    assert (sent(front).rule.condition, sent(front).rule.policy) == ("", segments_pb2.RollOutRule.LIVE)


def rollouts(front: CannedFront) -> int:
    return sum(isinstance(each, segments_pb2.RollOutSegmentRequest) for each in front.requests)


def test_a_rollout_asks_on_a_terminal_only(front: CannedFront, monkeypatch: pytest.MonkeyPatch) -> None:
    roll_out(front, operation(done=True, response=segments_pb2.RollOutSegmentResponse()))
    arguments = ("segments", "rollout", "checkout", "--percent", "25")
    monkeypatch.setattr(testing._NamedTextIOWrapper, "isatty", lambda _: True, raising=False)
    for answer, options, code in (("n", [], 1), ("", [], 1), ("y", [], 0), ("n", ["--yes"], 0), ("n", ["--json"], 1)):
        before = rollouts(front)
        result = CliRunner().invoke(cli, [*arguments, *options], input=answer)
        assert result.exit_code == code, result.output
        assert ("Roll it out?" in result.stderr) == ("--yes" not in options)
        assert rollouts(front) - before == (code == 0)


def test_an_unknown_attribute_is_reported_with_the_nearest_name(front: CannedFront) -> None:
    counts = segments_pb2.PreviewRollOutResponse(unknown_attributes=["contry", "zzz"])

    def answer(_request: Any, context: grpc.ServicerContext) -> segments_pb2.PreviewRollOutResponse:
        similar = json.dumps({"contry": ["country", "county"], "zzz": []})
        traps = json.dumps(["user.zzz is a trap"])
        context.set_trailing_metadata((("segsvc-similar-attributes", similar), ("segsvc-condition-warnings", traps)))
        return counts

    response = segments_pb2.RollOutSegmentResponse(unknown_attributes=["contry", "zzz"])
    roll_out(front, operation(done=True, response=response))
    front.on("/segmentation.v1.SegmentService/PreviewRollOut", segments_pb2.PreviewRollOutRequest, answer)
    options = ("--percent", "25", "--condition", "user.contry == 'RU' || user.zzz")
    warnings = (
        "warning: no user has user.contry; did you mean user.country or user.county?\nwarning: no user has user.zzz\n"
        "warning: user.zzz is a trap\n"
    )

    for command in (("rollout",), ("rollout", "--json")):
        result = run("segments", command[0], "checkout", *options, *command[1:])
        assert result.stderr.endswith(warnings), command
    assert run("segments", "preview", "checkout", *options).stdout.endswith(warnings)
    assert json.loads(run("segments", "preview", "checkout", *options, "--json").stdout)["unknown_attributes"] == [
        "contry",
        "zzz",
    ]
    assert "no user has user.contry, user.zzz" in run("segments", "rollout", "checkout", *options).stdout


def test_a_rollout_that_is_aborted_ends_with_1(front: CannedFront) -> None:
    status = status_pb2.Status(code=code_pb2.ABORTED, message="the shards did not all prepare before the deadline")
    status.details.add().Pack(error_details_pb2.ErrorInfo(domain="segsvc", reason="OPERATION_ABORTED"))
    roll_out(front, operation(done=True, error=status))
    for json_output in ([], ["--json"]):
        result = run("segments", "rollout", "checkout", "--percent", "30", *json_output)
        assert result.exit_code == 1
        last = result.stderr.splitlines()[-1]
        assert last == "OPERATION_ABORTED: the shards did not all prepare before the deadline"


def test_delete_says_how_many_it_had(front: CannedFront) -> None:
    end = operation(done=True, response=segments_pb2.DeleteSegmentResponse(removed_count=7))
    front.on("/segmentation.v1.SegmentService/DeleteSegment", segments_pb2.DeleteSegmentRequest, lambda request, _: end)
    result = run("segments", "delete", "checkout", "--yes")
    assert (result.exit_code, result.stdout) == (0, "roll out checkout: done; it had 7 members\n")


def test_stats_are_a_table(front: CannedFront) -> None:
    give_statistics(front)
    result = run("segments", "stats", "checkout")
    assert result.exit_code == 0
    assert [line.split() for line in result.stdout.splitlines()][-2:] == [
        ["share", "12.340%"],
        ["members", "on", "shard", "3", "1,234"],
    ]


# -- users and operations -------------------------------------------------------------------------------------------


def test_users_are_shown(front: CannedFront) -> None:
    user = membership_pb2.User(user_id=42, shard=2)
    user.attributes.update({"age": 33, "country": "RU\n", "tags": ["a", "b"], "ratio": 0.25, "beta": True})
    front.on("/segmentation.v1.MembershipService/GetUser", membership_pb2.GetUserRequest, lambda request, _: user)
    front.on(
        "/segmentation.v1.MembershipService/GetUserSegments",
        membership_pb2.GetUserSegmentsRequest,
        lambda request, _: membership_pb2.UserSegments(user_id=42, slugs=["a", "b"]),
    )
    front.on(
        "/segmentation.v1.MembershipService/ListUserOverrides",
        membership_pb2.ListUserOverridesRequest,
        lambda request, _: membership_pb2.ListUserOverridesResponse(),
    )

    rows = [line.split(maxsplit=1) for line in run("users", "show", "42").stdout.splitlines()]
    assert [row[0].strip() for row in rows][-5:] == ["user.age", "user.beta", "user.country", "user.ratio", "user.tags"]
    assert [row[1].strip() for row in rows][-5:] == ["33", "True", "RU�", "0.25", "a, b"]

    result = run("users", "segments", "42")
    assert [line.strip() for line in result.stdout.splitlines()][:3] == ["slug", "a", "b"]
    assert json.loads(run("users", "segments", "42", "--json").stdout)["slugs"] == ["a", "b"]


def test_operations_are_listed_shown_watched_and_cancelled(front: CannedFront) -> None:
    done = operation(done=True, response=segments_pb2.RollOutSegmentResponse(member_count=9))
    roll_out(front, done)
    front.on(
        "/google.longrunning.Operations/ListOperations",
        operations_pb2.ListOperationsRequest,
        lambda request, _: operations_pb2.ListOperationsResponse(operations=[done] * request.page_size),
    )
    front.on(
        "/google.longrunning.Operations/CancelOperation",
        operations_pb2.CancelOperationRequest,
        lambda request, _: empty_pb2.Empty(),
    )

    listed = run("operations", "list", "--filter", "slug = checkout", "--limit", "3")
    assert listed.exit_code == 0
    assert listed.stdout.count(NAME.removeprefix("operations/")) == 3
    assert front.requests[-1].filter == "slug = checkout"

    shown = run("operations", "show", NAME)
    assert "roll out checkout" in shown.stdout
    assert "working" in shown.stdout

    watched = run("operations", "watch", NAME.removeprefix("operations/"))
    assert watched.exit_code == 0
    assert watched.stdout.splitlines()[-1] == "roll out checkout: done; 0 added, 0 removed, 9 members"
    assert front.requests[-1].name == NAME

    assert run("operations", "cancel", NAME).stdout == f"{NAME} is aborted\n"
    assert json.loads(run("operations", "cancel", NAME, "--json").stdout)["name"] == NAME


def interrupted(_request: Any, context: grpc.ServicerContext) -> Any:
    """Raise Ctrl-C in the main thread while the command waits for this answer."""
    left = threading.Event()
    context.add_callback(left.set)
    signal.raise_signal(signal.SIGINT)
    assert left.wait(10)
    return operation(done=True)


@pytest.fixture
def interruptible() -> Iterator[None]:
    """Ctrl-C works, even if the tests were started in the background, where it is ignored."""
    before = signal.signal(signal.SIGINT, signal.default_int_handler)
    yield
    signal.signal(signal.SIGINT, before)


@pytest.mark.usefixtures("interruptible")
def test_a_wait_that_is_given_up_says_how_to_find_the_operation(front: CannedFront) -> None:
    roll_out(front, operation(done=True))
    for interruption in (
        refuse(grpc.StatusCode.UNAVAILABLE, "CATALOG_UNAVAILABLE", "the catalog cannot be reached"),
        interrupted,
    ):
        front.on("/google.longrunning.Operations/GetOperation", operations_pb2.GetOperationRequest, interruption)
        result = run("segments", "rollout", "checkout", "--percent", "30")
        assert result.exit_code in (1, 130)
        assert f"segsvc operations watch {NAME}" in result.stderr.splitlines()[2]


# -- completion -----------------------------------------------------------------------------------------------------


def test_names_are_completed(front: CannedFront) -> None:
    front.on(
        "/segmentation.v1.SegmentService/ListSegments",
        segments_pb2.ListSegmentsRequest,
        lambda request, _: segments_pb2.ListSegmentsResponse(segments=[SEGMENT, segments_pb2.Segment(slug="other")]),
    )
    front.on(
        "/google.longrunning.Operations/ListOperations",
        operations_pb2.ListOperationsRequest,
        lambda request, _: operations_pb2.ListOperationsResponse(operations=[operation(done=True)]),
    )

    assert segment_slugs("ch") == ["checkout"]
    short = NAME.removeprefix("operations/")
    assert operation_names(short[:4]) == [(short, "roll out checkout, DONE")]
    assert operation_names("operations/") == [(NAME, "roll out checkout, DONE")]


def test_without_a_front_nothing_is_completed_and_nothing_said(
    monkeypatch: pytest.MonkeyPatch, capfd: pytest.CaptureFixture[str]
) -> None:
    monkeypatch.setenv("SEGSVC_ENV_FILE", "")
    monkeypatch.setenv("SEGSVC_GRPC_ADDRESS", "127.0.0.1:1")
    assert segment_slugs("") == operation_names("") == []
    monkeypatch.setenv("SEGSVC_CATALOG_DSN", "nonsense")
    assert segment_slugs("") == []
    assert capfd.readouterr() == ("", "")
