"""What the commands of the local stack share: its packages may be missing, and its errors become one-line messages."""

from __future__ import annotations

from collections.abc import Iterator
from contextlib import contextmanager

from segsvc.cli.base import Refusal
from segsvc.local.packages import what_is_missing


@contextmanager
def local_stack_available() -> Iterator[None]:
    """Inside the block ``segsvc.local`` can be imported, and an error of the stack ends the command with its message.

    Raises:
        Refusal: the packages of the local stack are not installed, or the stack failed.
    """
    if missing := what_is_missing():
        raise Refusal(missing)
    from segsvc.local.processes import LocalStackError  # noqa: PLC0415  # needs those packages

    try:
        yield
    except LocalStackError as error:
        raise Refusal(str(error)) from error
