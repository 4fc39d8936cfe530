"""A cell of the matrix, and its outcome."""

from __future__ import annotations

from dataclasses import dataclass
from enum import StrEnum
from typing import Any

from tests.failure.rig import SHARDS


class Fault(StrEnum):
    """The fault that falls on the process at the point."""

    KILL = "kill"
    """SIGKILL to this process, or to its whole worker (``Cell.whole_worker``)."""
    CUT = "cut"
    """The process's connections are cut, and a reply on its way is lost. The process lives."""
    FREEZE = "freeze"
    """SIGSTOP until other processes have decided and ended the operation, then SIGCONT: the process simply goes on."""
    NONE = "none"
    """The point is the fault: the process goes on at once."""


class Kind(StrEnum):
    ROLLOUT = "rollout"
    DELETION = "deletion"
    CREATION = "creation"


@dataclass(frozen=True, slots=True)
class Cell:
    """Attributes:
    shard: the shard of the point; None if the point is not on a shard.
    """

    point: str
    fault: Fault
    shard: int | None
    kind: Kind

    def __str__(self) -> str:
        where = "" if self.shard is None else f" shard {self.shard}"
        return f"{self.point}{where}, {self.fault}, {self.kind}"

    @property
    def whole_worker(self) -> bool:
        """Whether a kill ends the worker with all its processes: then no process gives its messages back.

        If only one process is killed, its worker replaces it and puts its message back into the queue.
        """
        return self.shard != 0 if self.shard is not None else self.kind is Kind.ROLLOUT

    @property
    def deadline_passes(self) -> bool:
        """Whether the deadline aborts a frozen process's operation; otherwise other processes end it before."""
        return self.shard != SHARDS // 2 if self.shard is not None else self.kind is not Kind.DELETION


@dataclass(slots=True)
class Outcome:
    """Attributes:
    fired: whether the fault fell at the point.
    pid: the process on which the fault fell; 0 if it fell on none.
    drain_s: seconds from the fault until nothing was open, prepared or under way any more.
    problems: differences from the required state; empty if the cell passed.
    """

    cell: Cell
    fired: bool = False
    pid: int = 0
    drain_s: float = 0.0
    state: str = ""
    answer: str = ""
    problems: tuple[str, ...] = ()

    @property
    def passed(self) -> bool:
        return self.fired and not self.problems

    def to_json(self) -> dict[str, Any]:
        shard = {"shard": self.cell.shard}
        return {
            "point": self.cell.point,
            "fault": self.cell.fault.value,
            **shard,
            "operation": self.cell.kind.value,
            "fired": self.fired,
            "pid": self.pid,
            "drain_s": round(self.drain_s, 3),
            "passed": self.passed,
            "state": self.state,
            "answer": self.answer,
            **({"problems": list(self.problems)} if self.problems else {}),
        }
