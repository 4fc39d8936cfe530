"""The whole demonstration: it starts a stack of its own, runs the story, and prints the next steps."""

from __future__ import annotations

import contextlib
import fcntl
import json
import shutil
import time
from collections.abc import Callable, Iterator
from pathlib import Path

from segsvc.config import Settings
from segsvc.demo.people import user_ids
from segsvc.demo.running import run_story, summarise
from segsvc.demo.screen import Screen
from segsvc.demo.story import commands, failpoint_dir
from segsvc.local.processes import LocalStackError, tail, termination_raises
from segsvc.local.stack import LocalStack
from segsvc.local.stack_env import metrics_addresses

_MARKER = "made-by-demo"
"""A file in the stack's folder that says: the demonstration made this folder and may delete it. A running demonstration
holds a lock on it."""
_LOG_LINES = 15
OPERATION_DEADLINE_S = 10.0
"""Shorter than in production, so that recovery from a crash can be watched."""


def run_demo(
    users: int, *, keep: bool, replace: bool, stack_dir: Path, ready: Callable[[Settings], bool], report: Path
) -> bool:
    """Run the demonstration; True if every step found what it expected.

    Args:
        users: number of users that arrive.
        keep: leave the stack up afterwards.
        replace: delete the stack in the folder, even if no demonstration made it.
        stack_dir: folder of the stack; deleted afterwards unless kept.
        report: path of the report.

    Raises:
        LocalStackError: the stack did not start, or the folder holds data that no demonstration made.
        KeyboardInterrupt, SystemExit: interrupted; stack and data were removed.
    """
    screen = Screen()
    started = time.monotonic()
    screen.console.print(f"[bold]segsvc[/bold]: {users:,} users, on a stack of its own")

    _take_folder(stack_dir, replace=replace)
    stack = LocalStack(
        {"failpoint_dir": failpoint_dir(stack_dir.resolve()), "operation_deadline_s": OPERATION_DEADLINE_S},
        home=stack_dir,
        say=screen.note,
        ready=ready,
    )

    with contextlib.ExitStack() as undo:
        screen.chapter("The stack starts")
        undo.enter_context(termination_raises())
        undo.callback(lambda: stack.down(purge=True))
        settings = stack.up()
        undo.enter_context(_marked(stack_dir))
        failpoint_dir(stack_dir).mkdir(exist_ok=True)
        screen.note(f"[dim]{time.monotonic() - started:.1f} s[/dim]")

        run_story(settings, users, screen, lambda: _show_log(screen, stack))
        screen.write(report)
        summarise(screen, time.monotonic() - started, report)

        if keep:
            undo.pop_all()
            # From now on the stack belongs to the user: it is deleted only on request.
            (stack_dir / _MARKER).unlink()
            _next_steps(screen, settings, users)

    if not keep:
        screen.note("the stack is stopped and its data deleted (KEEP=1 leaves it up)")
    return screen.all_ok


def _take_folder(stack_dir: Path, *, replace: bool) -> None:
    """Empty the folder for the stack. Without ``replace``, only the remains of a killed demonstration are deleted.

    Raises:
        LocalStackError: the folder holds a stack, or another demonstration runs in it.
    """
    if not stack_dir.exists() or not any(stack_dir.iterdir()):
        return

    marker = stack_dir / _MARKER
    if marker.exists():
        with marker.open() as file:
            try:
                fcntl.flock(file, fcntl.LOCK_EX | fcntl.LOCK_NB)
            except BlockingIOError:
                raise LocalStackError(f"another demonstration runs in {stack_dir}: {_OWN_FOLDER}") from None
    elif not replace:
        raise LocalStackError(
            f"{stack_dir} holds a stack with data. Delete it with 'segsvc down --purge' or REPLACE=1 make demo "
            f"(segsvc demo --replace), or {_OWN_FOLDER}"
        )

    LocalStack(home=stack_dir, say=lambda _: None).down(purge=True)
    shutil.rmtree(stack_dir, ignore_errors=True)


_OWN_FOLDER = "give the demonstration a folder of its own: SEGSVC_STACK_DIR=build/demo make demo"


@contextlib.contextmanager
def _marked(stack_dir: Path) -> Iterator[None]:
    """Inside the block, the folder belongs to a running demonstration. Another one will not touch it."""
    with (stack_dir / _MARKER).open("w") as marker:
        fcntl.flock(marker, fcntl.LOCK_EX)
        yield


def _show_log(screen: Screen, stack: LocalStack) -> None:
    """Print the newest warnings and errors of all processes, or the end of the front's log if there are none."""
    found: list[tuple[str, str]] = []
    for log in stack.logs.glob("*.log"):
        for line in tail(log, 500).splitlines():
            with contextlib.suppress(ValueError, AttributeError):
                entry = json.loads(line)
                if entry.get("level") in ("warning", "error", "critical"):
                    found.append((entry["timestamp"], f"{log.name}: {entry['level']}: {entry['event']}"))

    front = stack.logs / "serve.log"
    lines = [text for _, text in sorted(found)[-_LOG_LINES:]] or [f"{front}:", *tail(front).splitlines()]
    screen.console.print("\nThe last lines of the logs:", *lines, sep="\n  ", markup=False)


def _next_steps(screen: Screen, settings: Settings, users: int) -> None:
    screen.chapter("The stack is up")
    screen.note(f"API      {settings.grpc_address}")
    screen.note(f"Flower   http://{settings.flower_address}  ({settings.flower_user} / {settings.flower_password})")
    for process, address in metrics_addresses(settings).items():
        screen.note(f"metrics  http://{address}/metrics  ({process})")
    screen.chapter("To copy")
    for command in commands(int(user_ids(users)[0])):
        screen.say(f".venv/bin/{command}")
    screen.say("make down                  # stops it")
