"""``segsvc shards …``: move a shard to another PostgreSQL server."""

from __future__ import annotations

from collections.abc import Iterator
from contextlib import contextmanager
from typing import TYPE_CHECKING, Annotated

import typer

from segsvc.cli.base import Json, Refusal, bar, console, print_json, settings_of_process

if TYPE_CHECKING:
    from segsvc.config import Settings

app = typer.Typer(
    no_args_is_help=True,
    help="Move a shard to another database, while reads go on. See docs/operations.md.",
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


def _settings(shard: int, other_dsn: str) -> Settings:
    settings = settings_of_process()
    if shard >= settings.shard_count:
        raise Refusal(f"there is no shard {shard}: SEGSVC_SHARD_DSNS names {settings.shard_count}, from 0 on")
    if not other_dsn.startswith("postgresql+psycopg2://"):
        raise Refusal("a DSN must start with postgresql+psycopg2://")
    return settings


@contextmanager
def _refused() -> Iterator[None]:
    from segsvc.postgres.installation.moving import MoveRefused  # noqa: PLC0415

    try:
        yield
    except MoveRefused as error:
        raise Refusal(str(error)) from error
