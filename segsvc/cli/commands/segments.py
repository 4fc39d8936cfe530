"""``segsvc segments …``: administration of segments, through the running front."""

from __future__ import annotations

import sys
from enum import StrEnum
from pathlib import Path
from typing import TYPE_CHECKING, Annotated
from uuid import uuid4

import typer

from segsvc.cli.base import FrontCommands, Json, Refusal, bar, console, plain, print_json, settings_of_process, table
from segsvc.cli.completing import segment_slugs

if TYPE_CHECKING:
    from google.longrunning.operations_pb2 import Operation
    from segmentation.v1 import segments_pb2

    from segsvc.cli.front import Front

app = FrontCommands(no_args_is_help=True, help="Create, roll out, change and delete segments.", rich_markup_mode=None)

Slug = Annotated[str, typer.Argument(help="The segment.", show_default=False, autocompletion=segment_slugs)]
Etag = Annotated[str, typer.Option(help="Refuse if the segment has changed since it had this etag.")]
Labels = Annotated[list[str] | None, typer.Option("--label", help="key=value; may be repeated.")]
NoWait = Annotated[bool, typer.Option("--no-wait", help="Return as soon as the operation is accepted.")]


class PolicyName(StrEnum):
    """What a rule means for users who come or change later."""

    LIVE = "live"
    FROZEN = "frozen"


Percent = Annotated[float, typer.Option(help="Share of the users, 0 to 100, at most three decimals.")]
ConditionText = Annotated[
    str | None,
    typer.Option(
        "--condition", help='CEL over user: user.country == "RU". Default: the condition in force.', show_default=False
    ),
]
Everyone = Annotated[bool, typer.Option("--everyone", help="Drop the condition.")]
Policy = Annotated[
    PolicyName | None,
    typer.Option(
        help="What applies to users who come or change later. Default: the policy in force.", show_default=False
    ),
]
Yes = Annotated[bool, typer.Option("--yes", "-y", help="Do not ask.")]


@app.command("list", epilog="Example: segsvc segments list --order-by 'member_count desc'")
def list_segments(
    label: Labels = None,
    order_by: Annotated[
        str, typer.Option(help="slug, create_time or member_count; ' desc' reverses the order.")
    ] = "slug",
    json_output: Json = False,
) -> None:
    """List all segments with their rules and sizes."""
    from segmentation.v1 import segments_pb2  # noqa: PLC0415

    from segsvc.cli.front import connected, to_json  # noqa: PLC0415

    found: list[segments_pb2.Segment] = []
    request = segments_pb2.ListSegmentsRequest(page_size=1000, order_by=order_by, labels=_labels(label))
    with connected(settings_of_process()) as front:
        while True:
            page = front.segments.ListSegments(request, timeout=front.timeout_s)
            found.extend(page.segments)
            if not page.next_page_token:
                break
            request.page_token = page.next_page_token

    if json_output:
        print_json([to_json(segment) for segment in found])
        return

    shown = table("slug", "rule", "members", "state", "name", right=("members",), whole=("slug", "state"))
    for segment in found:
        state = segments_pb2.Segment.State.Name(segment.state).lower()
        shown.add_row(
            segment.slug, _rule_text(segment), f"{segment.member_count:,}", state, plain(segment.display_name)
        )
    console().print(shown)


@app.command(epilog="Example: segsvc segments show checkout")
def show(slug: Slug, json_output: Json = False) -> None:
    """Show one segment."""
    from segmentation.v1 import segments_pb2  # noqa: PLC0415

    from segsvc.cli.front import connected  # noqa: PLC0415

    with connected(settings_of_process()) as front:
        segment = front.segments.GetSegment(segments_pb2.GetSegmentRequest(slug=slug), timeout=front.timeout_s)
    _show_segment(segment, json_output)


@app.command(epilog="Example: segsvc segments create checkout --name Checkout --label team=pay")
def create(
    slug: Annotated[str, typer.Argument(help="The segment's name in the API; it never changes.", show_default=False)],
    name: Annotated[str, typer.Option(help="A name for people; at most 200 characters.")] = "",
    description: Annotated[str, typer.Option(help="A description for people; at most 4000 characters.")] = "",
    label: Labels = None,
    json_output: Json = False,
) -> None:
    """Create a segment. It has no members until it is rolled out."""
    from segmentation.v1 import segments_pb2  # noqa: PLC0415

    from segsvc.cli.front import connected  # noqa: PLC0415

    segment = segments_pb2.Segment(slug=slug, display_name=name, description=description, labels=_labels(label))
    request = segments_pb2.CreateSegmentRequest(segment=segment, request_id=str(uuid4()))
    with connected(settings_of_process()) as front:
        _show_segment(front.segments.CreateSegment(request, timeout=front.timeout_s), json_output)


@app.command(epilog="Example: segsvc segments edit checkout --name 'Checkout 2' --label team=pay")
def edit(
    slug: Slug,
    name: Annotated[str | None, typer.Option(help="New name.", show_default=False)] = None,
    description: Annotated[str | None, typer.Option(help="New description.", show_default=False)] = None,
    label: Labels = None,
    clear_labels: Annotated[bool, typer.Option("--clear-labels", help="Remove all labels.")] = False,
    etag: Etag = "",
    json_output: Json = False,
) -> None:
    """Change name, description or labels (all labels at once); what is not given stays."""
    from google.protobuf.field_mask_pb2 import FieldMask  # noqa: PLC0415
    from segmentation.v1 import segments_pb2  # noqa: PLC0415

    from segsvc.cli.front import connected  # noqa: PLC0415

    changes = {
        "display_name": name is not None,
        "description": description is not None,
        "labels": bool(label) or clear_labels,
    }
    paths = [path for path, changed in changes.items() if changed]
    if not paths:
        raise typer.BadParameter("name at least one of --name, --description, --label, --clear-labels")
    if label and clear_labels:
        raise typer.BadParameter("--label replaces all labels already; leave --clear-labels out")

    segment = segments_pb2.Segment(
        slug=slug, display_name=name or "", description=description or "", labels=_labels(label), etag=etag
    )
    request = segments_pb2.UpdateSegmentRequest(segment=segment, update_mask=FieldMask(paths=paths))
    with connected(settings_of_process()) as front:
        _show_segment(front.segments.UpdateSegment(request, timeout=front.timeout_s), json_output)


@app.command(epilog="Example: segsvc segments preview sale --percent 5 --condition 'user.age >= 18'")
def preview(
    slug: Slug,
    percent: Percent,
    condition: ConditionText = None,
    everyone: Everyone = False,
    policy: Policy = None,
    json_output: Json = False,
) -> None:
    """Count exactly what a rollout with the same options would change now; change nothing."""
    from segsvc.cli.front import connected, to_json  # noqa: PLC0415
    from segsvc.cli.rolling_out import RuleOptions, fetch_preview, rule_line  # noqa: PLC0415

    options = RuleOptions(percent, condition, everyone, None if policy is None else policy is PolicyName.FROZEN)
    options.check()
    with connected(settings_of_process()) as front, bar("counting", hidden=json_output):
        rollout_preview = fetch_preview(front, slug, options)
    counts = rollout_preview.counts
    if json_output:
        print_json(to_json(counts))
        return

    console().print(f"{slug}: {_rule_text(rollout_preview.segment)}  →  {rule_line(rollout_preview.rule)}")
    numbers = ("match", "would come", "would go", "members then")
    shown = table("shard", *numbers, right=numbers)
    rows: list[tuple[str, segments_pb2.ShardCounts | segments_pb2.PreviewRollOutResponse]] = [
        *((str(part.shard), part) for part in counts.shards),
        ("all", counts),
    ]
    for shard, part in rows:
        row = (part.matched_count, part.added_count, part.removed_count, part.member_count)
        shown.add_row(shard, *(f"{count:,}" for count in row))
    console().print(shown)
    for warning in rollout_preview.warnings():
        console().print(warning)


@app.command(epilog="Example: segsvc segments rollout checkout --percent 30")
def rollout(
    slug: Slug,
    percent: Percent,
    condition: ConditionText = None,
    everyone: Everyone = False,
    policy: Policy = None,
    yes: Yes = False,
    etag: Etag = "",
    replace_queued: Annotated[
        bool, typer.Option("--replace-queued", help="Abort this segment's rollouts that still wait in the queue.")
    ] = False,
    no_wait: NoWait = False,
    json_output: Json = False,
) -> None:
    """Put a rule in force for all users: on every shard, or on none. Condition and policy stay unless they are given.

    Prints how many users would come and go, and on a terminal asks for confirmation. Refused if the segment changes
    meanwhile.
    """
    from segmentation.v1 import segments_pb2  # noqa: PLC0415

    from segsvc.cli.front import connected  # noqa: PLC0415
    from segsvc.cli.rolling_out import RuleOptions, fetch_preview  # noqa: PLC0415

    options = RuleOptions(percent, condition, everyone, None if policy is None else policy is PolicyName.FROZEN)
    options.check()
    with connected(settings_of_process()) as front:
        with bar("counting", hidden=json_output):
            rollout_preview = fetch_preview(front, slug, options)
        rollout_preview.show()

        # A script cannot be asked: it means what it says.
        if not yes and sys.stdin.isatty():
            typer.confirm("Roll it out?", abort=True, err=True)

        request = segments_pb2.RollOutSegmentRequest(
            slug=slug,
            rule=rollout_preview.rule,
            # The preview, and what was taken from the rule in force, hold for this state of the segment only.
            etag=etag or rollout_preview.segment.etag,
            request_id=str(uuid4()),
            return_immediately=True,
            replace_queued=replace_queued,
        )
        operation = front.segments.RollOutSegment(request, timeout=front.timeout_s)
        _show_end(front, operation, no_wait=no_wait, json_output=json_output)


@app.command(epilog="Example: segsvc segments delete checkout --yes")
def delete(
    slug: Slug,
    yes: Yes = False,
    etag: Etag = "",
    no_wait: NoWait = False,
    json_output: Json = False,
) -> None:
    """Remove a segment and all its memberships: on every shard, or on none. On a terminal, asks for confirmation."""
    from segmentation.v1 import segments_pb2  # noqa: PLC0415

    from segsvc.cli.front import connected  # noqa: PLC0415

    # A script cannot be asked: it means what it says.
    if not yes and sys.stdin.isatty():
        typer.confirm(f"Delete {slug} for all its users?", abort=True, err=True)
    request = segments_pb2.DeleteSegmentRequest(slug=slug, etag=etag, request_id=str(uuid4()), return_immediately=True)
    with connected(settings_of_process()) as front:
        operation = front.segments.DeleteSegment(request, timeout=front.timeout_s)
        _show_end(front, operation, no_wait=no_wait, json_output=json_output)


@app.command(epilog="Example: segsvc segments stats checkout")
def stats(slug: Slug, json_output: Json = False) -> None:
    """Count a segment's members now."""
    from segmentation.v1 import segments_pb2  # noqa: PLC0415

    from segsvc.cli.front import connected, to_json  # noqa: PLC0415

    with connected(settings_of_process()) as front:
        found = front.segments.GetSegmentStatistics(
            segments_pb2.GetSegmentStatisticsRequest(slug=slug), timeout=front.timeout_s
        )
    if json_output:
        print_json(to_json(found))
        return

    shown = table("what", "value", right=("value",))
    for what, value in (
        ("members", f"{found.member_count:,}"),
        ("by the rule", f"{found.rule_count:,}"),
        ("put in by hand", f"{found.included_count:,}"),
        ("kept out by hand", f"{found.excluded_count:,}"),
        ("users", f"{found.user_count:,}"),
        ("share", f"{found.member_share:.3%}"),
        *((f"members on shard {shard.shard}", f"{shard.member_count:,}") for shard in found.shards),
    ):
        shown.add_row(what, value)
    console().print(shown)


@app.command(epilog="Example: segsvc segments export checkout --output members.txt")
def export(
    slug: Slug,
    output: Annotated[Path | None, typer.Option(help="Write to this file instead of standard output.")] = None,
    resume_token: Annotated[str, typer.Option(help="Resume an export that was interrupted.")] = "",
    json_output: Annotated[
        bool, typer.Option("--json", help="One JSON object per page: user_ids (strings) and resume_token.")
    ] = False,
) -> None:
    """Write the ids of all members, one per line."""
    from segsvc.cli.exporting import Export  # noqa: PLC0415

    Export(slug, output, resume_token, json_output).run(settings_of_process())


def _labels(given: list[str] | None) -> dict[str, str]:
    labels: dict[str, str] = {}
    for item in given or ():
        key, equals, value = item.partition("=")
        if not equals:
            raise typer.BadParameter(f"--label must be key=value, is {item!r}")
        labels[key] = value
    return labels


def _rule_text(segment: segments_pb2.Segment) -> str:
    from segsvc.cli.rolling_out import rule_text  # noqa: PLC0415

    return rule_text(segment)


def _show_segment(segment: segments_pb2.Segment, json_output: bool) -> None:
    from segmentation.v1 import segments_pb2  # noqa: PLC0415

    from segsvc.cli.front import to_json  # noqa: PLC0415

    if json_output:
        print_json(to_json(segment))
        return

    shown = table("field", "value", whole=("value",))
    for field, value in (
        ("slug", segment.slug),
        ("name", plain(segment.display_name)),
        ("description", plain(segment.description)),
        ("labels", ", ".join(f"{key}={plain(value)}" for key, value in sorted(segment.labels.items()))),
        ("rule", _rule_text(segment)),
        ("state", segments_pb2.Segment.State.Name(segment.state).lower()),
        ("members", f"{segment.member_count:,}"),
        ("created", segment.create_time.ToJsonString()),
        ("changed", segment.update_time.ToJsonString()),
        ("uid", segment.uid),
        ("etag", segment.etag),
    ):
        shown.add_row(field, value)
    console().print(shown)


def _show_end(front: Front, operation: Operation, *, no_wait: bool, json_output: bool) -> None:
    """Wait for an operation, unless ``no_wait``, and print how it ended."""
    from segsvc.cli.following import follow, outcome  # noqa: PLC0415
    from segsvc.cli.front import to_json  # noqa: PLC0415

    if not no_wait:
        operation = follow(front, operation, quiet=json_output)
    if json_output:
        print_json(to_json(operation))
    elif no_wait:
        console().print(f"accepted: {operation.name}")
    error, text = outcome(operation)
    if error:
        raise Refusal(error)
    if text and not json_output:
        console().print(text)
