"""One cell being played: the call, the stops where its process is caught, and the fault that falls on it there."""

from __future__ import annotations

import contextlib
import os
import signal
import threading
import time
from collections.abc import Callable, Iterator
from typing import Protocol, cast

import grpc

from segsvc.demo.client import OperationFailed
from segsvc.domain.operation import OperationKind
from tests.failure.cell import Cell, Fault, Kind
from tests.failure.rig import SHARDS, STEADY, FrontClient, Rig, gone, is_stopped, kill_group
from tests.failure.wire import Phase, Trap
from tests.failure.wire_postgres import PostgresSession, query, sqlstate, tag

FIRES_WITHIN_S = 15.0
DRAINS_WITHIN_S = 30.0
_POLL_S = 0.01
_KINDS = {
    Kind.ROLLOUT: OperationKind.ROLL_OUT,
    Kind.DELETION: OperationKind.DELETE,
    Kind.CREATION: OperationKind.CREATE,
}


class NotReached(Exception):
    """The situation that a cell tests did not occur."""


class Stop(Protocol):
    """A place where processes are caught."""

    @property
    def pids(self) -> list[int]:
        """Process ids of the caught processes, in order."""

    def let_go(self, *, besides: int | None = None, deliver: bool = True) -> None:
        """Catch no more processes; let every process except ``besides`` go on."""


class FailpointStop:
    """A named point of the code, held by its file."""

    def __init__(self, rig: Rig, point: str, words: str) -> None:
        self._file = rig.failpoints / point
        self._fired = rig.failpoints / f"{point}.fired"
        self._fired.unlink(missing_ok=True)
        self._file.write_text(f"hold {words}")

    @property
    def pids(self) -> list[int]:
        with contextlib.suppress(FileNotFoundError):
            return list(dict.fromkeys(int(line.split()[0]) for line in self._fired.read_text().splitlines()))
        return []

    def let_go(self, *, besides: int | None = None, deliver: bool = True) -> None:
        """The process ``besides`` is frozen or dead; it reads the file when it goes on."""
        self._file.unlink(missing_ok=True)


class Call:
    """The caller's call, in a thread, with the answer that it got."""

    def __init__(self, client: FrontClient, what: Callable[[FrontClient], object]) -> None:
        self.client = client
        self.answer = ""
        self._thread = threading.Thread(target=self._run, args=(what,), daemon=True)
        self._thread.start()

    @property
    def ended(self) -> bool:
        return not self._thread.is_alive()

    def _run(self, what: Callable[[FrontClient], object]) -> None:
        try:
            what(self.client)
            self.answer = "done"
        except OperationFailed as error:
            self.answer = f"failed: {error}"
        except grpc.RpcError as error:
            status = cast(grpc.Call, error)  # an error of a stub is a Call as well
            self.answer = f"{status.code().name}: {status.details()}"


class Scene:
    """The operations of a point's script.

    Attributes:
        percent: the percentage of a rollout.
        expected: the state in which the operation must end.
        alarm: the alarm that must be raised; '' means none.
    """

    def __init__(self, rig: Rig, cell: Cell, slug: str, percent: float) -> None:
        self.rig = rig
        self.cell = cell
        self.slug = STEADY if cell.kind is Kind.ROLLOUT else slug

        self.percent = percent
        self.expected = "DONE"
        self.alarm = ""

        self.pid = 0
        self.fell_at: float | None = None
        self.the_call: Call | None = None
        self.operation = ""

        self._undo = contextlib.ExitStack()
        self._left_over = set(rig.tasks_under_way())
        self._thawed_with: set[str] = set()
        self._newest = max((row.seq for row in rig.rows(None, "SELECT max(seq) AS seq FROM operations")), default=0)

    @property
    def shard(self) -> int:
        assert self.cell.shard is not None
        return self.cell.shard

    @property
    def others(self) -> list[int]:
        return [shard for shard in range(SHARDS) if shard != self.shard]

    @property
    def gid(self) -> str:
        return f"segsvc:{self.rig.settings.cluster}:{self.operation}:{self.shard}"

    # -- stops ------------------------------------------------------------------------------------------------------

    def failpoint(self, point: str, words: str = "") -> Stop:
        """Hold every process that reaches a named point of the code."""
        stop = FailpointStop(self.rig, point, words)
        self._undo.callback(stop.let_go)
        return stop

    def reply(
        self, command: str, *, database: str = "", where: Callable[[PostgresSession], bool] = lambda _: True
    ) -> Trap:
        """Hold the first reply that reports a command as complete, found by its tag."""
        name = database or f"shard{self.shard}"
        return self._trap(
            Phase.REPLY,
            lambda session, message: tag(message) == command and session.database == name and where(session),
        )

    def error(self, code: str, *, database: str = "") -> Trap:
        """Hold the first error of this SQLSTATE."""
        name = database or f"shard{self.shard}"
        return self._trap(Phase.REPLY, lambda session, message: sqlstate(message) == code and session.database == name)

    def request(self, start: str, *, shards: list[int], every: bool = False, spoil: bool = False) -> Trap:
        """Hold statements on their way to these shards.

        Args:
            spoil: hold nothing; make the transaction fail in the server just before.
        """
        names = {f"shard{shard}" for shard in shards}

        def matches(session: PostgresSession, message: bytes) -> bool:
            return session.database in names and message[:1] == b"Q" and message[5:].startswith(start.encode())

        return self._trap(Phase.REQUEST, matches, every=every, before=query("SELECT 1 / 0") if spoil else None)

    def _trap(
        self,
        phase: Phase,
        matches: Callable[[PostgresSession, bytes], bool],
        *,
        every: bool = False,
        before: bytes | None = None,
    ) -> Trap:
        trap = self.rig.postgres_wire.trap(phase, matches, every=every, before=before)
        self._undo.callback(trap.let_go)
        return trap

    # -- steps ------------------------------------------------------------------------------------------------------

    def until(self, condition: Callable[[], object], what: str, within_s: float = FIRES_WITHIN_S) -> None:
        """Wait for the condition. Raises NotReached if it does not come true in time."""
        end = time.monotonic() + within_s
        while not condition():
            if time.monotonic() > end:
                raise NotReached(what)
            time.sleep(_POLL_S)

    def call(self) -> None:
        """Make the call on a front that serves."""
        self.the_call = Call(self.rig.serving(), self._what())

    def _what(self) -> Callable[[FrontClient], object]:
        if self.cell.kind is Kind.ROLLOUT:
            return lambda client: client.roll_out(self.slug, self.percent)
        if self.cell.kind is Kind.DELETION:
            return lambda client: client.delete(self.slug)
        return lambda client: client.create(self.slug, "")

    def caught(self, stop: Stop, *, count: int = 1) -> int:
        """Wait until ``count`` different processes are caught. Returns the id of the first."""
        self.until(lambda: len(set(stop.pids)) >= count, f"{count} processes at the stop, {len(set(stop.pids))} came")
        self.know_operation()
        return stop.pids[0]

    def know_operation(self) -> None:
        """Find out the operation's id."""
        if not self.operation:
            rows = self.rig.rows(
                None,
                "SELECT id FROM operations WHERE seq > :newest AND kind = :kind AND slug = :slug",
                newest=self._newest or 0,
                kind=_KINDS[self.cell.kind].value,
                slug=self.slug,
            )
            if rows:
                self.operation = str(rows[0].id)

    def state(self) -> str:
        self.know_operation()
        rows = self.rig.rows(None, "SELECT state FROM operations WHERE id::text = :id", id=self.operation)
        return str(rows[0].state) if rows else ""

    def votes(self) -> set[int]:
        rows = self.rig.rows(None, "SELECT shard FROM votes WHERE operation_id::text = :id", id=self.operation)
        return {int(row.shard) for row in rows}

    def fenced(self, shard: int) -> bool:
        statement = "SELECT FROM applied_operations WHERE operation_id::text = :id"
        return bool(self.rig.rows(shard, statement, id=self.operation))

    def let_deadline_pass(self) -> None:
        """Move the deadline to now: only the catalog's clock judges it, so that a test need not wait for it."""
        self.rig.rows(
            None, "UPDATE operations SET deadline = clock_timestamp() WHERE id::text = :id", id=self.operation
        )

    # -- the fault --------------------------------------------------------------------------------------------------

    def strike(
        self,
        *stops: Stop,
        pid: int | None = None,
        undecided: bool = False,
        blocks_twins: bool = False,
        cut: Callable[[int], object] | None = None,
        between: Callable[[], None] = lambda: None,
    ) -> None:
        """Let the fault of the cell fall on the caught process, and let every process go on.

        Args:
            stops: where the process is caught, and where other processes may be caught.
            undecided: a vote is missing, so that a deadline that passes aborts the operation.
            blocks_twins: as long as the process is frozen, no twin can do the same work.
            cut: how its connections are cut; by default all connections to PostgreSQL.
            between: what is done once the fault has fallen, before the other processes go on.
        """
        self.pid = pid or self.caught(stops[0])
        self.fell_at = time.monotonic()

        fault = self.cell.fault
        if fault is Fault.FREEZE:
            self._freeze(stops, undecided and (self.cell.deadline_passes or blocks_twins), between)
            return

        if fault is Fault.KILL:
            self.kill(self.pid)
        elif fault is Fault.CUT:
            (cut or self.rig.postgres_wire.cut)(self.pid)

        between()
        for stop in stops:
            stop.let_go(besides=self.pid)
            # What a killed process had sent is lost with it. The reply that a living process waits for arrives, or
            # finds its connection cut.
            stop.let_go(deliver=fault is Fault.NONE)

    def kill(self, pid: int) -> None:
        """Kill the process or its whole worker with SIGKILL; return when it is gone."""
        if self.cell.whole_worker:
            kill_group(pid)
        else:
            os.kill(pid, signal.SIGKILL)
        if not gone(pid):
            raise NotReached(f"{pid} survived SIGKILL")

    def _freeze(self, stops: tuple[Stop, ...], deadline_passes: bool, between: Callable[[], None]) -> None:
        with self.frozen(self.pid):
            between()
            if deadline_passes:
                self.let_deadline_pass()
                self.until(lambda: self.state() in ("DONE", "ABORTED"), "its deadline ends it")
                # A twin that had started earlier may be quicker than the deadline.
                self.expected = self.state()

            for stop in stops:
                stop.let_go(besides=self.pid)
            self.until(lambda: self.state() in ("DONE", "ABORTED"), "other processes end it", DRAINS_WITHIN_S)
            for stop in stops:
                stop.let_go()

    @contextlib.contextmanager
    def frozen(self, pid: int) -> Iterator[None]:
        """Stop the process with SIGSTOP for as long as the block lasts."""
        os.kill(pid, signal.SIGSTOP)
        try:
            self.until(lambda: is_stopped(pid), "it stands still", 5)
            yield
        finally:
            self._thawed_with = set(self.rig.tasks_under_way()) - self._left_over
            os.kill(pid, signal.SIGCONT)

    def strike_late(self, request: Trap, arrived: Trap) -> None:
        """Let the fault fall on a process whose request is still on its way; the request arrives after the fault.

        Args:
            arrived: a trap for the server's answer to the request.
        """
        self.pid = self.caught(request)
        self.fell_at = time.monotonic()

        if self.cell.fault is Fault.FREEZE:
            with self.frozen(self.pid):
                self._arrive(request, arrived)
                self.until(lambda: not self._prepared(), "recovery rolls it back")
            return
        if self.cell.fault is Fault.KILL:
            self.kill(self.pid)
        else:
            self.rig.postgres_wire.cut(self.pid)
        self._arrive(request, arrived)

    def _arrive(self, request: Trap, arrived: Trap) -> None:
        request.let_go()
        self.until(lambda: self.pid in arrived.pids, "the late request is answered")
        arrived.let_go()

    def _prepared(self) -> bool:
        return self.gid in self.rig.installation.prepared(self.shard)

    # -- the end ----------------------------------------------------------------------------------------------------

    def drain(self) -> float:
        """Wait until all is quiet. Returns the seconds since the fault fell. Raises NotReached after half a minute."""
        try:
            self.until(lambda: not self.stirring(), "", DRAINS_WITHIN_S)
        except NotReached:
            raise NotReached(f"not drained within {DRAINS_WITHIN_S:g} s: {self.stirring()}") from None
        return time.monotonic() - (self.fell_at or time.monotonic())

    def stirring(self) -> str:
        """What has not ended yet; '' means that everything has ended."""
        open_ones = self.rig.rows(None, "SELECT slug, state FROM operations WHERE state NOT IN ('DONE', 'ABORTED')")
        if open_ones:
            return f"open: {[tuple(row) for row in open_ones]}"

        prepared = self.rig.rows(0, "SELECT gid FROM pg_prepared_xacts")  # of all databases
        if prepared:
            return f"prepared: {[row.gid for row in prepared]}"

        if self.the_call is not None and not self.the_call.ended:
            return "the call"

        if self.cell.fault is Fault.KILL and self.cell.whole_worker:
            # The killed worker leaves its messages behind: they are delivered again after the visibility timeout.
            return ""
        under_way = self.rig.tasks_under_way()

        if self._thawed_with & set(under_way):
            return "what was under way when the frozen went on"
        if self.operation and any(self.operation in text for text in under_way.values()):
            return "tasks of the operation"

        return ""

    def close(self) -> None:
        """Release every process that is still held."""
        self._undo.close()
        self.rig.postgres_wire.open_all()
        self.rig.broker_wire.open_all()
