"""``segsvc users …``: what the service knows about one user, through the running front."""

from __future__ import annotations

import re
from collections.abc import Iterable
from datetime import UTC, datetime, timedelta
from typing import TYPE_CHECKING, Annotated
from uuid import uuid4

import typer

from segsvc.cli.base import FrontCommands, Json, console, plain, print_json, settings_of_process, table
from segsvc.cli.completing import segment_slugs
from segsvc.domain.sharding import USER_ID_MAX

if TYPE_CHECKING:
    from segmentation.v1 import membership_pb2

app = FrontCommands(
    no_args_is_help=True, help="Show one user; include or exclude a user in segments by hand.", rich_markup_mode=None
)

UserId = Annotated[int, typer.Argument(min=1, max=USER_ID_MAX, help="The user's id.", show_default=False)]
Slug = Annotated[str, typer.Argument(help="The segment.", show_default=False, autocompletion=segment_slugs)]
Slugs = Annotated[
    list[str],
    typer.Argument(
        help="The segments: all of them are changed, or none.", show_default=False, autocompletion=segment_slugs
    ),
]
For = Annotated[
    str | None, typer.Option("--for", help="How long the override holds: 90s, 30m, 2h, 7d.", show_default=False)
]
Until = Annotated[str | None, typer.Option(help="When the override ends: 2030-01-31T12:00:00Z.", show_default=False)]

_DURATION = re.compile(r"([1-9][0-9]{0,8})([smhd])")
_SECONDS = {"s": 1, "m": 60, "h": 3600, "d": 86400}


@app.command(epilog="Example: segsvc users show 42")
def show(user_id: UserId, json_output: Json = False) -> None:
    """Show what the service knows about a user: attributes from events, and overrides."""
    from google.protobuf.json_format import MessageToDict  # noqa: PLC0415
    from segmentation.v1 import membership_pb2  # noqa: PLC0415

    from segsvc.cli.front import connected, to_json  # noqa: PLC0415

    overrides: list[membership_pb2.Override] = []
    request = membership_pb2.ListUserOverridesRequest(user_id=user_id, page_size=1000)
    with connected(settings_of_process()) as front:
        user = front.memberships.GetUser(membership_pb2.GetUserRequest(user_id=user_id), timeout=front.timeout_s)
        while True:
            page = front.memberships.ListUserOverrides(request, timeout=front.timeout_s)
            overrides.extend(page.overrides)
            if not page.next_page_token:
                break
            request.page_token = page.next_page_token

    if json_output:
        print_json({**to_json(user), "overrides": [to_json(override) for override in overrides]})
        return

    shown = table("field", "value", whole=("value",))
    shown.add_row("user", str(user.user_id))
    shown.add_row("shard", str(user.shard))
    shown.add_row("version", str(user.version))
    shown.add_row("created", user.create_time.ToJsonString())
    shown.add_row("changed", user.update_time.ToJsonString())
    for name, value in sorted(MessageToDict(user.attributes).items()):
        shown.add_row(f"user.{name}", plain(_text(value)))
    console().print(shown)
    if overrides:
        _show_overrides(overrides)


@app.command(epilog="Example: segsvc users segments 42")
def segments(user_id: UserId, json_output: Json = False) -> None:
    """List the segments a user is in, as the gateway gets them."""
    from segmentation.v1 import membership_pb2  # noqa: PLC0415

    from segsvc.cli.front import connected, to_json  # noqa: PLC0415

    with connected(settings_of_process()) as front:
        request = membership_pb2.GetUserSegmentsRequest(user_id=user_id)
        found = front.memberships.GetUserSegments(request, timeout=front.timeout_s)

    if json_output:
        print_json(to_json(found))
        return

    shown = table("slug", whole=("slug",))
    for slug in found.slugs:
        shown.add_row(slug)
    console().print(shown)
    console().print(f"user {user_id}: {len(found.slugs):,} in all, read at {found.read_time.ToJsonString()}")


@app.command(epilog="Example: segsvc users explain 42 checkout")
def explain(user_id: UserId, slug: Slug, json_output: Json = False) -> None:
    """Explain why a user is, or is not, in a segment."""
    from segmentation.v1 import membership_pb2  # noqa: PLC0415

    from segsvc.cli.front import connected, to_json  # noqa: PLC0415

    with connected(settings_of_process()) as front:
        request = membership_pb2.CheckMembershipRequest(user_id=user_id, slug=slug)
        answer = front.memberships.CheckMembership(request, timeout=front.timeout_s)

    if json_output:
        print_json(to_json(answer))
        return

    shown = table("field", "value", whole=("value",))
    shown.add_row("member", "yes" if answer.member else "no")
    shown.add_row("reason", membership_pb2.CheckMembershipResponse.Reason.Name(answer.reason))
    shown.add_row("because", plain(answer.explanation))
    shown.add_row("bucket", str(answer.bucket))
    if answer.HasField("rule"):
        shown.add_row("rule", plain(f"{answer.rule.percent:g} % {answer.rule.condition}".rstrip()))
    console().print(shown)


@app.command(epilog="Example: segsvc users include 42 checkout dark-mode --for 2h")
def include(user_id: UserId, slugs: Slugs, hold: For = None, until: Until = None, json_output: Json = False) -> None:
    """Put a user in segments by hand, whatever the rules say."""
    _put(user_id, slugs, "INCLUDE", _expiry(hold, until), json_output=json_output)


@app.command(epilog="Example: segsvc users exclude 42 checkout --until 2030-01-31T12:00:00Z")
def exclude(user_id: UserId, slugs: Slugs, hold: For = None, until: Until = None, json_output: Json = False) -> None:
    """Keep a user out of segments by hand, whatever the rules say."""
    _put(user_id, slugs, "EXCLUDE", _expiry(hold, until), json_output=json_output)


@app.command(epilog="Example: segsvc users clear 42 checkout")
def clear(user_id: UserId, slugs: Slugs, json_output: Json = False) -> None:
    """Remove overrides: the rules decide again for this user."""
    from segmentation.v1 import membership_pb2  # noqa: PLC0415

    _modify(membership_pb2.ModifyUserOverridesRequest(user_id=user_id, clear=slugs), json_output=json_output)


def _put(user_id: int, slugs: list[str], effect: str, expires: datetime | None, *, json_output: bool) -> None:
    from segmentation.v1 import membership_pb2  # noqa: PLC0415

    request = membership_pb2.ModifyUserOverridesRequest(user_id=user_id)
    for slug in slugs:
        override = request.set.add(slug=slug, effect=membership_pb2.Override.Effect.Value(effect))
        if expires is not None:
            override.expire_time.FromDatetime(expires)
    _modify(request, json_output=json_output)


def _modify(request: membership_pb2.ModifyUserOverridesRequest, *, json_output: bool) -> None:
    from segsvc.cli.front import connected, to_json  # noqa: PLC0415

    request.request_id = str(uuid4())
    with connected(settings_of_process()) as front:
        changed = front.memberships.ModifyUserOverrides(request, timeout=front.timeout_s)
    if json_output:
        print_json(to_json(changed))
        return
    _show_overrides(changed.overrides)
    console().print(f"user {request.user_id}: {', '.join(changed.user_segments.slugs) or 'in no segment'}")


def _show_overrides(overrides: Iterable[membership_pb2.Override]) -> None:
    from segmentation.v1 import membership_pb2  # noqa: PLC0415

    shown = table("override", "effect", "until", "by", whole=("override", "effect"))
    for override in overrides:
        until = override.expire_time.ToJsonString() if override.HasField("expire_time") else "for ever"
        effect = membership_pb2.Override.Effect.Name(override.effect)
        shown.add_row(override.slug, effect, until, plain(override.creator))
    console().print(shown)


def _expiry(hold: str | None, until: str | None) -> datetime | None:
    """When an override ends; None: never."""
    if hold is not None and until is not None:
        raise typer.BadParameter("--for and --until exclude each other: give only one of them")
    if hold is not None:
        match = _DURATION.fullmatch(hold)
        if match is None:
            raise typer.BadParameter("--for is a number of s, m, h or d: 90s, 2h")
        try:
            return datetime.now(UTC) + timedelta(seconds=int(match[1]) * _SECONDS[match[2]])
        except OverflowError:
            raise typer.BadParameter("--for ends after the year 9999; without it the override holds for ever") from None
    if until is None:
        return None
    try:
        # A time without a zone is local time.
        return datetime.fromisoformat(until).astimezone(UTC)
    except (ValueError, OverflowError):
        raise typer.BadParameter("--until is a time as 2030-01-31T12:00:00Z, from year 1 to year 9999") from None


def _text(value: object) -> str:
    """The value of an attribute, for people. JSON has only one kind of number, so 42.0 is shown as 42."""
    if isinstance(value, float) and value.is_integer():
        return str(int(value))
    return ", ".join(map(str, value)) if isinstance(value, list) else str(value)
