"""One run of the commit protocol: fronts, workers, beat, events and readers under the scheduler; then a final check."""

from __future__ import annotations

import contextlib
from collections.abc import Callable, Mapping, Sequence
from dataclasses import dataclass
from uuid import UUID

import segsvc.twophase.protocol
from segsvc.domain.errors import LockTimeout, ServiceError, broker_unavailable, cache_unavailable
from segsvc.domain.operation import Gid, Operation, OperationKind, OperationPlan, OperationState, ShardProgress
from segsvc.domain.patch import Patch
from segsvc.domain.segment import Rule
from segsvc.twophase.ports import Participant, Published
from segsvc.twophase.protocol import Coordinator
from tests.simulation.commit_ledger import Catalog, Row, SimulatedLedger
from tests.simulation.commit_shard import ShardData, SimulatedShard, is_member
from tests.simulation.database import Server, Transaction
from tests.simulation.scheduler import FaultRates, Scheduler, Violation

CLUSTER = "sim"
SHARDS = 2
SEGMENTS = (1, 2)
RECOVERY_S = 0.3
KEEPER_S = 0.8
FAULT_STEPS = 500
DRAIN_STEPS = 6000
UNAVAILABLE = (ServiceError, LockTimeout)


class Silent:
    """Drops the logs: processes die by the thousand here, and their logs help no reader."""

    def __getattr__(self, _: str) -> Callable[..., None]:
        return lambda *_, **__: None


@dataclass
class Message:
    """A message in the broker. With ``shard`` None it is the chord's body."""

    operation: Operation
    shard: int | None
    chord: list[int]


@dataclass(frozen=True)
class Parts:
    """What a mutant replaces."""

    coordinator: type[Coordinator] = Coordinator
    ledger: type[SimulatedLedger] = SimulatedLedger
    shard: type[SimulatedShard] = SimulatedShard


class World:
    def __init__(
        self, seed: int, parts: Parts | None = None, *, rates: FaultRates | None = None, verbose: bool = False
    ):
        self.scheduler = Scheduler(seed, rates or FaultRates(), verbose)
        self.parts = parts or Parts()

        self.catalog = Catalog()
        self.shards = [ShardData() for _ in range(SHARDS)]
        self.queue: list[Message] = []
        self.nonces = [0] * SHARDS
        self.cached: dict[tuple[int, int], tuple[int, int]] = {}
        self.patched: dict[tuple[int, int, int], int] = {}
        """By shard, nonce and segment: the version that patches give it."""
        """By shard and segment: the generation under which the entry was filled, and the version that was read."""

        self.reached: set[str] = set()
        self.accepted: set[UUID] = set()
        self.events_acknowledged: set[int] = set()
        self.reads = 0

        random = self.scheduler.random
        self._script = [self._draw_plan(n) for n in range(random.choice((1, 2, 2, 3)))]
        self._events = list(range(100, 100 + random.choice((0, 2, 4))))

        for shard, data in enumerate(self.shards):
            data.users = {user: set() for user in range(shard, 12, SHARDS)}

        self.alarms: list[str] = []
        self._strangers = 0
        self._may_lose = random.random() < 0.2
        self._lost = False

    # -- the cast ---------------------------------------------------------------------------------------------------

    def _draw_plan(self, number: int) -> tuple[UUID, OperationPlan]:
        """The first operation is more likely to create a segment; the kinds of the rest are drawn, sensible or not."""
        random = self.scheduler.random
        kinds = (OperationKind.ROLL_OUT, OperationKind.ROLL_OUT, OperationKind.DELETE, OperationKind.CREATE)
        kind = OperationKind.CREATE if number == 0 and random.random() < 0.3 else random.choice(kinds)
        segment = random.choice(SEGMENTS)
        rule = Rule(random.choice((0, 30, 70, 100))) if kind is OperationKind.ROLL_OUT else None
        plan = OperationPlan(kind, f"segment-{segment}", segment, UUID(int=segment), segment, rule=rule)
        return UUID(int=number + 1), plan

    def coordinator(self) -> Coordinator:
        """Build the protocol as one process has it."""
        ledger = self.parts.ledger(self.scheduler, self.catalog, self._reach, SHARDS)

        return self.parts.coordinator(
            cluster=CLUSTER,
            ledger=ledger,  # type: ignore[arg-type]
            participants=[
                self.parts.shard(self.scheduler, n, data, self.catalog, self._reach)
                for n, data in enumerate(self.shards)
            ],
            invalidation=self,
            dispatcher=self,
            fan_out=self._fan_out,
            observer=self,
            crash_points=self,
        )

    def front(self) -> None:
        """Accept the operations of the script one after the other, and carry out creations here."""
        coordinator = self.coordinator()
        ledger = coordinator._ledger

        while self._script:
            operation_id, plan = self._script.pop(0)
            try:
                ledger.insert(operation_id, plan)  # type: ignore[attr-defined]
                self.accepted.add(operation_id)
                started = coordinator.start_next() if plan.kind is not OperationKind.CREATE else ledger.start_next()
                if started is None or plan.kind is not OperationKind.CREATE:
                    continue
                if started.id != operation_id:
                    coordinator.dispatch(started, range(SHARDS))
                    continue
                self._fan_out(lambda shard, i=operation_id: coordinator.prepare_shard(i, shard.shard, _silent),
                              coordinator.participants)  # type: ignore[misc]  # fmt: skip
                self._finalize(coordinator, operation_id)
            except UNAVAILABLE:
                continue  # the operation is accepted or not; recovery handles both

    def worker(self) -> None:
        coordinator = self.coordinator()
        random = self.scheduler.random
        self._recover(coordinator)

        while True:
            self.scheduler.wait(lambda: bool(self.queue), None, "wait for a message")
            message = random.choice(self.queue)

            # Acknowledged late: the message is still there if this process dies, unless the broker loses it.
            if self.scheduler.chance(self.scheduler.rates.twin_message):
                twin = True
            else:
                twin = False
                self.queue.remove(message)

            try:
                if message.shard is None:
                    self._finalize(coordinator, message.operation.id)
                else:
                    coordinator.prepare_shard(message.operation.id, message.shard, _silent)
                    self._header_done(message)
            except UNAVAILABLE:
                self.scheduler.sleep(0.1)
                if not twin and random.random() < 0.5:
                    self.queue.append(message)

    def _finalize(self, coordinator: Coordinator, operation_id: UUID) -> None:
        """Finalize as a chord's body does. People read its result in Flower, so the result must be true."""
        if coordinator.finalize(operation_id) and not self.catalog.rows[operation_id].state.final:
            raise Violation("a finalizer says that an operation has ended, and it has not")

    def _header_done(self, message: Message) -> None:
        if message.shard in message.chord:
            message.chord.remove(message.shard)
            if not message.chord:
                self.queue.append(Message(message.operation, None, message.chord))

    def beat(self) -> None:
        coordinator = self.coordinator()
        while True:
            self._recover(coordinator)
            self.scheduler.sleep(RECOVERY_S)

    def _recover(self, coordinator: Coordinator) -> None:
        with contextlib.suppress(*UNAVAILABLE):  # the next recovery comes soon
            coordinator.recover()

    def keeper(self) -> None:
        """A front that keeps deadlines."""
        coordinator = self.coordinator()
        while True:
            with contextlib.suppress(*UNAVAILABLE):
                coordinator.abort_late_ones()
            self.scheduler.sleep(KEEPER_S)

    def bridge(self) -> None:
        """Send user events until each is applied."""
        while self._events:
            user = self._events[0]

            shard = self.parts.shard(
                self.scheduler, user % SHARDS, self.shards[user % SHARDS], self.catalog, self._reach
            )

            try:
                shard.add_user(user)
            except UNAVAILABLE:
                self.scheduler.sleep(0.1)
                continue

            self.events_acknowledged.add(user)
            if self._events and self._events[0] == user:
                self._events.pop(0)

    def reader(self) -> None:
        """Read memberships through the cache, by the steps of the cache protocol."""
        while True:
            self.scheduler.sleep(0.15)
            shard, segment = self.scheduler.random.randrange(SHARDS), self.scheduler.random.choice(SEGMENTS)
            known = self._newest_done(segment)

            nonce = self.nonces[shard]
            entry = self.cached.get((shard, segment))
            if entry is not None and entry[0] == nonce:
                version = max(entry[1], self.patched.get((shard, nonce, segment), 0))
            else:
                participant = self.parts.shard(self.scheduler, shard, self.shards[shard], self.catalog, self._reach)
                try:
                    version = participant.version(segment)
                except UNAVAILABLE:
                    continue
                self.scheduler.pause("fill")
                self.cached[shard, segment] = (nonce, version)

            self.reads += 1
            if version < known:
                raise Violation(f"a read saw version {version} of segment {segment}, {known} had been reported done")

    def _newest_done(self, segment: int) -> int:
        return max(
            (row.seq for row in self._of(segment) if row.state is OperationState.DONE), default=0
        )  # fmt: skip

    def _of(self, segment: int) -> list[Row]:
        kinds = (OperationKind.ROLL_OUT, OperationKind.DELETE)
        return [row for row in self.catalog.rows.values()
                if row.plan.segment_id == segment and row.plan.kind in kinds]  # fmt: skip

    # -- ports ------------------------------------------------------------------------------------------------------

    def _reach(self, point: str, **_: object) -> None:
        self.reached.add(point)
        self.scheduler.pause(point)

    reach = _reach

    def dispatch(self, operation: Operation, shards: Sequence[int]) -> None:
        chord = list(shards)
        for shard in shards:
            self.scheduler.pause("publish")
            if self.scheduler.chance(self.scheduler.rates.lost_request):
                raise broker_unavailable()
            if not self.scheduler.chance(self.scheduler.rates.lost_message):
                self.queue.append(Message(operation, shard, chord))

        if self.scheduler.chance(self.scheduler.rates.early_body * 10):
            self.queue.append(Message(operation, None, chord))

    entries_gone_after_s = 3600.0

    def write_patch(self, shard: int, patch: Patch) -> bytes:
        self.scheduler.pause("write a patch")
        if self.scheduler.chance(self.scheduler.rates.lost_request):
            raise cache_unavailable()
        return b""

    def append_patch(self, shard: int, patch: Patch, token: bytes) -> Published:
        self.scheduler.pause("append a patch")
        if self.scheduler.chance(self.scheduler.rates.lost_request):
            raise cache_unavailable()
        key = (shard, self.nonces[shard], patch.segment_id)
        self.patched[key] = max(self.patched.get(key, 0), patch.epoch)
        if self.scheduler.chance(self.scheduler.rates.lost_reply):
            raise cache_unavailable()
        return Published.APPENDED

    def drop_generations(self, shards: Sequence[int]) -> None:
        for shard in shards:
            self.scheduler.pause("drop a generation")
            if self.scheduler.chance(self.scheduler.rates.lost_request):
                raise cache_unavailable()
            self.nonces[shard] += 1

    def raise_alarm(self, what: str, **where: object) -> None:
        expected = {"unknown-prepared": bool(self._strangers), "prepared-lost": self._lost}
        if not expected.get(what):
            raise Violation(f"alarm: {what} {where}")
        self.alarms.append(what)

    def in_doubt(self, shard: int, oldest_s: Mapping[str, float]) -> None:
        """No metric is kept here."""

    def not_ended(self, oldest_s: Mapping[OperationState, float]) -> None:
        """No metric is kept here."""

    def _fan_out(self, visit: Callable[[Participant], None], participants: Sequence[Participant]) -> None:
        errors: list[Exception] = []
        open_visits = [len(participants)]

        def run(participant: Participant) -> None:
            try:
                visit(participant)
            except UNAVAILABLE as error:
                errors.append(error)
            finally:
                open_visits[0] -= 1

        for participant in participants:
            self.scheduler.spawn(
                f"{self.scheduler.current_name} visit {participant.shard}", lambda p=participant: run(p)
            )
        self.scheduler.wait(lambda: open_visits[0] == 0, None, "wait for visits")

        if errors:
            raise errors[0]

    # -- the run ----------------------------------------------------------------------------------------------------

    def run(self) -> None:
        """Raises Violation."""
        kept, segsvc.twophase.protocol.log = segsvc.twophase.protocol.log, Silent()  # type: ignore[assignment]
        try:
            self._run()
        finally:
            self.scheduler.close()
            segsvc.twophase.protocol.log = kept

    def _run(self) -> None:
        scheduler = self.scheduler
        scheduler.add_process("front", self.front)
        scheduler.add_process("worker 1", self.worker)
        scheduler.add_process("worker 2", self.worker)
        scheduler.add_process("beat", self.beat)
        scheduler.add_process("keeper", self.keeper)
        scheduler.add_process("bridge", self.bridge)
        scheduler.add_process("reader", self.reader)

        if scheduler.random.random() < 0.7:
            for segment in SEGMENTS:
                self.catalog.rules[segment] = 0
                for data in self.shards:
                    data.rules[segment] = 0

        for operation_id, _ in self._script:
            if scheduler.random.random() < 0.06:
                self.catalog.refused_at_commit[operation_id] = scheduler.random.choice((1, 1, 1000))
            if scheduler.random.random() < 0.06:
                self.catalog.refused_on_shards.add(operation_id)

        if scheduler.random.random() < 0.1:
            self._add_stranger()

        scheduler.run(FAULT_STEPS, self._drained_or_loses)
        if scheduler.chance(0.5):
            self.queue.clear()
            scheduler.note("the broker is emptied")

        scheduler.end_faults()
        if not scheduler.run(DRAIN_STEPS, self._drained):
            open_rows = [f"{row.plan.kind.name} {row.state.name}" for row in self.catalog.rows.values()]
            raise Violation(f"it does not come to rest: {open_rows}, {[list(data.prepared) for data in self.shards]}")

        self._reckon()

    def _add_stranger(self) -> None:
        """Add a prepared transaction with our name that the ledger does not know: no process may end it."""
        data = self.shards[0]
        gid = str(Gid(CLUSTER, UUID(int=99), 0))
        data.prepared[gid] = (Transaction(Server(self.scheduler, "stranger", broker_unavailable)), 0.0)
        self._strangers = 1

    def _drained_or_loses(self) -> bool:
        """Whether all is at rest. In some runs a server loses a prepared transaction once, as after a restore or
        without fsync."""
        if self._may_lose and not self._lost and self.scheduler.chance(0.05):
            for number, data in enumerate(self.shards):
                ours = [gid for gid in data.prepared if str(UUID(int=99)) not in gid]
                if ours:
                    transaction, _ = data.prepared.pop(ours[0])
                    transaction.end()
                    self._lost = True
                    self.scheduler.note(f"shard {number} loses {ours[0]}")
                    break
        return self._drained()

    def _drained(self) -> bool:
        return (
            not self._script
            and not self._events
            and all(row.state.final for row in self.catalog.rows.values())
            and sum(len(data.prepared) for data in self.shards) == self._strangers
            and not any(task.process is None for task in self.scheduler.tasks)
        )

    def _reckon(self) -> None:
        """Check what must be true once everything is at rest."""
        if not self.accepted <= self.catalog.rows.keys():
            raise Violation("an operation that was accepted is not in the ledger")

        for row in self.catalog.rows.values():
            fenced = [row.id in data.fences for data in self.shards]
            if not (all(fenced) if row.state is OperationState.DONE else not any(fenced)):
                raise Violation(f"{row.plan.kind.name} is {row.state.name}, its fences are {fenced}")

        if sum(len(data.prepared) for data in self.shards) != self._strangers:
            raise Violation("a prepared transaction that nobody knows was ended")

        for number, data in enumerate(self.shards):
            if data.rules != self.catalog.rules:
                raise Violation(f"shard {number} has the rules {data.rules}, the catalog {self.catalog.rules}")
            for user, segments in data.users.items():
                expected = {segment for segment, threshold in data.rules.items() if is_member(user, threshold)}
                if segments != expected:
                    raise Violation(f"user {user} is in {segments}, the rules say {expected}")
            lost = {user for user in self.events_acknowledged if user % SHARDS == number} - data.users.keys()
            if lost:
                raise Violation(f"users {lost} were acknowledged and are not there")


def _silent(_: ShardProgress) -> None:
    pass
