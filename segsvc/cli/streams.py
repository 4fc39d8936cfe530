"""The standard streams, made fit for a command: they are there even if they were closed, and take every text."""

from __future__ import annotations

import codecs
import contextlib
import io
import os
import select
import sys
from typing import Final, TextIO

SPELT: Final = "segsvc-spelt"
"""Error handler of the output's encodings: what they lack is written in ASCII, so that printing never fails."""

_ASCII: Final = {
    "…": "...", "→": "->", "←": "<-", "✓": "+", "✗": "x", "\N{REPLACEMENT CHARACTER}": "?", "–": "-", "—": "-",
    "·": "-", "×": "x", "━": "-", "╸": "-", "╺": "-", "─": "-", "│": "|", "•": "-",
}  # fmt: skip


class Process:
    """What is known of this process.

    Attributes:
        ours: it runs one command and nothing else, so its streams may be replaced.
    """

    ours = False


def prepare() -> None:
    """Open the streams that are closed, and let the others take every text. Called once, before anything else.

    A descriptor that stays closed would be given to the next socket, and what is printed would go there.
    """
    # In this order, since the lowest free number is given out first. Writing to what is open for reading alone fails,
    # as it does on a closed output. What is said on a closed standard error is lost, as its owner wants it.
    for number, flags in ((0, os.O_RDONLY), (1, os.O_RDONLY), (2, os.O_WRONLY)):
        try:
            os.fstat(number)
        except OSError:
            os.set_inheritable(os.open(os.devnull, flags), True)
    sys.stdin = sys.stdin or open(0, closefd=False)  # noqa: SIM115  # lives as long as the process
    sys.stdout = sys.stdout or open(1, "w", closefd=False)  # noqa: SIM115
    sys.stderr = sys.stderr or open(2, "w", closefd=False)  # noqa: SIM115
    codecs.register_error(SPELT, _spelt)
    for stream in (sys.stdout, sys.stderr):
        if isinstance(stream, io.TextIOWrapper):
            stream.reconfigure(errors=SPELT)
    Process.ours = True


def is_unicode(stream: TextIO) -> bool:
    """Whether a stream takes every character as it is."""
    return (stream.encoding or "").lower().replace("-", "").startswith("utf")


def nobody_reads(stream: TextIO) -> bool:
    """Whether the other end of a pipe is closed."""
    try:
        poll = select.poll()
        poll.register(stream.fileno(), select.POLLOUT)
        return any(events & (select.POLLERR | select.POLLHUP) for _, events in poll.poll(0))
    except (OSError, ValueError):  # a stream without a descriptor, as tests put in its place
        return False


def forget(stream: TextIO) -> None:
    """Drop what a stream still holds, for the interpreter would try to write it once more at its end."""
    with contextlib.suppress(OSError, ValueError):
        nowhere = os.open(os.devnull, os.O_WRONLY)
        os.dup2(nowhere, stream.fileno())
        os.close(nowhere)


def _spelt(error: UnicodeError) -> tuple[str, int]:
    if not isinstance(error, UnicodeEncodeError):
        raise error
    lacking = error.object[error.start : error.end]
    spelt = "".join(_ASCII.get(character) or ascii(character)[1:-1] for character in lacking)
    return spelt, error.end
