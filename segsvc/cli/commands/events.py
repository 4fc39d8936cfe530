"""``segsvc events …``: dead letters and lost events."""

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
    from segsvc.bridge.dead_letter_box import DeadLetterBox, Letter
    from segsvc.domain.event_records import FoundLoss
    from segsvc.postgres.catalog.event_records import PostgresEventRecords

app = typer.Typer(no_args_is_help=True, help="Handle user events that were not applied.", rich_markup_mode=None)
dead = typer.Typer(
    no_args_is_help=True,
    help="Events that cannot be applied: list, show, retry and dismiss them.",
    rich_markup_mode=None,
)
app.add_typer(dead, name="dead")
lost = typer.Typer(
    no_args_is_help=True, help="Events that Kafka dropped before the bridge read them.", rich_markup_mode=None
)
app.add_typer(lost, name="lost")

_EXCERPT = 60

LetterIds = Annotated[list[str] | None, typer.Argument(help="Ids of dead letters, as in the list.", show_default=False)]
LetterId = Annotated[str, typer.Argument(help="Its id, as in the list: topic/partition/offset.", show_default=False)]


@contextmanager
def _box() -> Iterator[DeadLetterBox]:
    """A connection to the dead letters; an outage of Kafka becomes a one-line message."""
    from segsvc.bootstrap import EventRecords  # noqa: PLC0415
    from segsvc.bridge.dead_letter_box import KAFKA_ERRORS, DeadLetterBox, LetterNotFound  # noqa: PLC0415

    settings = settings_of_process()
    # An unreachable broker is reported below, once.
    logging.getLogger("kafka").setLevel(logging.CRITICAL)
    services = EventRecords(settings)
    box = None
    try:
        box = DeadLetterBox(settings, services.records)
        yield box
    except LetterNotFound as error:
        raise Refusal(f"{error}: there is no such dead letter; see `segsvc events dead list`") from None
    except KAFKA_ERRORS as error:
        where = settings.kafka_bootstrap_servers
        raise Refusal(f"Kafka at {where}: {type(error).__name__}; nothing was lost, try again") from None
    finally:
        if box is not None:
            box.close()
        services.close()


@dead.command("list", epilog="Example: segsvc events dead list --limit 20")
def list_dead(
    limit: Annotated[int, typer.Option(min=1, max=100_000, help="Maximum number, oldest first.")] = 100,
    new: Annotated[
        bool, typer.Option("--new", help="Only letters that were neither sent again nor dismissed.")
    ] = False,
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
    """Show one dead letter in full."""
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
    if not letter.whole:
        size = len(letter.raw or b"") if letter.size is None else letter.size
        shown.add_row(
            "what is shown", f"the first {len(letter.raw or b''):,} of {size:,} bytes of the {letter.content}"
        )
    shown.add_row(letter.content, plain(_text(letter.raw)))
    shown.add_row("state", "done: sent again or dismissed" if letter.done else "waits")
    console().print(shown)


@dead.command(epilog="Example: segsvc events dead retry create-user/0/17 create-user/0/18")
def retry(
    letter_ids: LetterIds = None,
    everything: Annotated[
        bool, typer.Option("--all", help="All letters that were neither sent again nor dismissed.")
    ] = False,
    json_output: Json = False,
) -> None:
    """Send dead letters again, unchanged, to the topics that they came from.

    Useful after the cause was fixed, such as a limit. Each letter is sent once and then counts as done; an event that
    still cannot be applied becomes a new dead letter. Letters that hold only a part of an event are skipped. Letters
    stay in their topic until its retention drops them.
    """
    _letters_or_all(letter_ids, everything)

    sent = left_out = 0
    with _box() as box:
        if everything:
            with bar("sending", hidden=json_output) as shown:
                for sent, left_out, total in box.retry_all():
                    shown.to(sent + left_out, total)
        else:
            letters = [box.letter(letter_id) for letter_id in dict.fromkeys(letter_ids or ())]
            _refuse_what_cannot_be_sent(letters)
            for letter in letters:
                if not letter.done:
                    if not box.retry(letter):
                        raise Refusal(f"the broker did not take {letter.id}; {sent:,} before it were sent again")
                    sent += 1

    if json_output:
        print_json({"sent": sent, "left_out": left_out})
        return
    console().print(f"{sent:,} sent again")
    if left_out:
        console().print(f"{left_out:,} hold only a part of an event: see them with `segsvc events dead list --new`")


@dead.command(epilog="Example: segsvc events dead dismiss create-user/0/17")
def dismiss(
    letter_ids: LetterIds = None,
    everything: Annotated[bool, typer.Option("--all", help="All that there are now.")] = False,
    json_output: Json = False,
) -> None:
    """Mark dead letters as done without sending them: these events are no longer needed.

    The letters stay in their topic until its retention drops them; `segsvc doctor` and the metrics no longer count
    them.
    """
    _letters_or_all(letter_ids, everything)
    with _box() as box:
        if everything:
            count = box.dismiss_all()
        else:
            letters = [box.letter(letter_id) for letter_id in dict.fromkeys(letter_ids or ())]
            count = sum(not letter.done for letter in letters)
            for letter in letters:
                box.dismiss(letter)

    if json_output:
        print_json({"dismissed": count})
    else:
        console().print(f"{count:,} dismissed")


def _letters_or_all(letter_ids: list[str] | None, everything: bool) -> None:
    if bool(letter_ids) == everything:
        raise typer.BadParameter("name letters, or say --all")


def _refuse_what_cannot_be_sent(letters: list[Letter]) -> None:
    parts = [letter.id for letter in letters if not letter.whole]
    if parts:
        names = ", ".join(parts)
        raise Refusal(f"{names}: only a part of the event is there; let its producer send it again, then dismiss it")


@lost.command("list", epilog="Example: segsvc events lost list")
def list_lost(
    everything: Annotated[bool, typer.Option("--all", help="Also gaps that were acknowledged.")] = False,
    json_output: Json = False,
) -> None:
    """List gaps: offsets that Kafka dropped before the bridge had read them."""
    with _records() as records:
        found = records.losses(acknowledged=everything)
    if json_output:
        print_json([_loss_to_json(one) for one in found])
        return

    shown = table("id", "topic", "partition", "offsets", "at most", "found", "reason", "acknowledged", whole=("id",))
    for one in found:
        loss = one.loss
        count = "unknown" if loss.count_max is None else f"{loss.count_max:,}"
        known = "" if one.acknowledge_time is None else short_time(one.acknowledge_time)
        place = (plain(loss.topic), str(loss.partition), loss.offsets)
        shown.add_row(str(one.id), *place, count, short_time(one.find_time), loss.reason, known)
    console().print(shown)
    console().print(f"{len(found):,} gaps{'' if everything else ' not acknowledged'}")


@lost.command(epilog="Example: segsvc events lost acknowledge 3")
def acknowledge(
    ids: Annotated[list[int] | None, typer.Argument(help="Ids of gaps, as in the list.", show_default=False)] = None,
    everything: Annotated[bool, typer.Option("--all", help="All that there are now.")] = False,
    json_output: Json = False,
) -> None:
    """Mark a gap as known: `segsvc doctor` and the alert no longer report it.

    Before that, have the producers send the lost events again, or the current state of all their users.
    """
    if bool(ids) == everything:
        raise typer.BadParameter("name gaps, or say --all")

    with _records() as records:
        there = {one.id for one in records.losses(acknowledged=True)}
        unknown = sorted(set(ids or ()) - there)
        if unknown:
            raise Refusal(f"{', '.join(map(str, unknown))}: there is no such gap; see `segsvc events lost list --all`")
        count = records.acknowledge(sorted(there) if everything else ids or ())

    if json_output:
        print_json({"acknowledged": count})
    else:
        console().print(f"{count:,} acknowledged")


@contextmanager
def _records() -> Iterator[PostgresEventRecords]:
    from segsvc.bootstrap import EventRecords  # noqa: PLC0415

    services = EventRecords(settings_of_process())
    try:
        yield services.records
    finally:
        services.close()


def _loss_to_json(one: FoundLoss) -> dict[str, Any]:
    """A gap as JSON. Offsets are strings: a double may not hold them exactly."""
    loss = one.loss
    return {
        "id": one.id,
        "topic": loss.topic,
        "partition": loss.partition,
        "first_offset": str(loss.first_offset),
        "end_offset": None if loss.end_offset is None else str(loss.end_offset),
        "reason": loss.reason,
        "find_time": one.find_time.isoformat(),
        "acknowledge_time": None if one.acknowledge_time is None else one.acknowledge_time.isoformat(),
    }


def _text(raw: bytes | None) -> str:
    return "none" if raw is None else raw.decode("utf-8", "backslashreplace")


def _excerpt(letter: Letter) -> str:
    text = plain(_text(letter.raw))
    return text if len(text) <= _EXCERPT else text[:_EXCERPT] + "…"


def _to_json(letter: Letter) -> dict[str, Any]:
    """A dead letter as JSON: its bytes as text, with escapes where they are not UTF-8, and as base64."""
    return {
        "id": letter.id,
        "topic": letter.topic,
        "time": letter.time.isoformat(),
        "reason": letter.reason,
        "origin": letter.origin,
        "key": None if letter.key is None else _text(letter.key),
        "content": letter.content,
        "whole": letter.whole,
        "bytes": len(letter.raw or b"") if letter.size is None else letter.size,
        "done": letter.done,
        "event": None if letter.raw is None else _text(letter.raw),
        "event_base64": None if letter.raw is None else base64.b64encode(letter.raw).decode("ascii"),
    }
