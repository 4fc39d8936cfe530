"""``segsvc users …``: what the service knows of one user, through the running front."""

from __future__ import annotations

from typing import Annotated

import typer

from segsvc.cli.base import Json, console, plain, print_json, settings_of_process, table

app = typer.Typer(no_args_is_help=True, help="Look at one user.", rich_markup_mode=None)

UserId = Annotated[int, typer.Argument(help="The user's number.", show_default=False)]


@app.command(epilog="Example: segsvc users show 42")
def show(user_id: UserId, json_output: Json = False) -> None:
    """Show what the service knows of a user from the events."""
    from google.protobuf.json_format import MessageToDict  # noqa: PLC0415
    from segmentation.v1 import membership_pb2  # noqa: PLC0415

    from segsvc.cli.front import TIMEOUT_S, connected, to_json  # noqa: PLC0415

    with connected(settings_of_process()) as front:
        user = front.memberships.GetUser(membership_pb2.GetUserRequest(user_id=user_id), timeout=TIMEOUT_S)
    if json_output:
        print_json(to_json(user))
        return
    shown = table("field", "value")
    shown.add_row("user", str(user.user_id))
    shown.add_row("shard", str(user.shard))
    shown.add_row("version", str(user.version))
    shown.add_row("created", user.create_time.ToJsonString())
    shown.add_row("changed", user.update_time.ToJsonString())
    for name, value in sorted(MessageToDict(user.attributes).items()):
        shown.add_row(f"user.{name}", plain(_text(value)))
    console().print(shown)


@app.command(epilog="Example: segsvc users segments 42")
def segments(user_id: UserId, json_output: Json = False) -> None:
    """List the segments a user is in, as the gateway gets them."""
    from segmentation.v1 import membership_pb2  # noqa: PLC0415

    from segsvc.cli.front import TIMEOUT_S, connected, to_json  # noqa: PLC0415

    with connected(settings_of_process()) as front:
        request = membership_pb2.GetUserSegmentsRequest(user_id=user_id)
        found = front.memberships.GetUserSegments(request, timeout=TIMEOUT_S)
    if json_output:
        print_json(to_json(found))
        return
    shown = table("slug")
    for slug in found.slugs:
        shown.add_row(slug)
    console().print(shown)
    console().print(f"user {user_id}: {len(found.slugs):,} in all, read at {found.read_time.ToJsonString()}")


def _text(value: object) -> str:
    """An attribute for people. JSON has only one kind of number: 42.0 is shown as 42."""
    if isinstance(value, float) and value.is_integer():
        return str(int(value))
    return ", ".join(map(str, value)) if isinstance(value, list) else str(value)
