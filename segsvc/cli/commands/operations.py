"""``segsvc operations …``: rollouts and deletions while they run, and their history, through the running front."""

from __future__ import annotations

from datetime import UTC
from typing import TYPE_CHECKING, Annotated

import typer

from segsvc.cli.base import (
    FrontCommands,
    Json,
    Refusal,
    console,
    plain,
    print_json,
    settings_of_process,
    short_time,
    table,
)
from segsvc.cli.completing import operation_names

if TYPE_CHECKING:
    from google.longrunning.operations_pb2 import Operation

app = FrontCommands(
    no_args_is_help=True, help="Watch and cancel operations, which change segments.", rich_markup_mode=None
)

Name = Annotated[
    str,
    typer.Argument(help="operations/<uuid>, or the uuid alone.", show_default=False, autocompletion=operation_names),
]
_EXAMPLE = "0b5f2c9e-8f0a-4d58-9c1e-6f2d3a4b5c6d"


@app.command("list", epilog="Example: segsvc operations list --filter 'slug = checkout AND state = DONE'")
def list_operations(
    wanted: Annotated[
        str, typer.Option("--filter", help="slug, kind or state = value, joined by AND. Empty: all.")
    ] = "",
    limit: Annotated[int, typer.Option(min=1, help="How many at most.")] = 50,
    json_output: Json = False,
) -> None:
    """List operations, newest first."""
    from google.longrunning import operations_pb2  # noqa: PLC0415

    from segsvc.cli.following import Metadata, metadata_of, title_of  # noqa: PLC0415
    from segsvc.cli.front import connected, describe, to_json  # noqa: PLC0415

    found: list[Operation] = []
    request = operations_pb2.ListOperationsRequest(name="operations", filter=wanted)
    with connected(settings_of_process()) as front:
        while len(found) < limit:
            request.page_size = min(1000, limit - len(found))
            page = front.operations.ListOperations(request, timeout=front.timeout_s)
            found.extend(page.operations)
            if not page.next_page_token:
                break
            request.page_token = page.next_page_token

    if json_output:
        print_json([to_json(operation) for operation in found])
        return

    shown = table("operation", "what", "state", "accepted", whole=("operation", "state", "accepted"))
    for operation in found:
        metadata = metadata_of(operation)
        state = Metadata.State.Name(metadata.state)
        accepted = short_time(metadata.create_time.ToDatetime(UTC))
        what = title_of(metadata)
        if operation.HasField("error"):
            what = f"{what}: {plain(describe(operation.error))}"
        shown.add_row(operation.name.removeprefix("operations/"), what, state, accepted)
    console().print(shown)


@app.command(epilog=f"Example: segsvc operations show {_EXAMPLE}")
def show(name: Name, json_output: Json = False) -> None:
    """Show one operation and the progress of each shard."""
    from segsvc.cli.following import get  # noqa: PLC0415
    from segsvc.cli.front import connected  # noqa: PLC0415

    with connected(settings_of_process()) as front:
        operation = get(front, _full(name))
    _show(operation, json_output=json_output)


@app.command(epilog=f"Example: segsvc operations watch {_EXAMPLE}")
def watch(name: Name, json_output: Json = False) -> None:
    """Follow an operation to its end. Exit code 1 if it is aborted."""
    from segsvc.cli.following import follow, get, outcome  # noqa: PLC0415
    from segsvc.cli.front import connected  # noqa: PLC0415

    with connected(settings_of_process()) as front:
        operation = follow(front, get(front, _full(name)), quiet=json_output)
    _show(operation, json_output=json_output)
    error, text = outcome(operation)
    if error:
        raise Refusal(error)
    if not json_output:
        console().print(text)


@app.command(epilog=f"Example: segsvc operations cancel {_EXAMPLE}")
def cancel(name: Name, json_output: Json = False) -> None:
    """Abort an operation; possible until it is committed."""
    from google.longrunning import operations_pb2  # noqa: PLC0415

    from segsvc.cli.following import get  # noqa: PLC0415
    from segsvc.cli.front import connected, to_json  # noqa: PLC0415

    with connected(settings_of_process()) as front:
        front.operations.CancelOperation(
            operations_pb2.CancelOperationRequest(name=_full(name)), timeout=front.timeout_s
        )
        operation = get(front, _full(name)) if json_output else None
    if operation is not None:
        print_json(to_json(operation))
    else:
        console().print(f"{_full(name)} is aborted")


def _full(name: str) -> str:
    return name if name.startswith("operations/") else f"operations/{name}"


def _show(operation: Operation, *, json_output: bool) -> None:
    from segmentation.v1 import operations_pb2  # noqa: PLC0415

    from segsvc.cli.following import Metadata, metadata_of, title_of  # noqa: PLC0415
    from segsvc.cli.front import describe, to_json  # noqa: PLC0415

    if json_output:
        print_json(to_json(operation))
        return

    metadata = metadata_of(operation)
    about = table("field", "value", whole=("value",))
    about.add_row("name", operation.name)
    about.add_row("what", title_of(metadata))
    about.add_row("state", Metadata.State.Name(metadata.state))
    for label, moment in (
        ("accepted", metadata.create_time),
        ("started", metadata.start_time),
        ("committed", metadata.commit_time),
        ("ended", metadata.end_time),
    ):
        if moment.seconds:
            about.add_row(label, moment.ToJsonString())
    if metadata.actor:
        about.add_row("by", plain(metadata.actor))
    if operation.HasField("error"):
        about.add_row("why aborted", plain(describe(operation.error)))
    console().print(about)

    shards = table("shard", "state", "blocks", "added", "removed", right=("shard", "blocks", "added", "removed"))
    for shard in metadata.shards:
        state = operations_pb2.ShardProgress.State.Name(shard.state).lower()
        blocks = f"{shard.blocks_done:,}/{shard.blocks_total:,}"
        shards.add_row(str(shard.shard), state, blocks, f"{shard.added_count:,}", f"{shard.removed_count:,}")
    console().print(shards)
