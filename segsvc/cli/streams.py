"""Prepare the standard streams for a command: open those that are closed, and make them accept every text."""

from __future__ import annotations

import codecs
import contextlib
import io
import os
import select
import sys
from typing import Final, TextIO

ASCII_FALLBACK: Final = "segsvc-spelt"
"""Name of the error handler for output: characters that its encoding lacks are written in ASCII, so that printing never
fails."""

_ASCII: Final = {
    "…": "...", "→": "->", "←": "<-", "✓": "+", "✗": "x", "\N{REPLACEMENT CHARACTER}": "?", "–": "-", "—": "-",
    "·": "-", "×": "x", "━": "-", "╸": "-", "╺": "-", "─": "-", "│": "|", "•": "-",
}  # fmt: skip


class Process:
    """Facts about this process.

    Attributes:
        owns_streams: the process runs one command and nothing else, so its streams may be replaced.
    """

    owns_streams = False


def prepare() -> None:
    """Open the streams that are closed, and make all of them accept every text. Called once, before anything else.

    A descriptor that stays closed would be given to the next socket, and printed text would go there.
    """
    # In this order, since the lowest free number is given out first. Standard output is opened for reading: writing
    # fails, as on a closed output. What is written to a closed standard error is lost, as the caller wants it.
    for number, flags in ((0, os.O_RDONLY), (1, os.O_RDONLY), (2, os.O_WRONLY)):
        try:
            os.fstat(number)
        except OSError:
            os.set_inheritable(os.open(os.devnull, flags), True)

    sys.stdin = sys.stdin or open(0, closefd=False)  # noqa: SIM115  # lives as long as the process
    sys.stdout = sys.stdout or open(1, "w", closefd=False)  # noqa: SIM115
    sys.stderr = sys.stderr or open(2, "w", closefd=False)  # noqa: SIM115

    codecs.register_error(ASCII_FALLBACK, _to_ascii)
    for stream in (sys.stdout, sys.stderr):
        if isinstance(stream, io.TextIOWrapper):
            stream.reconfigure(errors=ASCII_FALLBACK)

    Process.owns_streams = True


def is_unicode(stream: TextIO) -> bool:
    """Whether the encoding of a stream has every character."""
    return (stream.encoding or "").lower().replace("-", "").startswith("utf")


def reader_is_gone(stream: TextIO) -> bool:
    """Whether the other end of a pipe is closed."""
    try:
        poll = select.poll()
        poll.register(stream.fileno(), select.POLLOUT)
        return any(events & (select.POLLERR | select.POLLHUP) for _, events in poll.poll(0))
    except (OSError, ValueError):  # a stream without a descriptor, as tests put in its place
        return False


def discard_output(stream: TextIO) -> None:
    """Drop the buffered text of a stream: the interpreter would try to write it once more when it exits."""
    with contextlib.suppress(OSError, ValueError):
        null = os.open(os.devnull, os.O_WRONLY)
        os.dup2(null, stream.fileno())
        os.close(null)


def _to_ascii(error: UnicodeError) -> tuple[str, int]:
    if not isinstance(error, UnicodeEncodeError):
        raise error
    missing = error.object[error.start : error.end]
    replacement = "".join(_ASCII.get(character) or ascii(character)[1:-1] for character in missing)
    return replacement, error.end
