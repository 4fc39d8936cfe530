"""Named points at which a test or the demo stops, kills or fails a process, to prove that the service survives it.

Without ``SEGSVC_FAILPOINT_DIR``, reaching a point costs one attribute look-up. With it, a file with the point's name
in that folder contains the action:

    hold            wait until the file is gone or contains another action, and do that
    kill            SIGKILL this process
    fail            raise FailpointError

An action may be followed by `` key=value`` words, which must match the place where the point is reached (``hold
shard=2``). Every time an action fires, ``<point>.fired`` in the same folder gets a line with the process id and the
place.
"""

from __future__ import annotations

import os
import signal
import time
from pathlib import Path
from typing import Protocol


class FailpointError(Exception):
    """The failure that a test asked for."""


class CrashPoints(Protocol):
    """The port that the protocol calls at each of its points; a simulation has its own implementation."""

    def reach(self, point: str, **where: object) -> None: ...


class NoFailpoints:
    """Production: nothing happens."""

    def reach(self, point: str, **where: object) -> None:
        """Do nothing."""


class Failpoints:
    """Points armed by files in a folder, across processes and without a restart."""

    _POLL_S = 0.01

    def __init__(self, folder: Path) -> None:
        self._folder = folder

    def reach(self, point: str, **where: object) -> None:
        """Execute the action in the file of this point, if the file exists and its words match.

        Raises:
            FailpointError: the file says ``fail``.
        """
        here = {f"{key}={value}" for key, value in where.items()}

        action = self._noted_action(point, here)
        if action == "hold":
            while self._action(point, here) == "hold":
                time.sleep(self._POLL_S)
            action = self._noted_action(point, here)

        if action == "kill":
            os.kill(os.getpid(), signal.SIGKILL)
        if action == "fail":
            raise FailpointError(point)

    def _noted_action(self, point: str, here: set[str]) -> str | None:
        action = self._action(point, here)
        if action is not None:
            with (self._folder / f"{point}.fired").open("a") as log:
                log.write(f"{os.getpid()} {' '.join(sorted(here))}\n")
        return action

    def _action(self, point: str, here: set[str]) -> str | None:
        try:
            action, *words = (self._folder / point).read_text().split()
        except (FileNotFoundError, ValueError):
            return None
        if not here.issuperset(words):
            return None
        if action not in ("hold", "kill", "fail"):
            raise ValueError(f"failpoint {point}: unknown action {action!r}")
        return action


def failpoints(folder: Path | None) -> CrashPoints:
    """The points of this process: armed by the files in ``folder``, or without effect if it is None."""
    return Failpoints(folder) if folder else NoFailpoints()
