"""``segsvc events …``: what became of users' events."""

from __future__ import annotations

import base64
import logging
from collections.abc import Iterator
from contextlib import contextmanager
from itertools import islice
from typing import TYPE_CHECKING, Annotated, Any

import typer

from segsvc.cli.base import Json, Refusal, bar, console, plain, print_json, settings_of_process, short_time, table

if TYPE_CHECKING:
    from tasks.dead_letter_box import DeadLetterBox, Letter

app = typer.Typer(no_args_is_help=True, help="Look after users' events.", rich_markup_mode=None)
dead = typer.Typer(
    no_args_is_help=True, help="Events that nobody can apply: look at them, send them again.", rich_markup_mode=None
)
app.add_typer(dead, name="dead")

_EXCERPT = 60

LetterId = Annotated[str, typer.Argument(help="As in the list: topic/partition/offset.", show_default=False)]


@contextmanager
def _box() -> Iterator[DeadLetterBox]:
    """The letters, connected; an outage in a line."""
    from kafka.errors import KafkaError  # noqa: PLC0415

    from tasks.dead_letter_box import DeadLetterBox, LetterNotFound  # noqa: PLC0415

    settings = settings_of_process()
    # What it cannot reach is said below, once.
    logging.getLogger("kafka").setLevel(logging.CRITICAL)
    box = None
    try:
        box = DeadLetterBox(settings)
        yield box
    except LetterNotFound as error:
        raise Refusal(f"{error}: there is no such dead letter; see `segsvc events dead list`") from None
    except (KafkaError, OSError) as error:
        where = settings.kafka_bootstrap_servers
        raise Refusal(f"Kafka at {where}: {type(error).__name__}; nothing was lost, try again") from None
    finally:
        if box is not None:
            box.close()


@dead.command("list", epilog="Example: segsvc events dead list --limit 20")
def list_dead(
    limit: Annotated[int, typer.Option(min=1, max=100_000, help="At most so many, oldest first.")] = 100,
    new: Annotated[bool, typer.Option("--new", help="Only those that `retry --all` has not sent yet.")] = False,
    json_output: Json = False,
) -> None:
    """List dead letters, oldest first in each topic."""
    with _box() as box, bar("reading dead letters", hidden=json_output):
        found = list(islice(box.letters(only_new=new), limit + 1))
    more, found = len(found) > limit, found[:limit]
    if json_output:
        print_json([_to_json(letter) for letter in found])
        return
    shown = table("id", "time", "reason", "event", whole=("id", "time"))
    for letter in found:
        shown.add_row(letter.id, short_time(letter.time), plain(letter.reason), _excerpt(letter))
    console().print(shown)
    console().print(f"{len(found):,} dead letters{', and more: raise --limit' if more else ''}")


@dead.command(epilog="Example: segsvc events dead show create-user/0/17")
def show(letter_id: LetterId, json_output: Json = False) -> None:
    """Show one dead letter whole."""
    with _box() as box:
        letter = box.letter(letter_id)
    if json_output:
        print_json(_to_json(letter))
        return
    shown = table("field", "value", whole=("value",))
    shown.add_row("id", letter.id)
    shown.add_row("topic", letter.topic)
    shown.add_row("partition/offset there", letter.origin or "not said")
    shown.add_row("time", letter.time.isoformat())
    shown.add_row("reason", plain(letter.reason))
    shown.add_row("key", plain(_text(letter.key)))
    shown.add_row("event", plain(_text(letter.raw)))
    console().print(shown)


@dead.command(epilog="Example: segsvc events dead retry create-user/0/17 create-user/0/18")
def retry(
    letter_ids: Annotated[list[str] | None, typer.Argument(help="Letters, as in the list.", show_default=False)] = None,
    everything: Annotated[bool, typer.Option("--all", help="All that --all has not sent before.")] = False,
    json_output: Json = False,
) -> None:
    """Send dead letters once more to the topics that they came from, unchanged.

    Worth it after a cause was mended, such as a limit. Events may come any number of times, so nothing can go wrong;
    what still cannot be applied becomes a new dead letter. The old ones stay where they are until the topic's
    retention drops them; --all remembers how far it came, letters named one by one are not remembered.
    """
    if bool(letter_ids) == everything:
        raise typer.BadParameter("name letters, or say --all")
    sent = 0
    with _box() as box:
        if everything:
            with bar("sending", hidden=json_output) as shown:
                for sent, total in box.retry_all():
                    shown.to(sent, total)
        else:
            letters = [box.letter(letter_id) for letter_id in letter_ids or ()]
            outcomes = box.retry(letters)
            sent = sum(outcomes)
            if sent < len(letters):
                refused = [letter.id for letter, done in zip(letters, outcomes, strict=True) if not done]
                raise Refusal(f"the broker did not take {', '.join(refused)}")
    if json_output:
        print_json({"sent": sent})
    else:
        console().print(f"{sent:,} sent again")


def _text(raw: bytes | None) -> str:
    return "none" if raw is None else raw.decode("utf-8", "backslashreplace")


def _excerpt(letter: Letter) -> str:
    text = plain(_text(letter.raw))
    return text if len(text) <= _EXCERPT else text[:_EXCERPT] + "…"


def _to_json(letter: Letter) -> dict[str, Any]:
    """A letter for programs: the bytes as text where they are UTF-8, and always as base64."""
    return {
        "id": letter.id,
        "topic": letter.topic,
        "time": letter.time.isoformat(),
        "reason": letter.reason,
        "origin": letter.origin,
        "key": None if letter.key is None else _text(letter.key),
        "event": None if letter.raw is None else _text(letter.raw),
        "event_base64": None if letter.raw is None else base64.b64encode(letter.raw).decode("ascii"),
    }
