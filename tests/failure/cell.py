"""A cell of the matrix, and what came of it."""

from __future__ import annotations

from dataclasses import dataclass
from enum import StrEnum
from typing import Any

from tests.failure.rig import SHARDS


class Fault(StrEnum):
    """What falls on the process that is at the point."""

    KILL = "kill"
    """SIGKILL: of this process, or of the whole worker that it belongs to (``Cell.whole_worker``)."""
    CUT = "cut"
    """Its connections are cut; a reply that was on its way is lost. The process lives."""
    FREEZE = "freeze"
    """SIGSTOP until the operation is decided and ended by others, then SIGCONT: it goes on as if nothing had been."""
    NONE = "none"
    """The point is the fault: the process goes on at once."""


class Kind(StrEnum):
    ROLLOUT = "rollout"
    DELETION = "deletion"
    CREATION = "creation"


@dataclass(frozen=True, slots=True)
class Cell:
    """Attributes:
    shard: where the point is; None: it is not on a shard.
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
        """Whether a kill takes the worker with all its processes: nobody gives its messages back then. A process
        alone is replaced by its worker, which puts its message back into the queue."""
        return self.shard != 0 if self.shard is not None else self.kind is Kind.ROLLOUT

    @property
    def deadline_passes(self) -> bool:
        """Whether a frozen process's operation is aborted by its deadline, rather than ended by others before it."""
        return self.shard != SHARDS // 2 if self.shard is not None else self.kind is not Kind.DELETION


@dataclass(slots=True)
class Outcome:
    """Attributes:
    fired: the fault fell where it was to fall.
    pid: on which process; 0: on none.
    drain_s: from the fault until nothing was open, prepared or under way any more.
    problems: what is not as it must be; none: passed.
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
