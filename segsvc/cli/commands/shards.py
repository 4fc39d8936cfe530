"""``segsvc shards …``: move a shard to another PostgreSQL server, and double the number of shards."""

from __future__ import annotations

from collections.abc import Iterator
from contextlib import contextmanager
from typing import TYPE_CHECKING, Annotated

import typer

from segsvc.cli.base import Json, Refusal, bar, console, in_force, print_json, settings_of_process

if TYPE_CHECKING:
    from segsvc.config import Settings

app = typer.Typer(
    no_args_is_help=True,
    help="Move a shard to another database, or double the number of shards, while reads go on. See docs/operations.md.",
    rich_markup_mode=None,
)

Shard = Annotated[int, typer.Argument(min=0, help="Its number.", show_default=False)]


@app.command("copy", epilog="Example: segsvc shards copy 2 --to postgresql+psycopg2://me@new/shard_2")
def copy_shard(
    shard: Shard,
    to: Annotated[str, typer.Option("--to", help="DSN of an empty database. Its password may be in ~/.pgpass.")],
    json_output: Json = False,
) -> None:
    """Close a shard to writes and copy it to an empty database. Reads go on; `segsvc shards settle` ends the move."""
    from segsvc.postgres.installation import moving  # noqa: PLC0415

    settings = _settings(shard, to)
    with _refused(), bar(f"copying shard {shard}: tables", hidden=json_output) as shown:
        copied = moving.copy(settings, shard, to, shown.to)
    if json_output:
        print_json({"shard": shard, "users": copied.users, "copy_s": round(copied.copy_s, 3)})
        return
    console().print(
        f"shard {shard}: {copied.users:,} users copied ({copied.copy_s:.1f} s). Writes to it wait. Now change its DSN "
        "in SEGSVC_SHARD_DSNS, restart every process, and run `segsvc shards settle` with the old DSN."
    )


@app.command("settle", epilog="Example: segsvc shards settle 2 --fence postgresql+psycopg2://me@old/shard_2")
def settle(
    shard: Shard,
    fence: Annotated[
        str, typer.Option("--fence", help="DSN of the database that is no longer the shard; it is shut for ever.")
    ],
    json_output: Json = False,
) -> None:
    """End a move: the database that SEGSVC_SHARD_DSNS names is the shard and accepts writes; the other one is shut.
    Works both ways: with the new database as --fence, it cancels the move."""
    from segsvc.bootstrap import settle_shard  # noqa: PLC0415

    settings = _settings(shard, fence)
    with _refused(), bar(f"settling shard {shard}", hidden=json_output):
        shut = settle_shard(settings, shard, fence)
    if json_output:
        print_json({"shard": shard, "settled": True, "other_shut": shut})
        return
    other = "is shut. Run `segsvc check`, then drop that one" if shut else "is empty, and open"
    console().print(f"shard {shard} takes writes; the other database {other}.")


@app.command("double", epilog="Example: segsvc shards double --dry-run")
def double(
    dry_run: Annotated[
        bool, typer.Option("--dry-run", help="Check everything, and say what would be done; change nothing.")
    ] = False,
    undo: Annotated[
        bool, typer.Option("--undo", help="Give up a doubling that was interrupted before its decision.")
    ] = False,
    patience: Annotated[
        float,
        typer.Option(min=0, max=600, help="Seconds to wait for processes to change over; events wait as long."),
    ] = 10.0,
    json_output: Json = False,
) -> None:
    """Divide each shard into two: the databases of SEGSVC_SHARD_DSNS_NEXT become the shards. Events wait for some
    seconds. If this is interrupted, run it again: it goes on where it was."""
    if dry_run and undo:
        raise Refusal("give --dry-run or --undo, not both")
    settings = settings_of_process()
    with _refused():
        if dry_run:
            _show_plan(settings, json_output)
        elif undo:
            _undo(settings, json_output)
        else:
            _double(settings, patience, json_output)


def _show_plan(settings: Settings, json_output: bool) -> None:
    from segsvc.postgres.installation import doubling  # noqa: PLC0415

    plan = doubling.plan(settings)
    if json_output:
        shards = [{"users": users, "bytes": size} for users, size in zip(plan.users, plan.bytes, strict=True)]
        print_json({"shards": plan.shards, "decided": plan.decided, "sizes": shards})
        return
    if plan.decided:
        console().print(f"the catalog has decided on {2 * plan.shards} shards; the command would end the doubling")
        return
    for shard, (users, size) in enumerate(zip(plan.users, plan.bytes, strict=True)):
        into = f"databases {shard} and {shard + plan.shards} of SEGSVC_SHARD_DSNS_NEXT"
        console().print(f"shard {shard}: {users:,} users, {size / 1e6:,.0f} MB, into {into}")


def _undo(settings: Settings, json_output: bool) -> None:
    from segsvc.bootstrap import undo_doubling  # noqa: PLC0415

    undone = undo_doubling(settings)
    if json_output:
        print_json({"undone": undone})
    elif undone:
        console().print("the shards take writes and operations again, as before")
    else:
        console().print("there is nothing to undo")


def _double(settings: Settings, patience: float, json_output: bool) -> None:
    from segsvc.bootstrap import double_shards  # noqa: PLC0415

    with bar("doubling", hidden=json_output) as shown:
        done = double_shards(
            settings, lambda what, step, steps: shown.to(step, steps, f"shards: {what}"), patience_s=patience
        )
    if json_output:
        print_json(
            {
                "shards": done.shards,
                "users": done.users,
                "fill_s": round(done.fill_s, 3),
                "writes_waited_s": round(done.writes_waited_s, 3),
                "operations_waited_s": round(done.operations_waited_s, 3),
            }
        )
        return
    console().print(
        f"{done.shards} shards now. Copied in {done.fill_s:.1f} s; writes waited for {done.writes_waited_s:.1f} s. Put "
        "the new databases into SEGSVC_SHARD_DSNS, remove SEGSVC_SHARD_DSNS_NEXT, and restart every process when it "
        "suits you. Run `segsvc check`, then drop the old databases."
    )


def _settings(shard: int, other_dsn: str) -> Settings:
    settings = in_force(settings_of_process())
    if shard >= settings.shard_count:
        raise Refusal(f"there is no shard {shard}: SEGSVC_SHARD_DSNS names {settings.shard_count}, from 0 on")
    if not other_dsn.startswith("postgresql+psycopg2://"):
        raise Refusal("a DSN must start with postgresql+psycopg2://")
    return settings


@contextmanager
def _refused() -> Iterator[None]:
    from segsvc.postgres.installation.closing import MoveRefused  # noqa: PLC0415

    try:
        yield
    except MoveRefused as error:
        raise Refusal(str(error)) from error
